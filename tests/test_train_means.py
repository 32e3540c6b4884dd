"""A step's loss, metrics and gradient are those of one pass over all its rows, in however many passes and processes."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from saboteurs import CountsSomeTokens
from simulated_world import in_processes, sum_gradients
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ToyBackbone

from ttt.check import load_config
from ttt.config import RunConfig, TrainConfig
from ttt.laws import CHECKS, Bench
from ttt.parallel.world import World
from ttt.plugins import Backbone, get_backbone
from ttt.plugins.rows import rows_of_step
from ttt.seeds import seed_pass
from ttt.train.divergence import StepNotFiniteError
from ttt.train.evaluation import Evaluation, evaluate
from ttt.train.loop import training_loader
from ttt.train.means import shares
from ttt.train.parts import Parts, build_parts
from ttt.train.passes import drawing_for, load_batch, training_rows
from ttt.train.progress import Progress
from ttt.train.rescue import Rescue
from ttt.train.rundir import RunDir
from ttt.train.setup import with_backbone_options
from ttt.train.step import Stepper

TOY = """
backbone: {name: toy, num_layers: 2, dim: 16, num_heads: 2}
ttt: {mini_batch_size: 4, initial_gating_alpha: 0.3}
data: {window: 12, shuffle: true}
train: {max_steps: 9, lr: 3.0e-3, device: cpu, trainable: all}
"""
MOSHI = """
backbone: {name: moshi, preset: demo, dim: 32, num_heads: 2, num_layers: 1, text_padding_weight: 0.3}
ttt: {layers: all, mini_batch_size: 4, initial_gating_alpha: 0.3}
data: {duration_sec: 3}
train: {max_steps: 9, lr: 3.0e-3, device: cpu, param_dtype: float32}
"""
VIDEO = """
backbone: {name: videodit, preset: demo, dim: 16, num_heads: 1, num_layers: 1, text_dropout: 0.5}
ttt: {mini_batch_size: 32, initial_gating_alpha: 0.3}
train: {max_steps: 9, lr: 3.0e-3, device: cpu, param_dtype: float32}
"""
TEXT = """
backbone:
  name: transformers
  config: {model_type: llama, hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1, intermediate_size: 64}
