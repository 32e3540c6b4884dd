"""What `ttt doctor` says of a machine: every problem is really made here, and every claim of its table is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_distributions import TOY, importable, install
from torch import Tensor

from ttt.check import doctor
from ttt.check.doctor import SUPPORT, Problem, examine, forced, support_table
from ttt.config import TTTConfig
from ttt.config.findings import Severity
from ttt.errors import ConfigError
from ttt.layer import TTTLayer
from ttt.ops import minibatch, select
from ttt.ops.triton import available
from ttt_cli.main import main

ROOT = Path(__file__).parent.parent
CONFIG = "backbone: {name: toy}\nttt: {layer_type: mlp, mini_batch_size: 4}\n"


@pytest.fixture(autouse=True)
def plugins_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder, and beside it one with an installed toy."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    install(folder, "toy", "toy_plugin", TOY)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv(select.VARIABLE, raising=False)
    with importable(folder):
        yield folder


def _config(text: str = CONFIG) -> str:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return "run.yaml"


def _problem(problems: tuple[Problem, ...], words: str) -> Problem:
    (found,) = [problem for problem in problems if words in problem.message]
    assert found.fix
    return found


# --- the report ---


def test_a_machine_that_runs_the_tests_is_healthy() -> None:
    report = examine()
    assert report.healthy, report.problems
    assert report.versions["torch"] == torch.__version__
    assert report.versions["ttt-moshi"] is not None
    assert report.versions["moshi"] is not None  # what the plugin needs
    assert report.devices[0].name == "cpu"
    assert report.devices[0].model
    assert (report.devices[0].memory_bytes or 0) > 1 << 20
    assert report.scan.implementation == "fused"
    assert not report.scan.forced
    assert {trial.implementation for trial in report.trials} == {"reference", "generic", "fused"}
    for trial in report.trials:
        assert trial.works
        assert trial.cause is None
        # Not zero: float32 was really beside float64.
        assert 0 < (trial.error or 0) < doctor._TOLERANCE


def test_graphs_that_fail_are_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_not_recorded", lambda device: "not permitted")
    told = _problem(examine().problems, "CUDA graphs")
    assert told == Problem(
        Severity.WARNING, "CUDA graphs of the scan fail on cpu: not permitted", "write train.cuda_graphs: off"
    )
    off = examine(_config(), overrides=["train.cuda_graphs=off"])
    assert not [problem for problem in off.problems if "CUDA graphs" in problem.message]


def test_a_config_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = examine(_config()).scan
    assert scan.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (scan.mini_batch_size, scan.group_size, scan.auto) == (4, 16, False)
    assert scan.mini_batches is not None
    assert scan.inner_model.startswith("mlp ")
    width, hidden, last = map(int, scan.inner_model.split()[1:])
    assert (hidden, last) == (4 * width, width)
    scan = examine("run.yaml", overrides=["ttt.scan_checkpoint_group_size=auto"]).scan
    assert scan.auto
    assert scan.group_size is not None
    assert scan.group_size < scan.mini_batches
    monkeypatch.setenv(select.VARIABLE, "generic")
    scan = examine("run.yaml", overrides=["ttt.layer_type=linear", "ttt.mini_batch_size=5"]).scan
    assert (scan.implementation, scan.forced, scan.mini_batch_size) == ("generic", True, 5)
    assert scan.inner_model == f"linear {width} {width}"


def test_an_implementation_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.VARIABLE, "fats")
    report = examine()
    assert not report.healthy
    assert report.scan.implementation is None
    assert report.trials == ()
    problem = _problem(report.problems, "TTT_OPS=fats")
    assert problem.severity is Severity.ERROR
    assert "reference, generic, fused" in problem.fix


def test_an_implementation_that_fails_or_errs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = minibatch.fused_scan

    def failing(*args: object, **keywords: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    def wrong(*args: object, **keywords: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        z, weights = right(*args, **keywords)  # type: ignore[arg-type]
        return z + 0.01 * z.cumsum(-1), weights

    for replaced, cause in (
        (failing, "RuntimeError: no kernel image is available"),
        (wrong, "away from the reference"),
    ):
        monkeypatch.setattr(minibatch, "fused_scan", replaced)
        report = examine()
        assert not report.healthy
        assert {trial.implementation for trial in report.trials if not trial.works} == {"fused"}
        assert cause in _problem(report.problems, "the implementation fused fails on cpu").message


def test_the_kernels_are_tried_where_there_is_a_gpu_and_only_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._implementations("cpu") == select.PORTABLE
    with monkeypatch.context() as patch:
        patch.setattr(available, "INSTALLED", True)
        assert doctor._implementations("cuda:0") == (*select.PORTABLE, "triton")
        patch.setattr(available, "INSTALLED", False)
        assert doctor._implementations("cuda:0") == select.PORTABLE

    def failing(*args: object, **keywords: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(doctor, "_implementations", lambda device: ("triton",))
    monkeypatch.setattr(select, "obstacle", lambda **about: None)
    monkeypatch.setattr(minibatch, "triton_scan", failing)
    report = examine()
    assert report.healthy
    problem = _problem(report.problems, "the implementation triton fails on cpu: RuntimeError: no kernel image")
    assert problem.severity is Severity.WARNING


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import ttt
from ttt.check.doctor import examine, forced
from ttt.ops.triton import forms
layer, x = ttt.TTTLayer(32, 2, ttt.TTTConfig(mini_batch_size=4)), torch.randn(1, 9, 32)
layer(x)[0].sum().backward()
assert examine().healthy
for call in (lambda: layer(x), lambda: examine().problems):
    with forced("triton"):
        try:
            print(*(each.message for each in call() if hasattr(each, "message")), sep="\\n")
        except ValueError as error:
            print(error)
"""


