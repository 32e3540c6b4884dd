"""`train.compile`: a run whose TTT layers are compiled is the run that it is without, and fails in words."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from recorded_operations import RecordedOperations
from rich.console import Console
from safetensors.torch import load_file
from small_llama import logits, opened, small_llama, some_tokens
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.exc import CppCompileError
from torch.utils.checkpoint import checkpoint
from toy import ToyBackbone, ToyData, ToyOptions

import ttt
from ttt.config import EvalConfig, RunConfig, TrainConfig, TTTConfig
from ttt.errors import EnvironmentProblem, UsageError
from ttt.layer import TTTLayer
from ttt.ops import replay
from ttt.train import compiling, pictures, train
from ttt.train.compiling import MOST_VERSIONS, CompiledRead
from ttt.train.metrics import read_metrics
from ttt.train.result import TrainResult

# PyTorch looks at gradients while it traces, and hides the warning itself where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

TIMES = {"tokens_per_second", "peak_memory_bytes"}


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and differentiated as for a compiler, and run by PyTorch's own operations, in a second."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
    yield
    torch._dynamo.reset()


def config(run_dir: Path, *, compiled: bool, **sections: dict[str, Any]) -> RunConfig:
    train_options = {"max_steps": 3, "lr": 3e-3, "device": "cpu", "compile": compiled, **sections.get("train", {})}
    return RunConfig(
        backbone=ToyOptions(num_layers=2, dim=16, num_heads=2),
        ttt=TTTConfig(**{"mini_batch_size": 4, "scan_checkpoint_group_size": 2, **sections.get("ttt", {})}),
        data=ToyData(**{"window": 8, **sections.get("data", {})}),
        train=TrainConfig(**train_options),
        eval=EvalConfig(**sections.get("evaluate", {})),
        run_dir=str(run_dir),
    )


def run(settings: RunConfig, *, resume: bool = False) -> TrainResult:
    return train(settings, ToyBackbone(), resume=resume, console=Console(file=io.StringIO(), width=80))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def tensors(result: TrainResult) -> dict[tuple[str, str], Tensor]:
    """Every tensor of a run's last checkpoint, by file and name."""
    assert result.checkpoint is not None
    files = result.checkpoint.glob("*.safetensors")
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def only_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what PyTorch decides before it differentiates: which versions there are, and which one is taken."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[CompiledRead]:
    """Every run's compiled part, in order."""
    made: list[CompiledRead] = []
    start = CompiledRead.__init__

    def remember(self: CompiledRead) -> None:
        start(self)
        made.append(self)

    monkeypatch.setattr(CompiledRead, "__init__", remember)
    return made


# --- runs ---

RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "mlp, all checkpointed, in autocast": {
        "ttt": {"layer_type": "mlp"},
        "data": {"windows_of_files": (2, 2)},
        "train": {"gradient_checkpointing": True, "autocast": "bfloat16", "trainable": "all", "batch_size": 2},
    },
    "states carried": {
        "ttt": {"persistent_states": True},
        "data": {"shuffle": False, "windows_of_files": (3, 3)},
        "train": {"batch_size": 2, "gradient_checkpointing": True},
        "evaluate": {"max_batches": 1},
    },
}


@pytest.mark.parametrize("case", RUNS)
def test_a_compiled_run_is_the_run(tmp_path: Path, case: str, readers: list[CompiledRead]) -> None:
    assert_same_run(*(run(config(tmp_path / str(flag), compiled=flag, **RUNS[case])) for flag in (False, True)))
    (read,) = readers
    assert 1 < read.versions <= MOST_VERSIONS


