"""Whole evaluations of planted scores: what a folder keeps, refuses, forgets and goes on with."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import PlantedBackbone, PlantedReader, planted
from rich.console import Console
from torch import Tensor, nn

from ttt.adapter import Gate
from ttt.adapter_file import backbone_identity, save_adapter
from ttt.drawing import new_figure
from ttt.errors import AdapterMismatchError, EnvironmentProblem, TTTError, UsageError
from ttt.eval.bench import Bench
from ttt.eval.comparing import comparison
from ttt.eval.folder import EvalFolder
from ttt.eval.items import Item, Measured
from ttt.eval.speech.librilight import LibriLight
from ttt.eval.speech.pairs import SStory, TStory
from ttt.eval.tasks import ItemTask
from ttt.evaluate import EvalOutcome, evaluate
from ttt.files import lock
from ttt.plugins.installed_tasks import ChosenTask
from ttt.train.setup import build

PAIRS = 5


class World:
    """A folder with stories, a backbone with planted losses, and a place for results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.said = io.StringIO()
        self.measured: list[str] = []
        for number in range(PAIRS):
            self.story(number)

    def story(self, number: int, text: str = "once") -> None:
        (self.folder / "stories").mkdir(exist_ok=True)
        for letter, member in (("w", "correct"), ("n", "incorrect")):
            (self.folder / "stories" / f"{number}_s{number}_{member}.wav").write_text(f"{letter}{text}{number}")

    def breaks(self, *numbers: int) -> None:
        for number in numbers:
            (self.folder / "stories" / f"{number}_s{number}_correct.wav").write_text("broken")

    def evaluate(
        self,
        *tasks: ItemTask,
        loss: Callable[[Tensor], Tensor] | None = None,
        backbone: PlantedBackbone | None = None,
        options: Mapping[str, Any] | None = None,
        arms: Sequence[str] | None = ("ttt",),
        out: Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        **evaluation: Any,
    ) -> EvalOutcome:
        context = planted(**evaluation)
        backbone = backbone or PlantedBackbone()
        if loss is not None:
            backbone.loss_of = loss  # type: ignore[method-assign]
        given = {"data": str(self.folder / "stories"), **(options or {})}
        chosen = [ChosenTask(task, None, task.options(name=task.name, **given)) for task in tasks or (TStory(),)]
        console = Console(file=self.said, width=500)
        return evaluate(
            context.config,
            backbone,
            chosen,
            out=out or self.out,
            arms=arms,
            resume=resume,
            overwrite=overwrite,
            console=console,
        )

    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "results.json").read_text())
        return found

    def rows(self, task: str = "tstory") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "samples" / f"{task}.jsonl").read_text().splitlines()]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    # drawing takes longer than all the rest, and `test_cli_eval.py` has it drawn
    monkeypatch.setattr("ttt.eval.writing.outcome_figure", lambda *_: None)
    add = EvalFolder.add

    def noting(self: EvalFolder, task: str, rows: Any, arrays: Any) -> None:
        made.measured.extend(row.item.id for row in rows)
        add(self, task, rows, arrays)

    monkeypatch.setattr(EvalFolder, "add", noting)
    return made


def likely(letter: str) -> Callable[[Tensor], Tensor]:
    return lambda clip: torch.full((len(clip),), 1.0 if clip[0] == ord(letter) else 2.0)


def stops_at(text: str) -> Callable[[Tensor], Tensor]:
    """Losses of a model whose process is stopped when it hears something."""

    def losses(clip: Tensor) -> Tensor:
        if bytes(clip.tolist()).decode().endswith(text):
            raise KeyboardInterrupt
        return torch.ones(len(clip))

    return losses


# --- items that fail ---


@pytest.mark.parametrize("size", [1, 2])
def test_items_that_fail_first_are_counted_as_any_others(world: World, size: int) -> None:
    world.breaks(0, 1)
    outcome = world.evaluate(loss=likely("w"), eval_batch_size=size)
    assert world.results()["results"]["tstory"]["acc,none"] == 1.0
    assert world.results()["n-samples"]["tstory"] == {
        **{"original": PAIRS, "effective": 3, "failed": 2},
        **{"units": 3, "clusters": 3},
    }
    (told,) = outcome.failed
    assert told.startswith(
        "tstory: 2 of 5 items failed, more than 1%: its numbers are not those of the task. The first"
    )
    assert "0_s0: " in told
    assert "0_s0_correct.wav: cannot be decoded; mend it, and --resume tries again what failed" in told