ttt: {layers: all, mini_batch_size: 4, initial_gating_alpha: 0.3}
data: {train_data: TEXTS, window_tokens: 16}
train: {max_steps: 9, lr: 3.0e-3, device: cpu, param_dtype: float32}
"""


def texts(folder: Path) -> Path:
    """Documents of other lengths, so that windows have other numbers of tokens."""
    file = folder / "texts.jsonl"
    lengths = [40, 3, 20, 9, 33, 2, 17, 26]
    file.write_text("".join(json.dumps({"text": "the quick brown fox jumps over it all"[:n]}) + "\n" for n in lengths))
    return file


@dataclass
class Seen:
    """What steps were."""

    lines: list[dict[str, Any]]
    tokens: int
    gradients: dict[str, torch.Tensor]
    """Of the first step, over all processes and clipped. (AdamW makes a step of what is rounding alone.)"""
    evaluation: Evaluation


class Noise:
    """Latents of random videos, each with a spread; nothing need be decoded for them."""

    notice = None
    files = (range(5), range(5, 8))

    def __init__(self, backbone: Backbone) -> None:
        options = backbone.options(name="videodit", dim=16, num_heads=1, num_layers=1)
        self._model = backbone.build(options, device="cpu", dtype=torch.float32)
        self._backbone = backbone

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self._backbone.example_batch(self._model, batch_size=1, tokens=1, seed=index)
        return {name: value[0] for name, value in {**batch, "std": batch["mean"].abs() / 2}.items()}

    def collate(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def describe(self, index: int) -> str:
        return f"noise {index}"


class Case:
    """A backbone with its data, which are read once for all runs."""

    def __init__(self, text: str, backbone: Backbone, data: Any = None) -> None:
        self._text = text
        self.backbone = backbone
        self._data: dict[str, Any] = {} if data is None else {"train": data, "eval": data}
        self._building = threading.Lock()  # which draws from generators that all threads share
        read = backbone.dataset

        def kept(config: RunConfig, *, split: str, device: Any) -> Any:
            if split not in self._data:
                self._data[split] = read(config, split=split, device=device)
            return self._data[split]

        backbone.dataset = kept  # type: ignore[method-assign]

    def parts(self, folder: Path, world: World, *settings: str, dtype: torch.dtype) -> Parts:
        loaded = load_config("test.yaml", text=self._text, backbone=self.backbone, overrides=settings)
        config = with_backbone_options(loaded.config, self.backbone)
        console = Console(file=io.StringIO())
        device = torch.device("cpu")
        with self._building:
            parts = build_parts(config, self.backbone, device, RunDir(folder / "run"), console)
        parts = replace(parts, world=world)  # built as one process: a thread has no process group to join
        parts.model.to(dtype)
        sum_gradients(parts.optimizer, world)
        return parts

    def run(
        self, folder: Path, world: World, *settings: str, steps: int = 2, dtype: torch.dtype = torch.float64
    ) -> Seen:
        """Make steps, then evaluate."""
        parts, progress = self.parts(folder, world, *settings, dtype=dtype), Progress()
        world.any(False)  # all are built
        stepper, lines = Stepper(parts, progress, training_loader(parts)), []
        update, gradients = parts.optimizer.step, dict[str, torch.Tensor]()

        def watched(step: int) -> dict[str, float]:
            if step == 0:
                gradients.update((name, each.clone()) for name, each in parts.optimizer.gradients() if each is not None)
            return update(step)

        parts.optimizer.step = watched  # type: ignore[method-assign]
        for _ in range(steps):
            stepper.advance()
            lines.append(progress.line)
        evaluation = evaluate(
            parts.model,
            parts.injection,
            self.backbone,
            parts.config,
            parts.eval_dataset,
            split=parts.eval_split,
            device=parts.device,
            world=world,
        )
        assert evaluation is not None
        return Seen(lines, progress.tokens, gradients, evaluation)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder = tmp_path_factory.mktemp("data")
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            make = {
                "toy": lambda: Case(TOY, ToyBackbone()),
                "two means": lambda: Case(TOY, CountsSomeTokens()),
                "moshi": lambda: Case(MOSHI, type(get_backbone("moshi"))()),
                "videodit": lambda: Case(VIDEO, video := type(get_backbone("videodit"))(), Noise(video)),
                "transformers": lambda: Case(
                    TEXT.replace("TEXTS", str(texts(folder))), type(get_backbone("transformers"))()
                ),
            }
            made[name] = make[name]()
        return made[name]

    return case


LOOSE = {"tokens_per_second", "peak_memory_bytes"}


def flat(line: dict[str, Any], name: str = "") -> dict[str, float]:
    found = {}
    for key, value in line.items():
        if key not in LOOSE:
            found |= flat(value, f"{name}{key}.") if isinstance(value, dict) else {name + key: value}
    return found


def require_same(one: Seen, other: Seen, tolerance: float, *, evidence: bool, masked: bool = False) -> None:
    """Losses, metrics, gradients and evaluations; evidence is of a step's first pass. With a mask, what is measured of
    inner losses is a mean over mini-batches of means over tokens, and that is not quite the same in parts.
    """
    assert one.tokens == other.tokens
    for mine, others in zip(one.lines, other.lines, strict=True):
        assert mine.keys() == others.keys()
        for name, value in flat(mine).items():
            if evidence or not name.startswith("layers."):
                of_windows = tolerance if not masked or "inner_loss" not in name else 1e-3
                assert value == pytest.approx(flat(others)[name], rel=of_windows, abs=of_windows), name
    assert one.gradients
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], rtol=tolerance, atol=tolerance)
    for mine, others in zip(vars(one.evaluation).values(), vars(other.evaluation).values(), strict=True):
        if isinstance(mine, float):
            assert mine == pytest.approx(others, rel=tolerance, abs=tolerance)
    assert one.evaluation.windows == other.evaluation.windows


CUTS = {"2 x 2": (2, 2), "1 x 4": (1, 4)}
BACKBONES = ["toy", "two means", "moshi", "videodit", "transformers"]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_step_is_one_mean_over_all_its_rows(tmp_path: Path, cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    dtype, tolerance = (torch.float32, 1e-6) if name == "toy" else (torch.float64, 1e-12)  # the toy's loss is float32
    few = "eval.max_batches=2"  # of 4 windows
    whole = case.run(tmp_path, World(), "train.batch_size=4", few, dtype=dtype)
    assert len({line["loss"] for line in whole.lines}) == 2
    in_passes = [
        case.run(
            tmp_path,
            World(),
            f"train.batch_size={rows}",
            f"train.num_microbatches={passes}",
            f"eval.max_batches={8 // rows}",
            dtype=dtype,
        )
        for rows, passes in CUTS.values()
    ]
    for cut in in_passes:
        require_same(whole, cut, tolerance, evidence=False)
    for shared in in_processes(2, lambda world: case.run(tmp_path, world, "train.batch_size=4", few, dtype=dtype)):
        require_same(whole, shared, tolerance, evidence=True, masked=name == "transformers")


@pytest.mark.parametrize("name", ["two means", "moshi", "transformers"])
def test_windows_that_count_less_are_not_weighed_alike(
    tmp_path: Path, cases: Callable[[str], Case], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saboteur: a mean of means is another number, so the test above can fail."""
    case = cases(name)
    whole = case.run(tmp_path, World(), "train.batch_size=4", "eval.max_batches=1", steps=1)
    weights = case.backbone.loss_weights
    monkeypatch.setattr(type(case.backbone), "loss_weights", lambda *given: torch.ones_like(weights(*given[1:])))
    cut = case.run(tmp_path, World(), "train.batch_size=1", "train.num_microbatches=4", "eval.max_batches=4", steps=1)
    assert abs(whole.lines[0]["loss"] - cut.lines[0]["loss"]) > 1e-4
    assert abs(whole.lines[0]["grad_norm"] / cut.lines[0]["grad_norm"] - 1) > 1e-4
    assert abs(whole.evaluation.loss - cut.evaluation.loss) > 1e-4