def test_compiled_code_is_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls the scan as one operation, whose passes are recorded as elsewhere."""
    monkeypatch.setenv("TTT_OPS", "fused")
    monkeypatch.setattr(replay, "CALLS_BEFORE", 0)
    layer = TTTLayer(8, 2, TTTConfig(mini_batch_size=4))
    layer.compiled = CompiledRead()

    def read(number: int) -> list[Tensor]:
        x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(number), requires_grad=True)
        y, state = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum() + state.weights[0].sum(), [x, layer.W1])]

    plain = [read(number) for number in range(3)]
    replays = replay.Replays(RecordedOperations(), print)
    with replay.replaying(replays):
        recorded = [read(number) for number in range(3)]
    assert (replays.recorded, replays.replayed) == (2, 4)
    assert all(
        torch.equal(a, b) for one, other in zip(plain, recorded, strict=True) for a, b in zip(one, other, strict=True)
    )


def assert_same_run(plain: TrainResult, compiled: TrainResult) -> None:
    for one, other in zip(lines(plain.run_dir), lines(compiled.run_dir), strict=True):
        assert one.keys() == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        for site, evidence in one.get("layers", {}).items():
            assert evidence == pytest.approx(other["layers"][site], rel=1e-4)
    assert lines(compiled.run_dir)[0]["layers"].keys() == {"layers.0.ttt", "layers.1.ttt"}
    assert plain.evaluation is not None
    assert compiled.evaluation is not None
    assert plain.evaluation.loss == pytest.approx(compiled.evaluation.loss, abs=1e-5)
    assert plain.evaluation.loss_gates_closed == pytest.approx(compiled.evaluation.loss_gates_closed, abs=1e-5)
    assert tensors(plain).keys() == tensors(compiled).keys()


@pytest.mark.usefixtures("only_traced")
def test_a_compiled_run_resumes_bit_for_bit(tmp_path: Path, readers: list[CompiledRead]) -> None:
    """With several passes in a step, and batches that are smaller than others."""
    options: dict[str, dict[str, Any]] = {
        "data": {"windows_of_files": (2, 3)},
        "train": {"max_steps": 4, "ckpt_freq": 2, "ckpt_keep": None, "batch_size": 3, "num_microbatches": 2},
        "evaluate": {"eval_freq": 2},
    }
    whole = run(config(tmp_path / "whole", compiled=True, **options))
    assert_same_run(run(config(tmp_path / "plain", compiled=False, **options)), whole)
    killed = tmp_path / "killed"
    shutil.copytree(whole.run_dir, killed)
    (killed / "summary.json").unlink()
    shutil.rmtree(killed / "checkpoints" / "step_000004")
    resumed = run(config(killed, compiled=True, **options), resume=True)
    assert lines(killed) == lines(whole.run_dir)
    assert resumed.evaluation == whole.evaluation
    found = tensors(resumed)
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, found[name]), name
    assert [read.versions for read in readers] == [4, 4]  # batches of 3 and of 2, with and without gradient


# --- one layer ---


def layers(count: int = 1, *, dim: int = 8) -> list[TTTLayer]:
    """Layers of one shape, with weights of their own, that run compiled."""
    settings = TTTConfig(mini_batch_size=4, scan_checkpoint_group_size=2, rope="none")
    read = CompiledRead()
    made = [TTTLayer(dim, 2, settings) for _ in range(count)]
    for seed, layer in enumerate(made):
        layer.reset_parameters(torch.Generator().manual_seed(seed))
        layer.compiled = read
    return made


def tokens(batch: int, length: int, *, dim: int = 8) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(length)).requires_grad_()


def graphs() -> int:
    """How many graphs PyTorch has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("only_traced")
def test_layers_share_what_is_compiled_and_runs_do_not() -> None:
    before = graphs()
    first, second = layers(2)
    with torch.no_grad():
        y = [layer(tokens(2, 8))[0] for layer in (first, second, first)]
        assert graphs() == before + 1
        assert torch.equal(y[0], y[2])
        assert not torch.equal(y[0], y[1])
        (other,) = layers(dim=4)
        other(tokens(2, 8, dim=4))
        assert graphs() == before + 2
    for layer in (first, other):
        assert isinstance(layer.compiled, CompiledRead)
        assert layer.compiled.versions == 1


@pytest.mark.usefixtures("only_traced")
def test_no_version_fits_two_sizes() -> None:
    """Of two that fit, a recomputation could take the other one; sizes as variables would fit the third here."""
    before = graphs()
    (layer,) = layers()
    with torch.no_grad():
        for batch, length in [(2, 8), (3, 12), (4, 16), (2, 8)]:
            layer(tokens(batch, length))
    assert graphs() == before + 3


def test_beyond_the_most_versions_a_layer_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch._dynamo.config.recompile_limit >= MOST_VERSIONS
    monkeypatch.setattr(compiling, "MOST_VERSIONS", 1)
    (layer,) = layers()
    layer(tokens(2, 8))
    before = graphs()
    for length in (5, 12, 8):
        y, state = layer(tokens(2, length))
        layer.compiled, read = None, layer.compiled
        expected, expected_state = layer(tokens(2, length))
        layer.compiled = read
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        for name, tensor in state.tensors().items():
            torch.testing.assert_close(tensor, expected_state.tensors()[name], rtol=1e-6, atol=1e-6)
    assert graphs() == before