def test_a_task_of_failures_alone_is_null_and_then_there_is_no_average(world: World) -> None:
    world.breaks(*range(PAIRS))
    other = World(world.folder / "other_world") if (world.folder / "other_world").mkdir() is None else world
    options = {"data": str(other.folder / "stories")}
    chosen = [
        ChosenTask(TStory(), None, TStory.options(name="tstory", data=str(world.folder / "stories"))),
        ChosenTask(SStory(), None, SStory.options(name="sstory", **options)),
        ChosenTask(_Third(), None, _Third.options(name="third", **options)),
    ]
    outcome = evaluate(planted().config, PlantedBackbone(), chosen, out=world.out, console=Console(file=world.said))
    found = world.results()
    assert found["results"]["tstory"] is None
    assert found["results"]["sstory"]["acc,none"] == 0.5
    assert found["groups"] == {"average": None}
    assert "average" not in (world.out / "summary.md").read_text()
    assert len(outcome.failed) == 1


class _Third(SStory):
    """The same under another name."""

    name = "third"


def test_if_nothing_can_be_measured_the_rest_is_not_tried(world: World) -> None:
    for number in range(30):
        world.story(number)
    world.breaks(*range(30))
    with pytest.raises(EnvironmentProblem, match=r"tstory: none of the first 20 items could be measured; 0_s0: .*wav"):
        world.evaluate(eval_batch_size=4)
    assert len(world.measured) == 20
    assert not (world.out / "results.json").exists()


@pytest.mark.parametrize(("failing", "complaints"), [(1, 0), (2, 1)])
def test_one_in_a_hundred_may_fail(world: World, failing: int, complaints: int) -> None:
    for number in range(100):
        world.story(number)
    world.breaks(*range(failing))
    assert len(world.evaluate(eval_batch_size=50).failed) == complaints


# --- what is there already ---


def test_what_failed_and_what_changed_is_measured_anew(world: World) -> None:
    world.breaks(1)
    world.evaluate(eval_batch_size=1)
    world.measured.clear()
    world.story(1)
    world.story(3, "twice")
    world.evaluate(eval_batch_size=1, resume=True)
    assert world.measured == ["1_s1", "3_s3"]
    assert len({row["item"] for row in world.rows()}) == len(world.rows()) == PAIRS


def test_what_failed_for_another_reason_than_its_files_is_tried_again(world: World) -> None:
    def losses(clip: Tensor) -> Tensor:
        if bytes(clip.tolist()).endswith(b"e1"):
            raise RuntimeError("a kernel failed")
        return torch.ones(len(clip))

    (told,) = world.evaluate(loss=losses, eval_batch_size=1).failed
    assert "The first, 1_s1: " in told
    assert "a kernel failed" in told
    world.measured.clear()
    assert world.evaluate(eval_batch_size=1, resume=True).failed == ()
    assert world.measured == ["1_s1"]


def test_a_stopped_evaluation_goes_on_only_if_told_to(world: World) -> None:
    with pytest.raises(KeyboardInterrupt):
        world.evaluate(loss=stops_at("e2"), eval_batch_size=2)
    with pytest.raises(UsageError, match="has 2 of 5 items of tstory; go on with --resume, or start anew"):
        world.evaluate(eval_batch_size=2)
    world.measured.clear()
    world.evaluate(eval_batch_size=2, resume=True)
    assert world.measured == ["2_s2", "3_s3", "4_s4"]
    assert [row["item"] for row in world.rows()] == [f"{n}_s{n}" for n in range(PAIRS)]