def test_two_means_over_different_tokens_pass_the_check_of_losses() -> None:
    """What its saboteurs break (`saboteurs.WeighsRows`) is right in itself."""
    CHECKS["loss"](Bench(CountsSomeTokens(), tokens=9, batch_size=2))


def test_a_mean_in_which_nothing_counts_is_nothing(cases: Callable[[str], Case]) -> None:
    """A pass without a single token that counts has the loss 0 and weighs nothing; a mean over nothing at all is 0."""
    backbone = cases("transformers").backbone
    model = backbone.build(backbone.tiny(), device="cpu", dtype=torch.float32)
    batch = backbone.example_batch(model, batch_size=2, tokens=5, seed=0)
    empty = {**batch, "shift_labels": torch.full_like(batch["shift_labels"], -100)}
    config: Any = None
    outputs = [backbone.loss(model, each, config) for each in (batch, empty)]
    parts = shares(backbone, config, [batch, empty], World(), torch.device("cpu"))
    added = [part.of_loss(output, backbone).item() for part, output in zip(parts, outputs, strict=True)]
    assert added == [outputs[0].loss.item(), 0.0]
    for part in shares(backbone, config, [empty, empty], World(), torch.device("cpu")):
        assert part.of_loss(outputs[1], backbone).item() == 0.0


def test_one_pass_in_one_process_is_the_loss_itself(tmp_path: Path, cases: Callable[[str], Case]) -> None:
    """Bit for bit."""
    parts = cases("two means").parts(tmp_path, World(), "train.batch_size=4", dtype=torch.float32)
    batch = load_batch(parts.dataset, parts.order.at(0).windows, parts.device)
    with torch.no_grad():
        loss = parts.backbone.loss(parts.model, batch, parts.config).loss
    progress = Progress()
    Stepper(parts, progress, training_loader(parts)).advance()
    assert progress.line["loss"] == loss.item()
    assert progress.line["tokens_per_second"] * progress.seconds == pytest.approx(progress.tokens)


# --- what is drawn for a row ---


def test_a_row_draws_the_same_in_whichever_pass_and_process_it_is_read() -> None:
    def drawn(step: int, rows: int, passes: int, slices: Sequence[slice | None]) -> torch.Tensor:
        config = TrainConfig(batch_size=rows, num_microbatches=passes, seed=7)
        found = []
        for number in range(step * passes, (step + 1) * passes):
            for own in slices:
                with drawing_for(training_rows(config, number, own)):
                    draws = rows_of_step(len(range(rows)[own or slice(None)])).draws()
                found.append(torch.cat((draws.normal((20,)), draws.uniform((3,)), draws.normal(())[:, None]), 1))
        return torch.cat(found)

    whole = drawn(5, 4, 1, [None])
    assert len(whole.unique(dim=0)) == 4
    assert torch.equal(whole, drawn(5, 2, 2, [None]))
    assert torch.equal(whole, drawn(5, 1, 4, [None]))
    assert torch.equal(whole, drawn(5, 4, 1, [slice(0, 2), slice(2, 4)]))
    assert torch.equal(whole, drawn(5, 2, 2, [slice(0, 1), slice(1, 2)]))
    assert not torch.equal(whole, drawn(6, 4, 1, [None]))
    # with one row in a pass, what torch's global generator would draw, as it did before rows had seeds
    one = drawn(5, 1, 4, [None])[2]
    seed_pass(7, "train", 5 * 4 + 2)
    assert torch.equal(one, torch.cat((torch.randn(1, 20)[0], torch.rand(1, 3)[0], torch.randn(1))))