def test_everything_but_the_kernels_runs_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    why = "TTT_OPS=triton needs Triton, which is not installed"
    first, *problems = done.stdout.splitlines()
    assert first == f"{why}; write another implementation, or unset it"
    assert why in problems


def test_forcing_an_implementation_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with forced("generic"):
        assert select.forced_implementation() == "generic"
        with forced(None):
            assert select.forced_implementation() is None
        assert select.forced_implementation() == "generic"
    assert select.forced_implementation() is None


# --- what can be wrong ---


def test_a_broken_plugin_and_a_missing_package(plugins_folder: Path) -> None:
    install(plugins_folder, "broken", "broken_plugin", "raise ImportError('no codec here')\n")
    metadata = plugins_folder / "ttt_toy-1.2.dist-info" / "METADATA"
    metadata.write_text(
        metadata.read_text()
        + "Requires-Dist: torch>=2\nRequires-Dist: a-package-that-nobody-has (>=1)\n"
        + 'Requires-Dist: another-one ; extra == "more"\n'
    )
    with importable(plugins_folder):
        report = examine()
    assert not report.healthy
    assert "no codec here" in _problem(report.problems, "broken of ttt-broken 1.2").message
    missing = _problem(report.problems, "ttt-toy 1.2 needs")
    assert missing.message == "ttt-toy 1.2 needs a-package-that-nobody-has, not installed"
    assert missing.fix == "run `pip install a-package-that-nobody-has`"
    assert report.versions["a-package-that-nobody-has"] is None
    assert "another-one" not in report.versions


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_config_that_wants_a_gpu_where_there_is_none() -> None:
    report = examine(_config(CONFIG + "train: {device: cuda}\n"))
    assert not report.healthy
    problem = _problem(report.problems, "train.device: cuda needs a GPU")
    assert problem.severity is Severity.ERROR
    assert "train.device: auto" in problem.fix
    assert report.scan.device == "cuda"


def test_a_run_dir_that_cannot_be_made_is_the_machines_fault_and_a_wrong_key_is_not() -> None:
    Path("taken").write_text("")
    report = examine(_config(CONFIG + "run_dir: taken/run\n"))
    problem = _problem(report.problems, "TTT601")
    assert problem.severity is Severity.ERROR
    assert problem.message.startswith("run.yaml:3:")
    with pytest.raises(ConfigError, match="TTT101"):
        examine(_config(CONFIG + "trian: {}\n"))


def test_python_without_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert _problem(examine().problems, "bytecode").severity is Severity.WARNING
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert not [problem for problem in examine().problems if "bytecode" in problem.message]


def test_more_threads_than_cores() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(doctor.cores() + 1)
        problem = _problem(examine().problems, f"{doctor.cores() + 1} threads on {doctor.cores()} cores")
    finally:
        torch.set_num_threads(before)
    assert f"OMP_NUM_THREADS={doctor.cores()}" in problem.fix
    assert not [problem for problem in examine().problems if "threads" in problem.message]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LITTLE_DISK", 1 << 60)
    assert _problem(examine().problems, "are free where run folders are made").severity is Severity.WARNING


# --- the command ---


def test_the_command_in_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", _config()]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "scan: fused\n" in out
    assert re.search(r"^ *toy +ttt-toy 1\.2", out, re.MULTILINE)
    assert "tried on cpu" in out
    assert "FAILS" not in out


def test_the_command_in_json_and_its_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["healthy"] is True
    assert facts["versions"]["torch"] == torch.__version__
    assert [trial["works"] for trial in facts["trials"] if trial["device"] == "cpu"] == [True] * 3
    assert facts["scan"]["implementation"] == "fused"
    assert facts["supports"] == {claim: dict(answers) for claim, answers in SUPPORT.items()}
    monkeypatch.setenv(select.VARIABLE, "quick")
    assert main(["doctor"]) == 3
    assert "fix: write one of" in capsys.readouterr().out
    monkeypatch.delenv(select.VARIABLE)
    assert main(["doctor", "--set", "ttt.layers=all"]) == 2
    assert main(["doctor", _config("backbone: {name: toy}\nttt: {layrs: all}\n")]) == 2
    assert main(["doctor", "missing.yaml"]) == 3
    assert "Traceback" not in capsys.readouterr().err


# --- the table ---

IMPLEMENTATIONS = ("fused", "generic", "reference")