def test_a_batch_that_is_there_in_part_is_measured_whole(world: World) -> None:
    """A clip's padding is that of its batch, so a batch of other clips might round otherwise."""
    world.evaluate(eval_batch_size=2)
    file = world.out / "samples" / "tstory.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    world.measured.clear()
    world.evaluate(eval_batch_size=2, resume=True)
    assert world.measured == ["2_s2", "3_s3", "4_s4"]
    assert len(world.rows()) == PAIRS


def test_what_was_there_before_tells_nothing_about_the_time_that_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.evaluate(eval_batch_size=1)
    file = world.out / "samples" / "tstory.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    clock = itertools.count(step=10)
    monkeypatch.setattr("ttt.progress.time.monotonic", lambda: next(clock))
    world.evaluate(eval_batch_size=1, resume=True)
    *_, third, fourth, fifth = (line for line in world.said.getvalue().splitlines() if "a second" in line)
    assert third == "tstory: item 3/5, 0.1 items a second, 20 s left"
    assert fourth.startswith("tstory: item 4/5")
    assert fifth.startswith("tstory: item 5/5")


def test_a_torn_last_line_is_measured_again_and_leaves_nothing(world: World) -> None:
    world.evaluate(eval_batch_size=1)
    file = world.out / "samples" / "tstory.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-9])
    world.measured.clear()
    world.evaluate(eval_batch_size=1, resume=True)
    assert (file.read_text(), world.measured) == (whole, ["4_s4"])


@pytest.mark.parametrize("place", [0, 2])
def test_a_damaged_line_is_told(world: World, place: int) -> None:
    world.evaluate(eval_batch_size=1)
    file = world.out / "samples" / "tstory.jsonl"
    lines = file.read_text().splitlines()
    lines[place] = lines[place].replace("-1.0", "-0.5", 1)
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(EnvironmentProblem, match=rf"tstory.jsonl:{place + 1}: .*--overwrite"):
        world.evaluate(eval_batch_size=1, resume=True)
    world.evaluate(eval_batch_size=1, overwrite=True)
    assert len(world.rows()) == PAIRS