def test_processes_with_other_rows_draw_other_numbers_from_the_global_generators() -> None:
    config = TrainConfig(batch_size=4)
    found = set()
    for own in (slice(0, 2), slice(2, 4)):
        with drawing_for(training_rows(config, 0, own)):
            found.add(torch.rand(()).item())
    assert len(found) == 2


# --- fast weights that are carried, and windows that are spread over processes ---


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_carries_the_fast_weights_of_its_rows(
    tmp_path: Path, cases: Callable[[str], Case], processes: int
) -> None:
    """Files of 5, 2, 1 and 4 windows: rows start files at other times, and leave an evaluation one by one."""
    case = cases("two means")
    settings = ("train.batch_size=4", "ttt.persistent_states=true", "data.shuffle=false")
    whole = case.run(tmp_path, World(), *settings, steps=6, dtype=torch.float32)
    fresh = case.run(tmp_path, World(), *settings[:1], "data.shuffle=false", steps=1, dtype=torch.float32)
    assert abs(whole.evaluation.loss - fresh.evaluation.loss) > 1e-4
    found = in_processes(processes, lambda world: case.run(tmp_path, world, *settings, steps=6, dtype=torch.float32))
    for shared in found:
        require_same(whole, shared, 2e-6, evidence=True)
    assert len({str(shared.lines[-1]["loss"]) for shared in found}) == 1


def test_windows_of_an_evaluation_that_cannot_be_divided_are_read_once_each(
    tmp_path: Path, cases: Callable[[str], Case]
) -> None:
    """12 windows in batches of 8: the last batch has no row for the second process, which reads one in vain."""
    case = cases("two means")
    one, other = ({"train.batch_size": 8}, {"train.batch_size": 3})
    alone = [
        case.run(tmp_path, World(), *(f"{key}={value}" for key, value in each.items()), steps=0, dtype=torch.float32)
        for each in (one, other)
    ]
    for seen in (
        *alone,
        *in_processes(2, lambda world: case.run(tmp_path, world, "train.batch_size=8", steps=0, dtype=torch.float32)),
    ):
        assert seen.evaluation.windows == 12
        assert seen.evaluation.loss == pytest.approx(alone[0].evaluation.loss, rel=1e-6)
        assert seen.evaluation.loss_gates_closed == pytest.approx(alone[0].evaluation.loss_gates_closed, rel=1e-6)


# --- what is not finite ---


def failed(case: Case, folder: Path, world: World, *settings: str, steps: int) -> tuple[str, str, bool]:
    """The message of a step that is not finite, the cause, and whether the weights are those before it."""
    parts, progress = case.parts(folder, world, *settings, dtype=torch.float32), Progress()
    world.any(False)
    stepper = Stepper(parts, progress, training_loader(parts))
    for _ in range(steps):
        stepper.advance()
    before = {name: each.detach().clone() for name, each in parts.model.named_parameters()}
    with pytest.raises(StepNotFiniteError) as caught:
        stepper.advance()
    same = all(torch.equal(each, before[name]) for name, each in parts.model.named_parameters())
    saver: Any = None
    diagnosis = Rescue(parts, progress, saver)._diagnose(caught.value)
    return str(caught.value), diagnosis.cause, same and not stepper.updating