def test_a_mini_batch_that_a_piece_finds_open_is_compiled_too() -> None:
    (layer,) = layers()
    read, layer.compiled = layer.compiled, None
    with torch.no_grad():
        _, opened = layer(tokens(2, 3))
    found = []
    for layer.compiled in (read, None):
        x = tokens(2, 7)
        y, state = layer(x, opened)
        outputs = {"y": y, **state.tensors()}
        loss = sum(
            (tensor.square().sum() for tensor in outputs.values() if tensor.is_floating_point()), torch.zeros(())
        )
        used = [p for name, p in layer.named_parameters() if name not in layer.weight_names]  # the state has its own
        found.append((outputs, torch.autograd.grad(loss, [x, *used])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_takes_what_its_first_pass_took(reentrant: bool) -> None:
    """Another size is compiled between a checkpoint's forward and its recomputation (pytorch/pytorch, issue 166926)."""
    (layer,) = layers()

    def gradients(*, checkpointed: bool) -> list[Tensor]:
        inputs = [tokens(2, 8), tokens(3, 12)]
        answers = [
            checkpoint(layer, x, use_reentrant=reentrant, preserve_rng_state=True)[0] if checkpointed else layer(x)[0]
            for x in inputs
        ]
        loss = sum((y.square().sum() for y in answers), torch.zeros(()))
        return list(torch.autograd.grad(loss, [*inputs, *layer.parameters()])) if not reentrant else _backward(loss)

    def _backward(loss: Tensor) -> list[Tensor]:
        layer.zero_grad()
        loss.backward()  # reentrant checkpoints know nothing else
        return [p.grad for p in layer.parameters() if p.grad is not None]

    found = gradients(checkpointed=True)
    layer.compiled = None
    expected = gradients(checkpointed=False)
    assert len(found) == len(expected) >= len(list(layer.parameters())) - 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_backward_stays_in_its_own_type_beside_autocast() -> None:
    """A compiled backward would round to the type that autocast had in forward (pytorch/pytorch, issue 153044)."""
    found = []
    for compiled in (True, False):
        (layer,) = layers()
        if not compiled:
            layer.compiled = None
        x = tokens(2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = layer(x)
        found.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# --- what cannot be compiled ---


def _fails(*_: Any) -> Any:
    raise RuntimeError("the compiler is out of order\nand more")


def _fails_late(*_: Any) -> Any:
    raise CppCompileError(["g++", "backward.cpp"], "the compiler is out of order")  # as inductor does


def _as_it_is(graph: torch.fx.GraphModule, _: Any) -> Any:
    return make_boxed_func(graph)


@pytest.mark.parametrize(
    ("backend", "cause"),
    [
        (_fails, "RuntimeError: the compiler is out of order"),
        (aot_autograd(fw_compiler=_fails), "RuntimeError: the compiler is out of order"),
        (aot_autograd(fw_compiler=_as_it_is, bw_compiler=_fails_late), "CppCompileError: C++ compile error"),
    ],
    ids=["before anything", "in forward", "in backward"],
)
def test_a_compilation_that_fails_is_one_sentence(
    tmp_path: Path, backend: Callable[..., Any], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", backend)
    with pytest.raises(EnvironmentProblem) as raised:
        run(config(tmp_path / "run", compiled=True, data={"window": 4}))
    assert str(raised.value) == (
        f"train.compile: true: the TTT layers cannot be compiled here ({cause}); write train.compile: false, or run "
        f"`ttt doctor`"
    )


def test_errors_of_others_are_not_the_compilers() -> None:
    with pytest.raises(ZeroDivisionError), compiling.compile_errors(True):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TTT_OPS", "generic", "TTT_OPS=generic asks for an implementation"),
        ("CXX", "a-compiler-that-nobody-has", "there is no a-compiler-that-nobody-has"),
    ],
)
def test_a_run_that_cannot_be_compiled_is_refused_before_it_writes(
    tmp_path: Path, variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(EnvironmentProblem, match=f"train.compile: true, but .*{words}"):
        run(config(tmp_path / "run", compiled=True))
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_facade_is_compiled_as_any_other_is() -> None:
    model, tokens = opened(ttt.get_ttt_model(small_llama(layers=1), ttt.TTTConfig(layers="all"))), some_tokens(2, 8)
    compiled = torch.compile(model, backend="eager")
    assert (logits(compiled, tokens) - logits(model, tokens)).abs().max() < 1e-5
    with model.disable_adapter():
        closed = logits(model, tokens)
        assert (logits(compiled, tokens) - closed).abs().max() < 1e-5
    assert (closed - logits(model, tokens)).abs().max() > 1e-3
    with pytest.raises(UsageError, match="wraps the model; put TTT into the model inside first"):
        ttt.get_ttt_model(torch.compile(small_llama(), backend="eager"))