def test_arrays_are_on_the_disk_before_their_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.folder / "books" / "reader" / "book").mkdir(parents=True)
    (world.folder / "books" / "reader" / "book" / "1.flac").write_text("once upon a time")

    def full(self: EvalFolder, *_: Any) -> None:
        raise EnvironmentProblem("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(EvalFolder, "_write_arrays", full)
        with pytest.raises(EnvironmentProblem, match="disk is full"):
            world.evaluate(LibriLight(), options={"data": str(world.folder / "books")})
    assert world.rows("librilight") == []


# --- what a folder refuses ---


class _Newer(TStory):
    """The next version of a task."""

    version = 2


class _OtherCodec(PlantedBackbone):
    """A backbone whose files become other codes."""

    def clip_reader(self, config: Any, *, device: Any) -> Any:
        reader = PlantedReader()
        reader.identity = {"codec": "other bytes"}
        return reader


class _OtherWeights(PlantedBackbone):
    """The same options and other weights."""

    def build(self, *args: Any, **more: Any) -> nn.Module:
        model = super().build(*args, **more)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return model


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tasks": [_Newer()]}, "version: 1 then, 2 now"),
        ({"arms": ("ttt", "reset")}, "arms: "),
        ({"options": {"seed": 7}}, "options.seed: 0 then, 7 now"),
        ({"backbone": _OtherCodec()}, 'reader.codec: "bytes" then, "other bytes" now'),
        ({"backbone": _OtherWeights()}, "backbone_weights"),
        ({"score": {"normalise": "sum"}}, 'eval.score.normalise: "mean" then, "sum" now'),
        ({"reset_tokens": 7}, "eval.reset_tokens: null then, 7 now"),
        ({"eval_batch_size": 3}, "eval.eval_batch_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_of_something_else_are_not_used(world: World, change: dict[str, Any], told: str) -> None:
    world.evaluate(loss=likely("w"))
    kept = world.rows()
    tasks = change.pop("tasks", [])
    for resume in (False, True):
        with pytest.raises(UsageError, match="--overwrite") as caught:
            world.evaluate(*tasks, **change, resume=resume)
        assert told in str(caught.value)
    assert world.rows() == kept
    world.measured.clear()
    world.evaluate(*tasks, **change, overwrite=True)
    assert len(world.measured) == PAIRS


def test_the_order_of_tasks_changes_nothing(world: World) -> None:
    """A task that reads no clips is not of the codec by which another reads them."""
    world.evaluate(_Alone(), TStory())
    world.measured.clear()
    world.evaluate(TStory(), _Alone())
    assert world.measured == []


def test_other_options_are_refused_before_a_model_is_built(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.evaluate()
    monkeypatch.setattr(PlantedBackbone, "build", None)
    with pytest.raises(UsageError, match="limit: null then, 2 now"):
        world.evaluate(options={"limit": 2})


def test_what_is_measured_anew_leaves_nothing_of_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it is stopped: results of before, beside rows of now, would be taken for those of now."""
    monkeypatch.setattr("ttt.eval.writing.outcome_figure", lambda *_: new_figure(1, 1))
    world.evaluate(TStory(), SStory(), arms=("ttt", "closed"))
    assert (world.out / "outcomes.png").exists()
    assert (world.out / "results.json").exists()
    (world.out / "mine.png").write_text("of somebody else")
    with pytest.raises(KeyboardInterrupt):
        world.evaluate(TStory(), loss=stops_at("e2"), overwrite=True, reset_tokens=9, eval_batch_size=2)
    there = {str(file.relative_to(world.out)) for file in world.out.rglob("*") if file.is_file()}
    assert there == {"eval.json", "samples/tstory.jsonl", "mine.png"}
    world.evaluate(TStory(), resume=True, reset_tokens=9, eval_batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        world.evaluate(TStory(), loss=stops_at("e2"), overwrite=True, reset_tokens=9, eval_batch_size=2)
    assert not (world.out / "results.json").exists()


@pytest.mark.parametrize("file", ["loss.png", "results.json", "samples/tstory.jsonl", "submission/ttt.txt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_keeps_its_files(world: World, file: str, overwrite: bool) -> None:
    (world.out / file).parent.mkdir(parents=True)
    (world.out / file).write_text("of somebody else")
    before = sorted(world.out.rglob("*"))
    with pytest.raises(UsageError, match=r"out: holds other files \([a-z.]+\), .* name another --out"):
        world.evaluate(overwrite=overwrite)
    assert sorted(world.out.rglob("*")) == before
    assert (world.out / file).read_text() == "of somebody else"


@pytest.mark.parametrize("written", ["", "{", "[]", "{}", '{"made_from": 3}', "\x00"])
def test_a_damaged_record_is_told_and_can_be_overwritten(world: World, written: str) -> None:
    world.evaluate()
    (world.out / "eval.json").write_text(written)
    with pytest.raises(EnvironmentProblem, match=r"eval.json.*name another --out, or measure anew with --overwrite$"):
        world.evaluate(resume=True)
    world.measured.clear()
    world.evaluate(overwrite=True)
    assert len(world.measured) == len(world.rows()) == PAIRS


def test_results_are_looked_for_where_they_are(world: World) -> None:
    world.evaluate(out=world.folder / "run" / "eval" / "step_1")
    run, nowhere = world.folder / "run", world.folder / "nowhere"
    with pytest.raises(EnvironmentProblem, match=r"run: holds no results \(results.json\).*; name .*run/eval/step_1$"):
        list(comparison(run, run))
    with pytest.raises(
        EnvironmentProblem, match=r"nowhere: holds no results .*; name the folder that `ttt eval` wrote$"
    ):
        list(comparison(nowhere, run))


def test_two_at_once_never_write_into_one_folder(world: World) -> None:
    (world.out / "samples").mkdir(parents=True)
    handle = os.open(world.out / "samples", os.O_RDONLY)
    try:
        lock(handle, world.out / "samples")
        with pytest.raises(UsageError, match="another process is evaluating into it; wait for it, or name another"):
            world.evaluate()
    finally:
        os.close(handle)
    world.evaluate()


def test_results_tell_which_tasks_they_leave_out(world: World) -> None:
    world.evaluate(TStory())
    assert "note:" not in world.said.getvalue()
    world.evaluate(SStory())
    assert "note: the results are of sstory alone; rows of tstory are kept: name all of them" in world.said.getvalue()
    world.measured.clear()
    world.evaluate(TStory(), SStory())
    assert world.measured == []
    assert set(world.results()["results"]) == {"tstory", "sstory"}


# --- arms ---


class _Gates(ItemTask):
    """Whether gates are closed while something is measured, and whether the model trains."""

    name = "gates"

    def items(self, setup: Any) -> Sequence[Item]:
        return [Item(str(n), str(n), str(n)) for n in range(4)]

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        closed = any(module.closed for module in bench.model.modules() if isinstance(module, Gate))
        drawn = float(torch.rand(()))
        numbers = {"closed": float(closed), "training": float(bench.model.training), "drawn": drawn}
        return [Measured({**numbers, "arm": float(("ttt", "closed", "reset").index(bench.arm))}) for _ in items]

    def values(self, setup: Any, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        return numbers


class _Alone(_Gates):
    """A task that needs nothing of a backbone."""

    name = "alone"
    requires = ()


def test_each_arm_is_what_it_is_called_whatever_came_before(world: World) -> None:
    world.evaluate(_Gates(), arms=("closed", "ttt", "reset"), eval_batch_size=1)
    table = world.results()["results"]["gates"]
    assert [table[f"closed,{arm}"] for arm in ("none", "closed", "reset")] == [0.0, 1.0, 0.0]
    assert [table[f"arm,{arm}"] for arm in ("none", "closed", "reset")] == [0.0, 1.0, 2.0]
    assert [table[f"training,{arm}"] for arm in ("none", "closed", "reset")] == [0.0] * 3


def test_what_a_task_draws_does_not_depend_on_what_was_measured_before(world: World) -> None:
    world.evaluate(_Gates(), eval_batch_size=1)
    whole = world.rows("gates")
    file = world.out / "samples" / "gates.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    world.evaluate(_Gates(), eval_batch_size=1, resume=True)
    assert world.rows("gates") == whole
    assert len({row["arms"]["ttt"]["drawn"] for row in whole}) == 4


# --- what was learned ---


class _Learned(_Gates):
    """How large a TTT layer's weights are."""

    name = "learned"

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        (adapter, *_) = bench.context.adapters.values()
        return [Measured({"size": float(next(adapter.parameters()).detach().abs().sum())})] * len(items)


def test_an_adapter_is_loaded_and_only_if_it_fits(world: World) -> None:
    config, backbone = planted().config, PlantedBackbone()
    chosen = [ChosenTask(_Learned(), None, _Learned.options(name="learned"))]
    _, injection = build(config, backbone, torch.device("cpu"))
    with torch.no_grad():
        for parameter in next(iter(injection.adapters.values())).parameters():
            parameter.fill_(3.0)
    size = 3.0 * next(next(iter(injection.adapters.values())).parameters()).numel()
    identity = backbone_identity(backbone, config.backbone)
    adapter = save_adapter(world.folder / "adapter", injection, backbone=identity)
    for path, expected in ((adapter, True), (None, False)):
        evaluate(config, backbone, chosen, out=world.folder / str(path is None), adapter=path)
        told = json.loads((world.folder / str(path is None) / "results.json").read_text())
        assert (told["results"]["learned"]["size,none"] == size) == expected
    other = config.model_copy(update={"ttt": config.ttt.model_copy(update={"base_lr": 0.7})})
    with pytest.raises(AdapterMismatchError, match=r"ttt\.base_lr"):
        evaluate(other, backbone, chosen, out=world.out, adapter=adapter)


# --- a signal ---


def test_a_signal_is_heard_between_batches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import ttt.evaluate

    asked: list[int] = []

    def asks() -> None:
        asked.append(len(world.measured))
        if len(world.measured) == 2:
            raise TTTError("stopped")

    monkeypatch.setattr(ttt.evaluate, "stop_if_asked", asks)
    with pytest.raises(TTTError, match="stopped"):
        world.evaluate(eval_batch_size=1)
    assert asked == [0, 1, 2]
    assert len(world.rows()) == 2