@pytest.mark.parametrize("carries", [False, True])
def test_every_process_stops_and_names_the_window_of_one(
    tmp_path: Path, cases: Callable[[str], Case], carries: bool
) -> None:
    """Before the update, with the same cause, which all look for in the rows of the one."""
    case = Case(TOY, ToyBackbone())
    carried = ("ttt.persistent_states=true",) if carries else ()
    settings = (
        *carried,
        "data.shuffle=false",
        "train.batch_size=4",
        "data.poisoned=[1]",
        "data.windows_of_files=[2,2,2,2]",
    )
    row = "stream 0, tokens 12-24"
    steps = 1 if carries else 0
    (alone,) = [failed(case, tmp_path, World(), *settings, steps=steps)]
    assert alone[0].startswith(f"step {steps + 1}: the loss is nan on ")
    assert row in alone[0]
    assert alone[0].endswith("; stopped before the optimiser step, weights unchanged")
    found = in_processes(2, lambda world: failed(case, tmp_path, world, *settings, steps=steps))
    assert found[0] == found[1]
    message, cause, unchanged = found[0]
    assert unchanged
    assert row in message
    assert message.count("stream") == 2, "of the process that read it, and not of the other"
    assert cause == alone[1]


def test_an_evaluation_that_is_not_finite_names_the_same_windows_in_every_process(
    tmp_path: Path, cases: Callable[[str], Case]
) -> None:
    case = Case(TOY, ToyBackbone())
    settings = ("train.batch_size=4", "data.poisoned=[7]")

    def seen(world: World) -> Evaluation:
        return case.run(tmp_path, world, *settings, steps=0, dtype=torch.float32).evaluation

    alone = seen(World())
    assert not alone.is_finite
    assert alone.first_not_finite == (4, 5, 6, 7)
    for evaluation in in_processes(2, seen):
        assert not evaluation.is_finite
        assert evaluation.first_not_finite == (6, 7)
        assert evaluation.not_finite_pass is not None
        assert evaluation.not_finite_pass.slice == slice(6, 8)


# --- what the host reads ---


class Reads(TorchDispatchMode, contextlib.AbstractContextManager[Any]):
    """Counts reads of tensors by the host: each would wait for a device."""

    OPERATIONS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select")
    METHODS = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._methods = _Methods(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in self.OPERATIONS
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)


class _Methods(TorchFunctionMode):
    """Those methods that go by no operation on a CPU."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._reads.count += getattr(func, "__name__", "") in Reads.METHODS
        return func(*args, **(kwargs or {}))


def reads_of_a_step(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, *, in_model: bool = True) -> int:
    """How often the host reads a tensor from the first forward pass of a step to its update."""
    parts = case.parts(folder, World(), "train.batch_size=2", "train.num_microbatches=2", dtype=torch.float32)
    progress, reads = Progress(), Reads()
    Stepper(parts, progress, training_loader(parts)).advance()  # the first step looks whether TTT acts
    batches = [load_batch(parts.dataset, parts.order.at(number).windows, parts.device) for number in (2, 3)]
    loader = training_loader(parts)
    stepper = Stepper(parts, progress, loader)
    monkeypatch.setattr(loader, "read", lambda _: batches.pop(0))  # reading files is another matter
    if not in_model:
        parts.model.register_forward_pre_hook(lambda *_: reads.__exit__(None, None, None))
        parts.model.register_forward_hook(lambda *_: reads.__enter__() and None)
    update = parts.optimizer.step

    def ended(step: int) -> dict[str, float]:
        reads.__exit__(None, None, None)
        return update(step)

    parts.optimizer.step = ended  # type: ignore[method-assign]
    reads.__enter__()
    stepper.advance()
    return reads.count


@pytest.mark.parametrize("name", BACKBONES)
def test_the_host_reads_once_a_step(
    tmp_path: Path, cases: Callable[[str], Case], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models of `transformers` ask a mask whether it leaves out anything: that is theirs, and not counted."""
    assert reads_of_a_step(cases(name), tmp_path, monkeypatch, in_model=name != "transformers") == 1


def test_a_loss_that_is_read_in_between_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saboteurs: a backbone that logs its loss, and a step that looks whether each is finite."""

    class Logs(ToyBackbone):
        def loss(self, model: Any, batch: Any, config: Any) -> Any:
            output = super().loss(model, batch, config)
            float(output.loss.detach())
            return output

    assert reads_of_a_step(Case(TOY, Logs()), tmp_path, monkeypatch) == 3
    monkeypatch.undo()
    monkeypatch.setattr("ttt.train.step.require_gradient", lambda output, _: output.loss.isfinite().item())
    assert reads_of_a_step(Case(TOY, ToyBackbone()), tmp_path, monkeypatch) == 3
