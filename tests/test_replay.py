"""Recorded calls give what the calls give, bit for bit, whatever lies between them: see `ttt.ops.replay`.

On the CPU the recorder is `recorded_operations`, which runs no Python at a replay and overwrites its memory, as a CUDA
graph does. The recorder of CUDA itself is tried by `benchmarks/first_gpu.sh`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_operations import RecordedOperations
from rich.console import Console
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toy import ToyBackbone, ToyData, ToyOptions

from ttt.config import RunConfig, TrainConfig, TTTConfig
from ttt.costs import recorded_bytes, scan_cost
from ttt.errors import EnvironmentProblem
from ttt.laws import LAWS, Bench
from ttt.layer import TTTLayer
from ttt.ops import replay
from ttt.ops.replay import CALLS_BEFORE, Replays, UnusableDeviceError, replayed, replaying
from ttt.state import TTTState
from ttt.train import graphs, pictures, train
from ttt.train.metrics import read_metrics

Setting = dict[str, Any]
SETTINGS: dict[str, Setting] = {
    "linear": {"layer_type": "linear", "mini_batch_size": 4},
    "mlp": {"layer_type": "mlp", "mini_batch_size": 4, "scan_checkpoint_group_size": 2},
    "not causal": {
        **{"layer_type": "mlp", "mini_batch_size": 4, "causal": False, "learnable_token_idx": False, "rope": "none"},
        "scan_checkpoint_group_size": 0,
    },
    "one token": {"layer_type": "mlp", "mini_batch_size": 1, "skip_nonfinite_tokens": True},
}


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU small pieces would run outside of the operation that is recorded; and no test waits for repetitions."""
    monkeypatch.setenv("TTT_OPS", "fused")
    monkeypatch.setattr(replay, "CALLS_BEFORE", 0)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind is recorded when it has repeated, as in a run."""
    monkeypatch.setattr(replay, "CALLS_BEFORE", CALLS_BEFORE)


def _layer(dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> TTTLayer:
    layer = TTTLayer(8, 2, TTTConfig(**settings), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def _replays(told: list[str] | None = None, **limits: int) -> Replays:
    said: list[str] = [] if told is None else told
    return Replays(RecordedOperations(), said.append, **limits)


def _tokens(number: int, length: int = 11, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(number), dtype=dtype)


def _values(state: TTTState) -> list[Tensor]:
    return [value.detach().clone() for value in state.tensors().values()]


def _training(layer: TTTLayer, numbers: Sequence[int], *, mask: Tensor | None = None, length: int = 11) -> list[Tensor]:
    """Windows read one after the other with the state carried, then one backward through all; everything it gives."""
    layer.zero_grad()
    xs = [_tokens(number, length).requires_grad_() for number in numbers]
    state, found, loss = None, [], torch.zeros((), dtype=torch.float64)
    for x in xs:
        y, state = layer(x, state, mask=mask)
        loss = loss + (y.square() * (1 + numbers[0])).sum()
        found += [y.detach(), *_values(state)]  # the very tensors: whoever writes to them later is found
    assert state is not None
    loss = loss + sum((w.square().sum() for w in state.weights), torch.zeros(()))
    loss.backward()
    gradients = [x.grad for x in (*xs, *layer.parameters())]
    return [*found, *(gradient.clone() for gradient in gradients if gradient is not None)]


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    assert len(found) == len(expected)
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True))


def _replayed_as_called(
    pieces: Callable[[int], list[Tensor]],
    replays: Replays,
    times: int = 3,
    called: Callable[[int], list[Tensor]] | None = None,
) -> bool:
    """Whether calls on ever other numbers give the same with recordings as without; `called` knows the latter."""
    for number in range(times):
        expected = (called or pieces)(number)
        with replaying(replays):
            found = pieces(number)
        if not _same(found, expected):
            return False
    assert replays.replayed > 0
    return True


# --- what is computed ---


@pytest.mark.parametrize("name", SETTINGS)
def test_windows_with_a_carried_state_and_one_backward(name: str) -> None:
    layer = _layer(**SETTINGS[name])
    later = (100, 200) if layer.config.causal else ()
    assert _replayed_as_called(lambda number: _training(layer, [number, *(number + n for n in later)]), _replays())


@pytest.mark.parametrize("name", ["linear", "mlp", "not causal"])
def test_a_mask_that_changes(name: str) -> None:
    layer = _layer(**SETTINGS[name])

    def pieces(number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number)
        return _training(layer, [number], mask=torch.rand(2, 11, generator=generator) > 0.3)

    assert _replayed_as_called(pieces, _replays())


def test_tokens_that_are_not_finite_and_constant_vectors() -> None:
    """What the numbers decide is decided again at every replay."""
    layer = _layer(**SETTINGS["one token"])

    def pieces(number: int) -> list[Tensor]:
        x = _tokens(number)
        x[0, number] = 0
        x[1, number + 1, 3] = torch.nan
        x.requires_grad_()
        y, state = layer(x)
        y.square().sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad, *_values(state)]

    assert _replayed_as_called(pieces, _replays())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_inside_backward(reentrant: bool) -> None:
    layers = [_layer(seed=seed, **SETTINGS["mlp"]) for seed in (0, 1, 2)]

    def read(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer(x)[0]
        return x

    def pieces(number: int) -> list[Tensor]:
        x = _tokens(number).requires_grad_()
        inner = functools.partial(checkpoint, read, use_reentrant=reentrant)
        y: Any = checkpoint(lambda x: inner(x) + x, x, use_reentrant=reentrant)
        parameters = [p for layer in layers for p in layer.parameters()]
        for parameter in parameters:
            parameter.grad = None
        y.square().sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad, *(p.grad.clone() for p in parameters if p.grad is not None)]

    replays = _replays()
    assert _replayed_as_called(pieces, replays)
    # Two passes, each of full mini-batches and of an open one, and a first pass that keeps nothing for backward.
    assert replays.recorded == (6 if reentrant else 4)


def test_gradients_of_several_passes_are_added() -> None:
    layer = _layer(**SETTINGS["mlp"])

    def pieces(number: int) -> list[Tensor]:
        layer.zero_grad()
        for part in range(3):
            layer(_tokens(10 * number + part))[0].square().sum().backward()
        return [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    assert _replayed_as_called(pieces, _replays())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_passes_without_a_gradient_between_those_with_one(around: Callable[[], Any]) -> None:
    layer, replays = _layer(**SETTINGS["mlp"]), _replays()

    def pieces(number: int) -> list[Tensor]:
        with around():
            y, state = layer(_tokens(50 + number))
            first = [y.clone(), *_values(state)]
        return [*(x.clone() for x in first), *_training(layer, [number])]

    assert _replayed_as_called(pieces, replays)
    with replaying(replays):  # what was recorded in inference mode is replayed outside of it, and the other way round
        with around():
            inside = layer(_tokens(0))[0].clone()
        with torch.no_grad():
            assert torch.equal(inside, layer(_tokens(0))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_that_change_between_calls(dtype: torch.dtype) -> None:
    layer, replays = _layer(dtype=torch.float32, **SETTINGS["mlp"]), _replays()

    def pieces(number: int) -> list[Tensor]:
        x = _tokens(number, dtype=dtype if number % 2 else torch.float32).requires_grad_()
        with torch.autocast("cpu", enabled=number % 3 == 0):
            y, state = layer(x)
        y.float().square().sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad, *_values(state)]

    assert _replayed_as_called(pieces, replays, times=9)


@pytest.mark.parametrize("law", [1, 2, 5])
def test_the_laws_hold(law: int) -> None:
    replays = _replays()
    with replaying(replays):
        LAWS[law](Bench(ToyBackbone(), tokens=6))
    assert replays.replayed > replays.recorded


# --- what is recorded ---


@pytest.mark.usefixtures("waiting")
def test_a_kind_is_recorded_when_it_has_repeated_and_shared_by_layers() -> None:
    replays = _replays()
    with replaying(replays), torch.no_grad():
        for call in range(CALLS_BEFORE):
            _layer(**SETTINGS["linear"])(_tokens(call, length=8))
            assert replays.recorded == 0
        for seed in range(3):
            _layer(seed=seed, **SETTINGS["linear"])(_tokens(seed, length=8))
        assert (replays.recorded, replays.replayed) == (1, 3)
        _layer(**SETTINGS["linear"])(_tokens(0, length=4))  # an odd last window
        assert (replays.recorded, replays.replayed) == (1, 3)


def test_kinds_differ_in_shapes_strides_types_settings_and_functions() -> None:
    def scaled(x: Tensor, more: Sequence[Tensor], factor: float) -> tuple[Tensor, list[Tensor]]:
        return x * factor, [y + x.sum() for y in more]

    def added(x: Tensor, more: Sequence[Tensor], factor: float) -> tuple[Tensor, list[Tensor]]:
        return x + factor, [y - x.sum() for y in more]

    def memory(number: int, *shape: int) -> Tensor:
        return torch.arange(float(number), number + math.prod(shape)).view(shape)

    kinds: list[Callable[[int], tuple[Any, ...]]] = [
        lambda n: (scaled, memory(n, 3, 4), [memory(n + 1, 3, 4)], 2.0),
        lambda n: (scaled, memory(n, 3, 4), [memory(n + 1, 3, 4)], 3.0),
        lambda n: (scaled, memory(n, 3, 4), [memory(n, 3, 4), memory(n + 1, 3, 4)], 2.0),
        lambda n: (scaled, memory(n, 3, 4), [], 2.0),
        lambda n: (scaled, memory(n, 4, 3).t(), [memory(n + 1, 3, 4)], 2.0),
        lambda n: (scaled, memory(n, 3, 8)[:, :4], [memory(n + 1, 3, 4)], 2.0),
        lambda n: (scaled, memory(n, 4).expand(3, 4), [memory(n, 3, 1).expand(3, 4)], 2.0),
        lambda n: (scaled, memory(n, 3, 4).double(), [memory(n + 1, 3, 4)], 2.0),
        lambda n: (scaled, memory(n, 2, 6), [memory(n + 1, 3, 4)], 2.0),
        lambda n: (scaled, memory(n, 9)[1:5], [memory(n + 1, 3, 4)], 2.0),
        lambda n: (scaled, memory(n, 9)[4:8], [memory(n + 1, 3, 4)], 2.0),
        lambda n: (added, memory(n, 3, 4), [memory(n + 1, 3, 4)], 2.0),
    ]
    replays = _replays()
    with replaying(replays):
        for kind in kinds:
            for number in range(CALLS_BEFORE + 2):
                function, *arguments = kind(number)
                expected = function(*arguments)
                found = replayed(function.__name__, function, *arguments)
                assert _same([found[0], *found[1]], [expected[0], *expected[1]])
    assert replays.recorded == len(kinds)
    assert replays.replayed >= 2 * len(kinds)


def test_results_that_are_arguments_or_shared_are_copied() -> None:
    def same(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, x[1:], x.expand(2, 3)

    replays = _replays()
    with replaying(replays):
        kept = [(replayed("same", same, torch.full((3,), float(n))), n) for n in range(6)]
    assert replays.replayed >= 4
    for (x, part, wide), n in kept:
        assert x.tolist() == [n] * 3
        assert part.tolist() == [n] * 2
        assert wide.tolist() == [[n] * 3] * 2
        assert wide.stride() == (0, 1)


def test_memory_and_recordings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(x: Tensor) -> tuple[Tensor]:
        return (x * 2,)

    def record(replays: Replays, *sizes: int) -> int:
        with replaying(replays):
            for size in sizes:
                for number in range(CALLS_BEFORE + 2):
                    x = torch.full((size,), float(number))
                    assert torch.equal(replayed("doubled", doubled, x)[0], x * 2)
        return replays.recorded

    assert record(_replays(most_bytes_of_one=800), 100, 101) == 1  # 4 bytes each, argument and result
    few = _replays(most_bytes=40_000)
    assert 1 < record(few, *range(1000, 1020)) < 20
    assert few.nbytes <= 40_000 + 8 * 1020
    monkeypatch.setattr(replay, "MOST_RECORDINGS", 3)
    assert record(_replays(), *range(1, 9)) == 3
    monkeypatch.setattr(replay, "MOST_KINDS", 2)
    assert record(_replays(), *range(1, 9)) == 2


def test_arguments_share_memory() -> None:
    def doubled(x: Tensor) -> tuple[Tensor]:
        return (x * 2,)

    replays = _replays()
    with replaying(replays):
        for size in (4096, 4000, 3000):
            for _ in range(CALLS_BEFORE + 1):
                replayed("doubled", doubled, torch.ones(size))
    assert replays.recorded == 3
    assert replays.nbytes < 4 * (4096 + 4096 + 4000 + 3000) + 2000


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_memory_of_a_layers_recordings_is_as_estimated(kind: str, group: int) -> None:
    config = TTTConfig.model_validate({"layer_type": kind, "mini_batch_size": 16, "scan_checkpoint_group_size": group})
    layer, replays = TTTLayer(64, 2, config), _replays()
    with replaying(replays):
        for _ in range(2):
            layer(torch.randn(2, 64, 64))[0].sum().backward()
    scan = scan_cost(config, dim=64, num_heads=2, tokens=64, batch_size=2)
    estimated = recorded_bytes(scan, 4 * 2 * 64 * 64) - scan.passing_bytes
    assert replays.recorded == 2
    assert replays.nbytes == pytest.approx(estimated, rel=0.25)


# --- where nothing is recorded ---


@pytest.mark.usefixtures("waiting")
def test_what_cannot_be_recorded_is_told_once_and_the_run_goes_on() -> None:
    told: list[str] = []
    layer = _layer(**SETTINGS["mlp"])
    replays = Replays(RecordedOperations(RuntimeError("operation not permitted\nwhen capturing")), told.append)
    for number in range(4):
        expected = _training(layer, [number])
        with replaying(replays):
            assert _same(_training(layer, [number]), expected)
    assert told == [
        "WARNING: ttt::minibatches cannot be recorded as a CUDA graph (RuntimeError: operation not permitted when "
        "capturing); the run goes on without CUDA graphs"
    ]
    assert (replays.recorded, replays.replayed, replays.nbytes) == (0, 0, 0)


def test_arguments_are_copied_in_turn() -> None:
    """What writes to memory that recordings share waits for their uses: the recording of another kind does too."""
    depth, seen = [0], []

    class Turns(RecordedOperations):
        @contextlib.contextmanager
        def in_turn(self, device: torch.device) -> Iterator[None]:
            depth[0] += 1
            yield
            depth[0] -= 1

    right = replay._Inputs.like

    def like(memory: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        seen.append(depth[0])
        return right(memory, tensors)

    layer = _layer(**SETTINGS["mlp"])
    with pytest.MonkeyPatch.context() as patch, replaying(Replays(Turns(), print)):
        patch.setattr(replay._Inputs, "like", like)
        for number in range(2):
            _training(layer, [number])
    assert len(seen) == 4  # both passes, of full mini-batches and of an open one
    assert min(seen) == 1


def test_a_device_that_a_recording_leaves_unusable_ends_the_run_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = UnusableDeviceError("a CUDA graph could not be recorded (RuntimeError: x), and the device is lost")
    with pytest.raises(EnvironmentProblem) as raised:
        _run(tmp_path / "auto", "auto", monkeypatch, RecordedOperations(lost))
    assert str(raised.value) == f"train.cuda_graphs: {lost}; write train.cuda_graphs: off"
    assert replay._active is None


@pytest.mark.usefixtures("waiting")
def test_an_error_of_the_function_itself_is_raised_as_it_is() -> None:
    def wrong(x: Tensor) -> tuple[Tensor]:
        return (x @ x,)

    told: list[str] = []
    with replaying(_replays(told)):
        for _ in range(5):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                replayed("wrong", wrong, torch.ones(2, 3))
    assert told == []


def test_other_devices_and_calls_inside_a_recording_run_as_they_are() -> None:
    def inner(x: Tensor) -> tuple[Tensor]:
        return (x + 1,)

    def outer(x: Tensor) -> tuple[Tensor]:
        return (replayed("inner", inner, x)[0] * 2,)

    replays = _replays()
    with replaying(replays):
        for _ in range(5):
            assert replayed("inner", inner, torch.ones(3, device="meta"))[0].is_meta
        assert replays.recorded == 0
        for number in range(CALLS_BEFORE + 3):
            x = torch.full((3,), float(number))
            assert torch.equal(replayed("outer", outer, x)[0], 2 * (x + 1))
    assert replays.recorded <= 2


def test_nothing_is_recorded_outside_of_the_context() -> None:
    layer, replays = _layer(**SETTINGS["mlp"]), _replays()
    with replaying(replays), replaying(None):
        for number in range(5):
            layer(_tokens(number))
    for number in range(5):
        layer(_tokens(number))
    assert replays.recorded == 0


# --- saboteurs ---


def _windows(number: int) -> list[Tensor]:
    """Three windows of a layer that has learned, so that no argument stays as it was."""
    layer = _layer(seed=number, layer_type="linear", mini_batch_size=2, scan_checkpoint_group_size=2)
    return _training(layer, [number, number + 100, number + 200], length=7)


_windows_called = functools.cache(_windows)


def _caught(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, *, of: Any = replay) -> bool:
    with monkeypatch.context() as patch:
        patch.setattr(of, name, wrong)
        return not _replayed_as_called(_windows, _replays(), called=_windows_called)


@pytest.mark.parametrize("place", range(10))
def test_an_argument_that_is_not_copied_in_is_found(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = replay._Recording.__call__

    def call(self: Any, tensors: Sequence[Tensor]) -> Any:
        return right(self, [self._inputs[at] if at == place else x for at, x in enumerate(tensors)])

    assert _caught(monkeypatch, "__call__", call, of=replay._Recording)


def test_results_that_are_handed_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = replay._Recording.__call__

    def call(self: Any, tensors: Sequence[Tensor]) -> Any:
        right(self, tensors)
        return tuple(replay._formed(self._results, self._form))

    assert _caught(monkeypatch, "__call__", call, of=replay._Recording)


def test_what_backward_reads_after_a_second_forward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept tensors, the third entry, in the memory of the recording: right if each backward follows its forward."""
    right = replay._Recording.__call__

    def call(self: Any, tensors: Sequence[Tensor]) -> Any:
        found = right(self, tensors)
        if len(found) != 3:
            return found
        return (*found[:2], replay._formed(self._results, self._form)[2])

    with monkeypatch.context() as patch:
        patch.setattr(replay._Recording, "__call__", call)
        one = _layer(**{**SETTINGS["mlp"], "mini_batch_size": 1})
        assert _replayed_as_called(lambda number: _training(one, [number]), _replays())
    assert _caught(monkeypatch, "__call__", call, of=replay._Recording)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: (x.shape, x.stride(), x.device),
        lambda x: (x.stride(), x.dtype, x.device),
        lambda x: (x.shape, x.dtype, x.device),
    ],
    ids=["types", "shapes", "strides"],
)
def test_kinds_that_leave_something_out_are_found(kind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_kind", kind)
    with pytest.raises((AssertionError, RuntimeError)):
        test_kinds_differ_in_shapes_strides_types_settings_and_functions()


def test_a_kind_without_its_settings_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = replay._flat

    def flat(values: Sequence[Any]) -> Any:
        tensors, form = right(values)
        return tensors, _Equal(form)

    class _Equal(tuple[Any, ...]):
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 0

    monkeypatch.setattr(replay, "_flat", flat)
    with pytest.raises(AssertionError):
        test_kinds_differ_in_shapes_strides_types_settings_and_functions()


# --- a run ---


def _run(
    folder: Path, cuda_graphs: str, monkeypatch: pytest.MonkeyPatch, recorder: RecordedOperations, **ttt: Any
) -> tuple[list[Setting], str]:
    """What a run writes as metrics, but for its speed, and what it prints."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", lambda: recorder)
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
    config = RunConfig(
        backbone=ToyOptions(name="toy", num_layers=2, dim=16, num_heads=2),
        ttt=TTTConfig.model_validate({"layer_type": "mlp", "mini_batch_size": 4, **ttt}),
        data=ToyData(window=11, shuffle=False),
        train=TrainConfig.model_validate(
            {
                **{"max_steps": 3, "num_microbatches": 2, "batch_size": 2, "lr": 3e-3, "trainable": "all"},
                **{"gradient_checkpointing": True, "device": "cpu", "cuda_graphs": cuda_graphs},
            }
        ),
        run_dir=str(folder),
    )
    text = io.StringIO()
    train(config, ToyBackbone(), console=Console(file=text, width=200))
    clocks = {"tokens_per_second", "peak_memory_bytes"}
    lines = [{k: v for k, v in line.items() if k not in clocks} for line in read_metrics(folder / "metrics.jsonl")]
    return lines, text.getvalue()


def test_a_run_with_recordings_is_the_run_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, unused = RecordedOperations(), RecordedOperations()
    states = {"persistent_states": True}
    with_graphs, told = _run(tmp_path / "auto", "auto", monkeypatch, recorder, **states)
    without, _ = _run(tmp_path / "off", "off", monkeypatch, unused, **states)
    assert with_graphs == without
    assert "WARNING" not in told
    assert len(recorder.operations) >= 4
    assert unused.operations == []
    assert replay._active is None


def test_a_run_that_cannot_be_recorded_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = RecordedOperations(RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    lines, told = _run(tmp_path / "auto", "auto", monkeypatch, failing)
    assert len(lines) == 3
    assert told.count("cannot be recorded as a CUDA graph (RuntimeError: CUDA error: operation not permitted") == 1


def test_on_a_cpu_nothing_is_recorded() -> None:
    with graphs.cuda_graphs(TrainConfig(), torch.device("cpu"), print) as found:
        assert found is None
        assert replay._active is None


def test_a_device_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert graphs.why_not_recorded(cpu) is None  # nothing is recorded there
    recorder = RecordedOperations()
    monkeypatch.setitem(graphs.RECORDERS, "cpu", lambda: recorder)
    assert graphs.why_not_recorded(cpu) is None
    assert len(recorder.operations) == 4
    monkeypatch.setitem(graphs.RECORDERS, "cpu", lambda: RecordedOperations(RuntimeError("not permitted")))
    assert "cannot be recorded as a CUDA graph (RuntimeError: not permitted)" in str(graphs.why_not_recorded(cpu))
    right = replay._Recording.__call__

    def stale(self: Any, tensors: Sequence[Tensor]) -> Any:
        return right(self, [*self._inputs[:1], *tensors[1:]])

    monkeypatch.setattr(replay._Recording, "__call__", stale)
    monkeypatch.setitem(graphs.RECORDERS, "cpu", RecordedOperations)
    assert str(graphs.why_not_recorded(cpu)).startswith("what is replayed is ")