def _layer(**settings: object) -> TTTLayer:
    """A layer of float64 with weights that are not small."""
    settings = {"layer_type": "mlp", "mini_batch_size": 3, "scan_checkpoint_group_size": 0, **settings}
    layer = TTTLayer(8, 2, TTTConfig.model_validate(settings), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return layer


def _tokens(length: int = 14) -> Tensor:
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _learned(layer: TTTLayer, implementation: str) -> list[Tensor]:
    with forced(implementation):
        y, _ = layer(_tokens())
        return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]


def _agree(implementation: str, **settings: object) -> None:
    layer = _layer(**settings)
    for found, right in zip(_learned(layer, implementation), _learned(layer, "reference"), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def _does_inner_models(implementation: str) -> str:
    for settings in ({"layer_type": "linear"}, {}, {"mlp_layers": 3, "mlp_expansion_factor": 1.5}):
        _agree(implementation, **settings)
    return "yes"


def _does_both_updates(implementation: str) -> str:
    _agree(implementation, causal=True)
    _agree(implementation, preset="video", rope="none", mini_batch_size=7)
    return "yes"


def _does_open_mini_batches(implementation: str) -> str:
    layer, x, state, parts = _layer(), _tokens(), None, []
    whole = _learned(layer, "reference")[0]
    with forced(implementation):
        for piece in x.split([1, 4, 2, 7], dim=1):
            y, state = layer(piece, state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    return "yes"


def _does_masks(implementation: str) -> str:
    layer, x = _layer(), _tokens()
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]]) > 0
    with forced(implementation):
        y, _ = layer(x, mask=mask)
    for row, counted in enumerate(mask):
        with forced("reference"):
            alone, _ = layer(x[row : row + 1, counted])
        torch.testing.assert_close(y[row, counted], alone[0], rtol=1e-9, atol=1e-9)
    return "yes"


def _does_types(implementation: str) -> str:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = _layer().to(dtype)
        with forced(implementation):
            y, state = layer(_tokens().to(dtype))
        assert y.dtype == dtype
        assert state.weights[0].dtype == torch.promote_types(dtype, torch.float32)
        assert y.isfinite().all()
    return "yes"


def _recomputes(implementation: str) -> str:
    held = []
    for group_size in (0, 2):
        layer, storages = _layer(scan_checkpoint_group_size=group_size), {}

        def keep(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with forced(implementation), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y, _ = layer(_tokens(60))
        held.append(sum(storages.values()))
        del y
    assert held[1] < 1.01 * held[0]
    return "yes" if held[1] < 0.7 * held[0] else "no"


def _second_derivative(implementation: str, group_size: int) -> Tensor | None:
    layer, x = _layer(scan_checkpoint_group_size=group_size), _tokens().requires_grad_()
    with forced(implementation):
        try:
            (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
            first.square().sum().backward()
        except RuntimeError:
            return None
    return x.grad


def _has_second_derivatives(implementation: str) -> str:
    right = _second_derivative("reference", 0)
    kept, grouped = (_second_derivative(implementation, size) for size in (0, 2))
    for found in (kept, grouped):
        if found is not None:
            torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8)
    return "no" if kept is None else "group size 0" if grouped is None else "yes"


def _compiles_with(implementation: str, group_size: int) -> bool:
    torch._dynamo.reset()
    layer = _layer(layer_type="linear", scan_checkpoint_group_size=group_size)
    x = _tokens(9)
    with forced(implementation):
        try:
            y, _ = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)(x)
        except torch._dynamo.exc.Unsupported:
            return False
        torch.testing.assert_close(y, layer(x)[0], rtol=1e-9, atol=1e-9)
    return True


def _compiles(implementation: str) -> str:
    if _compiles_with(implementation, 2):
        return "yes"
    return "group size 0" if _compiles_with(implementation, 0) else "no"


def _is_chosen(implementation: str) -> str:
    float32 = (torch.float32,)
    for_scan = {select.implementation(device_type=d, dtypes=float32, mini_batches=4) for d in ("cpu", "cuda", "mps")}
    for_pieces = {select.implementation(device_type="cpu", dtypes=float32, numbers=n) for n in (1, 1 << 30)}
    if for_scan == {implementation}:
        return "yes"
    return "small pieces" if implementation in for_pieces else "no"


CLAIMS = {
    "linear inner models, MLPs of any depth": _does_inner_models,
    "causal and non-causal updates": _does_both_updates,
    "mini-batches that a piece leaves or finds open": _does_open_mini_batches,
    "tokens that a mask leaves out": _does_masks,
    "tokens in float64, float32, bfloat16, float16": _does_types,
    "groups recomputed in backward": _recomputes,
    "second derivatives": _has_second_derivatives,
    "`torch.compile(fullgraph=True)`": _compiles,
    "chosen where `TTT_OPS` is not set": _is_chosen,
}


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # dynamo's, as it gives up
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("claim", SUPPORT)
def test_every_claim_is_true(claim: str, implementation: str) -> None:
    assert CLAIMS[claim](implementation) == SUPPORT[claim][implementation]


def test_the_page_has_the_table() -> None:
    assert support_table() in (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
