"""What the benchmarks compare is the same function, what they count is right, and what they write can be read."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_oracle
import launches
import pytest
import quick_interpreter
import revisions
import scan
import torch
from allocations import allocations
from contenders import (
    ATTENTION,
    OURS,
    PRODUCTS,
    PUBLISHED,
    TRITON,
    Shape,
    layer_contenders,
    ours_on,
    scan_contenders,
)
from products import Products, products_of_minibatch
from published import PublishedDecoder, published_layer, read_all
from pydantic import ValidationError
from scan_pictures import draw
from scan_results import Results, read, tables
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ttt.config import TTTConfig
from ttt.costs import scan_cost
from ttt.layer import TTTLayer
from ttt.ops import fused
from ttt.ops.rotary import rotary_angles

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

# --- the published formulation ---


def _layer(**settings: object) -> TTTLayer:
    layer = TTTLayer(24, 3, TTTConfig.model_validate(settings), dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return layer


def _tokens(length: int) -> Tensor:
    x = torch.randn(2, length, 24, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return x.requires_grad_()


def _gradients(y: Tensor, layer: TTTLayer, x: Tensor) -> list[Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    return list(torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("group_size", [0, 3])
@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
@pytest.mark.parametrize("length", [3, 20, 37])
def test_the_published_formulation_is_the_layers_function(layer_type: str, length: int, group_size: int) -> None:
    layer, x = _layer(layer_type=layer_type, mini_batch_size=5), _tokens(length)
    expected, found = layer(x)[0], published_layer(layer, x, group_size=group_size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(_gradients(expected, layer, x), _gradients(found, layer, x), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
def test_the_published_formulation_for_video_is_the_layers_function(layer_type: str) -> None:
    layer, x = _layer(preset="video", layer_type=layer_type, mini_batch_size=6), _tokens(24)
    rotary = rotary_angles(torch.arange(24), 8, theta=100.0, dtype=torch.float64)
    expected, found = layer(x, rotary=rotary)[0], published_layer(layer, x, rotary=rotary, group_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(_gradients(expected, layer, x), _gradients(found, layer, x), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
def test_published_decoding_is_the_layers_function(layer_type: str) -> None:
    layer, x = _layer(layer_type=layer_type, mini_batch_size=4), _tokens(11)
    torch.testing.assert_close(read_all(PublishedDecoder(layer, 2), x), layer(x)[0].detach(), rtol=1e-9, atol=1e-9)


def test_the_published_formulation_has_no_deeper_model() -> None:
    with pytest.raises(ValueError, match="not 3 layers"):
        published_layer(_layer(layer_type="mlp", mlp_layers=3), _tokens(16))


# --- what is compared ---

SMALL = (
    Shape("linear", "linear", 16, 2, 4, tokens=72),
    Shape("video", "mlp", 16, 2, 8, tokens=144, causal=False),
    Shape("MLP", "mlp", 16, 2, 4, tokens=75, batch=2),
)


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
@pytest.mark.parametrize("part", [layer_contenders, scan_contenders])
def test_contenders_compute_the_same(part: object, shape: Shape) -> None:
    groups = [(0, False), (16, True)]
    contenders = list(part(shape, groups, CPU, compiled=False))  # type: ignore[operator]
    found = {(one.name, one.group_size): one for one in contenders if one.name in (PUBLISHED, *OURS)}
    assert len(found) == 6
    base = found[PUBLISHED, 0]
    for one in found.values():
        torch.testing.assert_close(one.forward(), base.forward(), rtol=1e-3, atol=1e-4)
        gradients, expected = one.both(), base.both()
        assert isinstance(gradients, tuple)
        assert isinstance(expected, tuple)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * theirs.abs().max().item())
    assert {one.name for one in contenders} - {PUBLISHED, *OURS} <= {ATTENTION, PRODUCTS}


@pytest.mark.parametrize("part", [layer_contenders, scan_contenders])
@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
def test_the_kernels_are_a_contender(part: object, layer_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, beside the fused scan; each runs under its name."""
    pytest.importorskip("triton")
    quick_interpreter.install()
    from ttt.ops import minibatch

    ran = []
    right = minibatch.triton_scan
    monkeypatch.setattr(minibatch, "triton_scan", lambda *a, **k: ran.append(TRITON) or right(*a, **k))
    shape = Shape("tiny", layer_type, 16, 1, 4, tokens=6)  # type: ignore[arg-type]
    names = ("fused", TRITON)
    contenders = part(shape, [(1, False)], CPU, compiled=False, names=names)  # type: ignore[operator]
    found = {}
    for one in contenders:
        ran.clear()
        if one.name in names:
            found[one.name] = [one.forward(), *one.both()]
            assert bool(ran) == (one.name == TRITON)
    for ours, theirs in zip(*(found[name] for name in names), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_kernels_are_timed_where_a_gpu_has_them() -> None:
    pytest.importorskip("triton")
    shape = Shape("F 64", "linear", 128, 2, 16, tokens=32)
    assert ours_on(shape, torch.device("cuda")) == (*OURS, TRITON)
    assert ours_on(Shape("F 24", "linear", 48, 2, 16, tokens=32), torch.device("cuda")) == OURS
    assert ours_on(shape, CPU) == OURS


def test_contenders_run_the_implementation_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from ttt.ops import minibatch

    ran = []
    right = minibatch.fused_scan
    monkeypatch.setattr(minibatch, "fused_scan", lambda *a, **k: ran.append("fused") or right(*a, **k))
    for one in layer_contenders(SMALL[0], [(0, False)], CPU, compiled=False):
        ran.clear()
        one.both()
        assert bool(ran) == (one.name == "fused"), one.name


def test_the_products_are_those_of_the_dual_form() -> None:
    # The cost section of the design: 6F² + 4CF and 56F² + 20CF a token and head; the bias's products are merged.
    width, size = 8, 4
    linear = sum(product.flops for product in products_of_minibatch((width, width), size, dual=True)) / size
    mlp = sum(product.flops for product in products_of_minibatch((width, 4 * width, width), size, dual=True)) / size
    assert linear == 6 * width**2 + 4 * size * width
    assert mlp == 56 * width**2 + 20 * size * width
    shape = SMALL[2]
    products = Products(shape.widths, shape.minibatches, shape.batch * shape.heads, torch.empty(0), dual=shape.causal)
    assert shape.minibatches == {4: 18, 3: 1}
    assert products.flops == scan.cost_of_products(shape)
    with FlopCounterMode(display=False) as counter:
        products.forward()
    assert counter.get_total_flops() == products.flops
    for recomputed in (False, True):
        with FlopCounterMode(display=False) as counter:
            products.forward_and_backward(recomputed=recomputed)
        assert counter.get_total_flops() == (3 + recomputed) * products.flops


# --- what is counted ---


def test_allocations_are_counted_to_the_byte() -> None:
    def known() -> tuple[Tensor, Tensor]:
        first = torch.empty(1_000_000, dtype=torch.uint8)
        second = torch.empty(2_000_000, dtype=torch.uint8)
        del first
        return second, torch.empty(500_000, dtype=torch.uint8)

    for _ in range(2):  # the second time blocks are reused by the system's allocator
        assert allocations(known, CPU) == (3_000_000, 2_500_000, 3)


def test_temporaries_of_kernels_are_counted() -> None:
    x = torch.randn(1000, 100)

    def hidden() -> Tensor:
        return x.t().contiguous().var(dim=0, keepdim=True)

    counted = allocations(hidden, CPU)
    assert counted.peak >= 1000 * 100 * 4 + 1000 * 4
    assert counted.held == 1000 * 4


def test_the_graph_between_forward_and_backward_is_held() -> None:
    x = torch.randn(1000, requires_grad=True)
    kept = allocations(lambda: x.exp().sin(), CPU)
    assert kept.held == 2 * 4000  # the input of sin, and the answer
    assert allocations(lambda: x.detach().exp().sin(), CPU).held == 4000
    both = allocations(lambda: torch.autograd.grad(x.exp().sin().sum(), x), CPU)
    assert both.held == 4000  # the gradient


def test_held_memory_of_the_scan_is_its_carries() -> None:
    shape = Shape("MLP", "mlp", 64, 2, 4, tokens=256)
    (fused,) = (one for one in scan_contenders(shape, [(16, False)], CPU, compiled=False) if one.name == "fused")
    assert fused.kept is not None
    held = allocations(fused.kept, CPU).held
    carries = (64 // 16 - 1) * shape.cost().carry_bytes
    tokens = 256 * 64 * 4
    # The carries, the answers, the target that it makes of values and keys, and what opens and closes the scan.
    assert carries + 2 * tokens <= held <= carries + 2 * tokens + 3 * shape.cost().carry_bytes


# --- what is written ---


MEASURED = SMALL[:1]
"""The one of the fewest operations: each of them is an event of the profiler, which takes most of the time."""


@pytest.fixture(scope="module")
def results() -> Results:
    told: list[str] = []
    found = scan.run(
        CPU,
        shapes=MEASURED,
        sizes=(0, 16),
        lengths=(16, 32),
        tokens=12,
        repeats=1,
        quick=True,
        compiled=False,
        tell=told.append,
    )
    assert len(told) == len(MEASURED) + 2
    return found


def test_a_run_measures_everybody(results: Results, tmp_path: Path) -> None:
    for shape, given in zip(results.shapes, MEASURED, strict=True):
        assert (shape.tokens, shape.dim, shape.head_width) == (given.tokens, 16, 8)
        cost = scan_cost(given.config(0), dim=16, num_heads=2, tokens=given.tokens, batch_size=given.batch)
        assert shape.carry_bytes == cost.carry_bytes
        auto = {row.group_size for row in shape.rows if row.auto}
        assert auto == {given.layer("auto", CPU)._group_size(given.tokens)}
        for part, others in (("layer", {ATTENTION}), ("scan", {ATTENTION, PRODUCTS})):
            rows = [row for row in shape.rows if row.part == part]
            assert {row.contender for row in rows} == {PUBLISHED, *OURS, *others}
            for row in rows:
                assert (row.speedup is not None) == (row.contender in OURS)
                if row.contender != PRODUCTS:
                    assert (row.peak_bytes or 0) > 0
                    # Backward ends with gradients, and adds its own to what forward holds.
                    assert 0 < (row.held_bytes or 0) <= (row.peak_bytes or 0)
            held = {row.group_size: row.held_bytes or 0 for row in rows if row.contender == "generic"}
            assert held[16] < held[0]
    assert {point.tokens for point in results.growth} == {16, 32}
    assert {one.contender for one in results.decoding} == {PUBLISHED, *OURS, "in place", ATTENTION}
    for one in results.decoding:
        assert one.grown_bytes == 0, one.contender
    in_place = next(one for one in results.decoding if one.contender == "in place")
    assert in_place.first_blocks == in_place.last_blocks

    path = tmp_path / "scan.json"
    path.write_text(results.model_dump_json(), encoding="utf-8")
    assert read(path) == results
    text = tables(results)
    for name in (PUBLISHED, *OURS, PRODUCTS, ATTENTION, "in place"):
        assert f"| {name}" in text
    draw(results, tmp_path / "scan.png")
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")


def test_results_say_nothing_of_where_they_were_made(results: Results) -> None:
    text = results.model_dump_json()
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text


def test_results_of_another_format_are_refused(results: Results, tmp_path: Path) -> None:
    facts = json.loads(results.model_dump_json())
    for change in ({"format": 2}, {"repeats": "9"}, {"hostname": "here"}):
        path = tmp_path / "scan.json"
        path.write_text(json.dumps({**facts, **change}), encoding="utf-8")
        with pytest.raises(ValidationError):
            read(path)


def test_the_results_that_are_kept_can_be_read() -> None:
    for path in sorted(RESULTS.glob("scan_*.json")):
        found = read(path)
        assert not found.quick
        assert found.machine.kind == path.stem.removeprefix("scan_")
        assert {shape.name for shape in found.shapes} == {shape.name for shape in scan.SHAPES}
        assert path.with_suffix(".png").exists()


def test_the_command_line_refuses_what_it_cannot_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, words in ((["--repeats", "0"], "at least one round"), (["--device", "tpu"], "invalid choice")):
        monkeypatch.setattr("sys.argv", ["scan.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            scan.main()
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


# --- the device against the definition ---


def test_the_oracle_of_a_device_sees_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is below its bound; a device whose projection is off by a billionth is not."""
    setting = ("mlp", True, 37, 4)
    assert cuda_oracle.difference(*setting, device="cpu")[0] < cuda_oracle.BOUND
    to = TTTLayer.to

    def off(self: TTTLayer, *where: object, **how: object) -> TTTLayer:
        with torch.no_grad():
            self.o_proj.weight.mul_(1 + 1e-9)
        return to(self, *where, **how)

    monkeypatch.setattr(TTTLayer, "to", off)
    assert cuda_oracle.difference(*setting, device="cpu")[0] > cuda_oracle.BOUND


# --- revisions, groups, launches ---


def test_another_revision_runs_its_own_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes, and its norms: the working tree's may not answer for it."""
    root = RESULTS.parent.parent
    source = root / "ttt" / "ops" / "fused"

    def shown(command: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        """What git would show of a revision with these files; a test need not run in a repository."""
        if command[1] == "ls-tree":
            text = "\n".join(f"ttt/ops/fused/{path.name}" for path in sorted(source.glob("*.py")))
        else:
            text = (root / command[2].partition(":")[2]).read_text(encoding="utf-8")
        return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(revisions.subprocess, "run", shown)
    monkeypatch.setattr("sys.path", [*sys.path])
    other = revisions.fused_of("of a test", tmp_path)
    ran: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Names():
        found = revisions.Scan(other, SMALL[2], 16, CPU).both()
    for a, b in zip(found, revisions.Scan(fused, SMALL[2], 16, CPU).both(), strict=True):
        assert torch.equal(a, b)
    ours = [name.split("::") for name in ran if "minibatches" in name]
    assert ours == [[other.__name__, "minibatches"], [other.__name__, "minibatches_backward"]]
    assert other.backward.is_constant.__module__ == f"{other.__name__}.norm"


def test_group_0_holds_its_closed_form() -> None:
    """On a CPU it has no zeros behind rows, so a little less."""
    clock = revisions.ThreadClock(CPU, 3, budget=0)
    for cell in revisions.compare_groups(Shape("MLP", "mlp", 128, 2, 4, tokens=80), clock)[2:]:
        held, closed = (float(number) for number in str(cell).split(" of "))
        assert 0.95 * closed - 0.01 <= held <= closed


def test_how_many_times_as_fast() -> None:
    faster = revisions.Faster.of([2.0, 4.0, 6.0, 9.0, 8.0], [1.0, 2.0, 3.0, 3.0, 4.0])
    assert (faster.median, faster.error, faster.least) == (2.0, 0.0, 2.0)
    wide = revisions.Faster.of([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    assert wide.median == 2.5
    assert wide.error == pytest.approx(1.253 * 1.5 / 1.349 / 2)
    # Processes that differ more than their own rounds tell say how far off they are.
    found = [revisions.Faster(median, 0.001, 2 * median) for median in (1.0, 3.0, 2.0, 4.0)]
    assert revisions.Faster.of_processes(found) == (2.5, pytest.approx(1.253 * (5 / 3) ** 0.5 / 2), 5.0)
    assert revisions.pooled(found) == "2.500 ± 0.809, least 5.000"
    assert revisions.pooled(["0.5 to 0.4", "0.5 to 0.4", "0.6 to 0.4"]) == "0.5 to 0.4 or 0.6 to 0.4"
    assert revisions.pooled([1e-7, 3e-6, 2e-7]) == "3e-06"


def test_launches_and_memory_are_counted() -> None:
    with launches.Count({(8, 4)}) as counter:
        x = torch.empty(3, 8, 4, device="meta")
        y = x.add(1)  # one launch, reads and writes a matrix of weights
        del x
        torch.baddbmm(y, torch.empty(3, 8, 2, device="meta"), torch.empty(3, 2, 4, device="meta"))  # copies y first
    assert counter.launches == 3
    matrix = 3 * 8 * 4 * 4
    assert counter.state_bytes == 2 * matrix + 4 * matrix
    assert counter.bytes == counter.state_bytes + 3 * (8 * 2 + 2 * 4) * 4
    assert counter.peak_bytes == 2 * matrix + 3 * (8 * 2 + 2 * 4) * 4


@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
def test_launches_of_kernels_are_counted(layer_type: str) -> None:
    """Heads and rows multiply bytes and leave launches and sizes of state as they are."""
    pytest.importorskip("triton")
    quick_interpreter.install()
    from launches_triton import count_triton

    one = Shape("one", layer_type, 32, 2, 4, tokens=8)  # type: ignore[arg-type]
    found, more = (count_triton(dataclasses.replace(one, batch=batch)) for batch in (1, 3))
    for name, each in found.items():
        assert more[name] == each._replace(bytes=3 * each.bytes)
    if layer_type == "mlp":
        assert 1.5 < found["forward"].launches < 3  # three steps for two mini-batches, and what the host prepares
        assert 2 <= found["forward"].states < 2.5
        assert found["backward"].launches > 3


def test_the_kept_table_of_launches_is_of_what_there_is() -> None:
    kept = json.loads(launches.RESULTS.read_text(encoding="utf-8"))
    table = launches.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    assert {row["by"] for row in kept} == {"fused", "triton"}
    assert {row["shape"] for row in kept} == {shape.name for shape in (*launches.SHAPES, launches.LINEAR)}
    for row in kept:
        assert str(launches.Row(**{**row, "counted": launches.Pass(**row["counted"])})) in table
    shape = launches.LINEAR  # the smallest
    for name, counted in launches.count(fused, shape).items():
        (row,) = (each for each in kept if (each["shape"], each["by"], each["name"]) == (shape.name, "fused", name))
        assert row["counted"] == counted._asdict()


# --- all of them ---


@pytest.mark.parametrize("file", sorted((RESULTS.parent).glob("*.py")), ids=lambda file: file.name)
def test_what_a_benchmark_imports_of_the_house_is_there(file: Path) -> None:
    """Nobody runs the long ones in a test, so a name that moved would be found on the machine that was rented."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("ttt", "ttt_moshi", "ttt_cli"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(name) is not None, name
