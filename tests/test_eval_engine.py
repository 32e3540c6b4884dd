"""What an evaluation makes of scores that are known: pairs, failed items, arms, streams, recall; and of wrong tasks."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import PlantedBackbone, PlantedReader, PlantedStream, planted
from torch import Tensor

from ttt.config import TaskOptions
from ttt.errors import EnvironmentProblem, PluginError, UsageError
from ttt.eval.bench import Bench
from ttt.eval.engine import measured, rows_of, setup_of
from ttt.eval.in_training import numbers_of
from ttt.eval.items import Item, Measured, Row
from ttt.eval.listing import chosen_items
from ttt.eval.positions import TextPositions
from ttt.eval.recall import Recall
from ttt.eval.report import summary_text
from ttt.eval.results import MeasuredTask, TaskSummary, as_results, summed_up
from ttt.eval.speech.librilight import LibriLight
from ttt.eval.speech.pairs import SWuggy, TStory
from ttt.eval.statistics import estimate, mcnemar, paired_difference
from ttt.eval.tasks import ItemTask, Setup, with_chosen
from ttt.eval.variants import clip_scores, first_difference
from ttt.plugins import EvalContext, ScoreFacts, Scores

WORDS = 6
VOICES = ("ann", "bob", "cem")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """sWUGGY's layout: words begin with `w`, non-words with `n`; lengths and voices vary."""
    folder = tmp_path / "lexical" / "dev"
    folder.mkdir(parents=True)
    rows = []
    for number, voice, correct in itertools.product(range(WORDS), VOICES, (1, 0)):
        name = f"{number}_{voice}_{correct}"
        letter = "w" if correct else "n"
        (folder / f"{name}.wav").write_text(letter + voice + str(number) * (number + 2 * correct + len(voice)))
        fixed = {"frequency": "oov" if number < 2 else str(3**number), "word": "w", "phones": "p", "length": number % 3}
        rows.append({"filename": name, "id": number, "voice": voice, "correct": correct, **fixed})
    write_gold(folder / "gold.csv", rows)
    return tmp_path


def write_gold(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def finds_likely(letter: str) -> Callable[[Tensor], Tensor]:
    """Losses of a model that finds what begins with a letter likelier."""
    return lambda clip: torch.full((len(clip),), 1.0 if clip[0] == ord(letter) else 2.0)


def by_voice(clip: Tensor) -> Tensor:
    """Right for the voice `ann`, wrong for `bob`, and of two minds about `cem`."""
    right, voice = bool(clip[0] == ord("w")), chr(int(clip[1]))
    return torch.full((len(clip),), {"a": 2.0 - right, "b": 1.0 + right, "c": 1.5}[voice])


def run(task: ItemTask, context: EvalContext, arms: Sequence[str] = ("ttt",), **options: Any) -> TaskSummary:
    rows, setup = rows_for(task, context, arms, **options)
    return summed_up(task, setup, rows, arms)


def rows_for(
    task: ItemTask, context: EvalContext, arms: Sequence[str] = ("ttt",), **options: Any
) -> tuple[list[Row], Setup]:
    chosen = task.options(name=task.name, **options)
    setup = setup_of(task, context, chosen)
    bench = Bench(context, chosen)
    return [row for batch in rows_of(task, bench, chosen_items(task, setup).items, arms) for row in batch.rows], setup


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (finds_likely("w"), 1.0),
        (finds_likely("n"), 0.0),
        (lambda clip: torch.ones(len(clip)), 0.5),
        (by_voice, (1.0 + 0.0 + 0.5) / 3),
    ],
    ids=["always right", "always wrong", "always of two minds", "by voice"],
)
def test_a_planted_scorer_gets_exactly_what_it_must(
    pairs: Path, loss: Callable[[Tensor], Tensor], expected: float
) -> None:
    summary = run(SWuggy(), planted(loss), data=str(pairs))
    found = summary.metrics["acc"]["ttt"]
    assert found.mean == expected
    assert (found.items, found.units) == (WORDS * len(VOICES), WORDS)
    assert found.stderr == 0  # every id has the same outcome
    assert summary.parts["vocabulary=in"]["ttt"].units == WORDS - 2
    assert {part for part in summary.parts if part.startswith("frequency")} == {
        *("frequency=oov", "frequency=5-19", "frequency=20-99", "frequency=>=100")
    }


def test_the_order_of_rows_changes_nothing(pairs: Path) -> None:
    def losses(clip: Tensor) -> Tensor:
        return (clip.double() * 37.7).sin().abs()

    def outcome() -> tuple[list[Mapping[str, Any]], TaskSummary]:
        rows, setup = rows_for(SWuggy(), planted(losses), data=str(pairs))
        return [row.as_line() for row in rows], summed_up(SWuggy(), setup, rows, ("ttt",))

    before = outcome()
    gold = pairs / "lexical" / "dev" / "gold.csv"
    with gold.open(newline="") as text:
        rows = list(csv.DictReader(text))
    random.Random(5).shuffle(rows)
    write_gold(gold, rows)
    assert outcome() == before
    wrong = [{**row, "correct": str(1 - int(row["correct"]))} for row in rows]  # a reader by order would not see this
    write_gold(gold, wrong)
    assert outcome()[1].metrics["acc"]["ttt"].mean == 1 - before[1].metrics["acc"]["ttt"].mean


@pytest.mark.parametrize("size", [1, 4, 64])
def test_a_batch_equals_singles(pairs: Path, size: int) -> None:
    def losses(clip: Tensor) -> Tensor:
        return torch.cumsum(clip.double(), 0).cos().abs()

    rows, _ = rows_for(SWuggy(), planted(losses, eval_batch_size=size), data=str(pairs))
    alone, _ = rows_for(SWuggy(), planted(losses, eval_batch_size=1), data=str(pairs))
    assert [row.as_line() for row in rows] == [row.as_line() for row in alone]


def test_an_item_that_raises_is_an_error_and_never_a_win(pairs: Path) -> None:
    (pairs / "lexical" / "dev" / "3_bob_0.wav").write_text("broken")
    rows, setup = rows_for(SWuggy(), planted(finds_likely("n"), eval_batch_size=5), data=str(pairs))
    (failed,) = [row for row in rows if row.error is not None]
    assert failed.item.id == "3/bob"
    assert "cannot be decoded" in str(failed.error)
    assert failed.arms == {}
    summary = summed_up(SWuggy(), setup, rows, ("ttt",))
    assert (summary.items, summary.failed) == (WORDS * len(VOICES), 1)
    assert summary.metrics["acc"]["ttt"].mean == 0  # the others are all wrong
    assert summary.metrics["acc"]["ttt"].items == WORDS * len(VOICES) - 1
    with pytest.raises(EnvironmentProblem, match="1 of 18 items failed, the first, 3/bob"):
        numbers_of(SWuggy(), planted(finds_likely("n")), SWuggy.options(name="swuggy", data=str(pairs)))


def test_a_loss_that_is_not_finite_is_an_error(pairs: Path) -> None:
    def losses(clip: Tensor) -> Tensor:
        return torch.full((len(clip),), float("nan") if clip[0] == ord("n") else 1.0)

    rows, _ = rows_for(SWuggy(), planted(losses), data=str(pairs))
    assert all("not a finite number" in str(row.error) for row in rows)


def test_limit_keeps_every_voice_of_an_id(pairs: Path) -> None:
    rows, _ = rows_for(SWuggy(), planted(), data=str(pairs), limit=2, seed=3)
    units = {row.item.unit for row in rows}
    assert len(units) == 2
    assert len(rows) == 2 * len(VOICES)
    others = {row.item.unit for row in rows_for(SWuggy(), planted(), data=str(pairs), limit=2, seed=4)[0]}
    assert others != units


def test_gates_tell_what_needs_no_model(pairs: Path) -> None:
    """Words are longer than non-words here; which has more energy, and whose codes are frequent, is computed anew."""
    context = planted()
    rows, setup = rows_for(SWuggy(), context, data=str(pairs))
    found = SWuggy().references(Bench(context, setup.options), rows)
    assert list(found) == ["length", "rms", "energy", "codes_mean", "codes_sum"]
    assert found["length"] == [1.0] * len(rows)
    sounds = [[[byte * 37 % 101 for byte in file.read_bytes()] for file in row.item.files] for row in rows]
    energies = [[sum(x * x for x in sound) for sound in pair] for pair in sounds]
    assert found["energy"] == [1.0 if right > wrong else 0.5 if right == wrong else 0.0 for right, wrong in energies]
    assert 0.5 not in found["energy"]
    summary = summed_up(SWuggy(), setup, rows, ("ttt",), found)
    assert summary.references["length"].mean == 1.0


@pytest.mark.parametrize("size", [4, 16])
def test_no_recording_is_encoded_twice(pairs: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Neither for another arm nor for the gates, however many there are."""
    read: list[Path] = []
    whole = PlantedReader.read
    monkeypatch.setattr(PlantedReader, "read", lambda self, path: read.append(path) or whole(self, path))
    monkeypatch.setattr(PlantedReader, "sound", lambda self, path: (whole(self, path)[0] % 7).float().numpy())
    monkeypatch.setattr("ttt.eval.bench._CLIPS_KEPT", 8)
    context = planted(eval_batch_size=size)
    task, options = SWuggy(), SWuggy.options(name="swuggy", data=str(pairs))
    bench = Bench(context, options)
    items = chosen_items(task, setup_of(task, context, options)).items
    rows = [row for batch in rows_of(task, bench, items, ("ttt", "closed")) for row in batch.rows]
    task.references(bench, rows)
    assert sorted(read) == sorted(file for item in items for file in item.files)


def test_streams_are_weighed_and_normalised_as_they_are_called() -> None:
    """Of random losses, against the definitions written out."""
    torch.manual_seed(3)
    nll, mask = torch.rand(1, 3, 7, dtype=torch.float64), torch.rand(1, 3, 7) > 0.3
    mask[0, 2] = False
    facts = ScoreFacts("speech", ("a", "b", "c"), {"one": (1, 0, 0), "both": (5.0, 1.0, 0), "none": (0, 0, 1)}, "one")
    found = clip_scores(Scores(nll, mask), facts, begin=4)
    assert set(found) == {f"{w}.{n}" for w in ("one", "both") for n in ("mean", "sum", "continuation")}
    a, b = ([float(x) for x, there in zip(nll[0, k], mask[0, k], strict=True) if there] for k in (0, 1))
    assert found["one.mean"] == pytest.approx(-sum(a) / len(a), abs=1e-12)
    assert found["both.sum"] == pytest.approx(-(5 * sum(a) + sum(b)), abs=1e-12)
    assert found["both.mean"] == pytest.approx(-(5 * sum(a) + sum(b)) / (5 * len(a) + len(b)), abs=1e-12)
    late = [float(x) for x, there in zip(nll[0, 0, 4:], mask[0, 0, 4:], strict=True) if there]
    assert found["one.continuation"] == pytest.approx(-sum(late) / len(late), abs=1e-12)


def test_a_continuation_begins_where_the_clips_differ() -> None:
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 4, 5]])
    assert first_difference(one, other) == 2
    assert first_difference(one, one[:, :3]) == 2  # the last position of the shorter clip counts
    assert first_difference(one, one) == 3


def test_stories_are_paired_by_their_names(tmp_path: Path) -> None:
    for number, story in enumerate(("aa-1", "bb-2", "bb-2")):
        for letter, member in (("w", "correct"), ("n", "incorrect")):
            (tmp_path / f"{number}_{story}_{member}.wav").write_text(letter + "story" * (number + 1))
    (tmp_path / "notes_correct.wav").write_text("not a story")
    found = run(TStory(), planted(finds_likely("w")), data=str(tmp_path)).metrics["acc"]["ttt"]
    assert (found.mean, found.items, found.units, found.clusters) == (1.0, 3, 3, 2)


def make_books(folder: Path) -> Path:
    """Books of letters that never repeat four in the same order, for readers who remember."""
    for book in range(3):
        for chapter in (1, 2, 10):
            file = folder / f"speaker{book}" / "book" / f"chapter_{chapter}.flac"
            file.parent.mkdir(parents=True, exist_ok=True)
            numbers = random.Random(100 * book + chapter)
            file.write_bytes(bytes(numbers.randrange(256) for _ in range(150)))
    return folder


def test_hours_of_a_book_are_one_stream_of_its_chapters_in_order(tmp_path: Path) -> None:
    data = str(make_books(tmp_path))
    rows, setup = rows_for(LibriLight(), planted(span=100), ("ttt", "closed", "reset"), data=data)
    assert [row.item.id for row in rows] == ["speaker0/book", "speaker1/book", "speaker2/book"]
    assert [file.stem for file in rows[0].item.files] == ["chapter_1", "chapter_2", "chapter_10"]
    found = summed_up(LibriLight(), setup, rows, ("ttt", "closed", "reset")).metrics
    assert list(found)[:2] == ["loss", "loss_beyond_attention"]
    assert found["loss/all"]["ttt"].mean == found["loss"]["ttt"].mean == 2.0  # nothing repeats


def test_a_book_that_repeats_is_learned_unless_its_memory_is_cut(tmp_path: Path) -> None:
    passage = bytes(range(40))
    book = tmp_path / "speaker" / "book" / "one.flac"
    book.parent.mkdir(parents=True)
    book.write_bytes(passage * 4)
    arms = ("ttt", "closed", "reset")
    rows, _ = rows_for(LibriLight(), planted(span=40, reset_tokens=40), arms, data=str(tmp_path))
    late = {arm: numbers["loss_beyond_attention.semantic"] for arm, numbers in rows[0].arms.items()}
    assert late["closed"] == 2.0
    assert late["reset"] == 2.0  # it starts anew with every repeat
    assert late["ttt"] == pytest.approx(1 + 3 / 120)  # but for the bytes across the first seam
    rows, _ = rows_for(LibriLight(), planted(span=40, reset_tokens=80), arms, data=str(tmp_path))
    # it hears every second repeat again; the seam at 120 it has heard at 80
    late_reset = rows[0].arms["reset"]["loss_beyond_attention.semantic"]
    assert late_reset == pytest.approx((37 + 2 * 3 + 2 * 40 + 40) / 120)


def test_hours_end_where_they_are_told_to(tmp_path: Path) -> None:
    context = planted(span=100)
    options = LibriLight.options(name="librilight", data=str(make_books(tmp_path)), hours=200 / 36000)
    bench, task = Bench(context, options), LibriLight()
    (book, *_) = chosen_items(task, setup_of(task, context, options)).items
    batch = measured(task, bench, [book], ("ttt",))
    assert {len(losses) for losses in batch.arrays[book.id, "ttt"].values()} == {200}


@pytest.mark.parametrize(("reset", "heard"), [(10_000, True), (30, False)])
def test_recall_is_what_a_second_hearing_gains(tmp_path: Path, reset: int, heard: bool) -> None:
    context = planted(span=50, reset_tokens=reset)
    rows, setup = rows_for(
        Recall(),
        context,
        ("ttt", "closed", "reset"),
        data=str(make_books(tmp_path)),
        passage=2.0,
        gaps=[3.0, 30.0],
        passages=2,
    )
    assert len(rows) == 3 * 2 * 2
    summary = summed_up(Recall(), setup, rows, ("ttt", "closed", "reset"))
    gain = summary.metrics["gain"]
    assert gain["ttt"].mean == pytest.approx(17 / 20)  # 20 positions, less the three that cross the seam
    assert gain["closed"].mean == 0
    assert gain["reset"].mean == (pytest.approx(17 / 20) if heard else 0)
    assert gain["ttt"].clusters == 3
    assert set(summary.parts) == {"gap=3", "gap=30"}


def test_a_backbone_of_text_recalls_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text is a book; lengths are in tokens, and the arm `reset` counts them."""
    weights = {"all": (1.0, 1.0)}
    facts = ScoreFacts(
        "text", ("words", "marks"), weights, "all", positions_per_second=None, attention_span=50, padding=-1
    )
    monkeypatch.setattr(PlantedBackbone, "score_facts", lambda self, config: facts)
    for number in range(2):
        (tmp_path / f"{number}.txt").write_bytes(random.Random(number).randbytes(200))
    context = planted(span=50)
    arms = ("ttt", "closed", "reset")
    rows, setup = rows_for(Recall(), context, arms, data=str(tmp_path), passage=20, gaps=[30], passages=2)
    assert [row.item.unit for row in rows] == ["0.txt#0", "0.txt#1", "1.txt#0", "1.txt#1"]
    assert [row.error for row in rows] == [None] * 4
    gain = summed_up(Recall(), setup, rows, arms).metrics["gain"]
    assert gain["ttt"].mean == pytest.approx(17 / 20)
    assert gain["reset"].mean == gain["ttt"].mean  # 70 tokens are fewer than the reset's 512
    (tmp_path / "again").mkdir()
    for number in range(2):
        (tmp_path / "again" / f"{number}.txt").write_bytes(2 * random.Random(number).randbytes(60))
    rows, setup = rows_for(TextPositions(), context, arms, data=str(tmp_path / "again"), positions=118)
    assert [(row.item.unit, row.error) for row in rows] == [("0.txt", None), ("1.txt", None)]
    found = summed_up(TextPositions(), setup, rows, arms).metrics
    for metric in ("loss", "loss_beyond_attention"):  # the second half is known, and attention does not reach back
        assert found[metric]["reset"].mean == found[metric]["ttt"].mean < found[metric]["closed"].mean
    with pytest.raises(UsageError, match="the backbone toy reads text, and the task is on speech"):
        rows_for(SWuggy(), context, data=str(tmp_path))
    monkeypatch.undo()
    with pytest.raises(UsageError, match="the backbone toy reads speech, and the task is on text"):
        rows_for(TextPositions(), planted(), data=str(tmp_path))


def test_a_gap_longer_than_the_next_book_is_an_error(tmp_path: Path) -> None:
    rows, _ = rows_for(Recall(), planted(), data=str(make_books(tmp_path)), passage=2.0, gaps=[46.0])
    assert all("has 45 seconds, and 46 are needed" in str(row.error) for row in rows)


def test_fast_weights_start_anew_however_a_stream_is_cut() -> None:
    from ttt.eval.bench import Restarting

    class Counting:
        def __init__(self) -> None:
            self.started: list[int] = []
            self.read_so_far = 0

        def read(self, piece: Tensor) -> Scores:
            self.read_so_far += piece.shape[-1]
            return Scores(torch.zeros(1, 1, piece.shape[-1]), torch.ones(1, 1, piece.shape[-1], dtype=torch.bool))

        def learn_anew(self) -> None:
            self.started.append(self.read_so_far)

        def finish(self) -> Scores:
            return Scores(torch.zeros(1, 1, 0), torch.zeros(1, 1, 0, dtype=torch.bool))

    for pieces in ([30], [1] * 30, [7, 7, 7, 7, 2], [10, 20]):
        stream = Counting()
        restarting = Restarting(stream, every=10)
        lengths = [restarting.read(torch.zeros(1, 1, n)).nll.shape[-1] for n in pieces]
        assert lengths == pieces
        assert stream.started == [10, 20]


class HoldsBack(PlantedStream):
    """A stream that gives out each score one position late."""

    held: Scores | None = None

    def read(self, piece: Tensor) -> Scores:
        parts = [part for part in (self.held, super().read(piece)) if part is not None]
        nll, mask = (torch.cat([getattr(part, name) for part in parts], -1) for name in ("nll", "mask"))
        self.held = Scores(nll[..., -1:], mask[..., -1:])
        return Scores(nll[..., :-1], mask[..., :-1])

    def finish(self) -> Scores:
        assert self.held is not None
        return self.held


def test_under_reset_clips_that_are_longer_than_it_are_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(planted(lambda clip: torch.ones(len(clip)), reset_tokens=5), None)
    for stream in (PlantedStream, HoldsBack):
        monkeypatch.setattr("planted.PlantedStream", stream)
        for arm, length, loss in (("reset", 5, 1.0), ("reset", 6, 2.0), ("ttt", 6, 1.0)):
            with bench.under(arm):
                (found,) = bench.scores([torch.arange(length)[None]])
            assert found.nll[0, 0].tolist() == [loss] * length


def test_reset_is_in_seconds_or_in_tokens() -> None:
    assert Bench(planted(), None).reset_every == 150  # of 10 positions a second
    assert Bench(planted(reset_sec=3), None).reset_every == 30
    assert Bench(planted(reset_tokens=7), None).reset_every == 7


class Wrong(ItemTask):
    """A task that is wrong in one way."""

    name = "wrong"
    requires = ()

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def items(self, setup: Setup) -> Sequence[Item]:
        found: Sequence[Item] = self.answers.get("items", [Item("a", "a", "a"), Item("b", "b", "b")])
        return found

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        found: Sequence[Measured] = self.answers.get("measured", [Measured({"x": 1.0})] * len(items))
        return found

    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        return dict(numbers)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"items": [Item("a", "a", "a")] * 2}, "two items of the name 'a'"),
        ({"items": [Item("a", "u", "c"), Item("b", "u", "d")]}, "the unit 'u' into two clusters"),
        ({"measured": [Measured({})]}, "not a Measured for each of 2 items"),
        ({"measured": [{"x": 1.0}] * 2}, "not a Measured for each of 2 items"),
    ],
)
def test_a_wrong_task_is_told(answers: Mapping[str, Any], told: str) -> None:
    with pytest.raises(PluginError, match=told):
        rows_for(Wrong(**answers), planted())


def test_a_right_task_of_that_kind_passes() -> None:
    rows, _ = rows_for(Wrong(), planted())
    assert [row.arms for row in rows] == [{"ttt": {"x": 1.0}}] * 2


def test_what_rows_amount_to_is_what_statistics_say() -> None:
    """Of items that are no units, and units that are no clusters."""
    drawn = random.Random(4)
    rows = [
        Row(Item(f"{u}{v}", u, u[0]), {arm: {"x": drawn.choice([0.0, 0.5, 1.0])} for arm in ("ttt", "closed")})
        for u in ("a1", "a2", "b1", "c1", "c2", "c3")
        for v in ("x", "y")
    ]
    units, clusters = [row.item.unit for row in rows], [row.item.cluster for row in rows]
    a, b = ([row.arms[arm]["x"] for row in rows] for arm in ("ttt", "closed"))
    task, context = Wrong(), planted()
    setup = setup_of(task, context, task.options(name="wrong"))
    found = summed_up(task, setup, rows, ("ttt", "closed"))
    expected = {"ttt": estimate(a, units, clusters), "closed": estimate(b, units, clusters)}
    assert found.metrics["x"] == {**expected, "ttt-closed": paired_difference(a, b, units, clusters)}
    assert found.tests == {}  # of losses, there is no winner
    told = as_results({"wrong": found}, versions={}, described={})["results"]["wrong"]
    assert told["x_stderr,none"] == expected["ttt"].stderr
    assert told["x_stderr,closed"] == expected["closed"].stderr != expected["ttt"].stderr
    task.chance = 0.5  # type: ignore[misc]
    assert summed_up(task, setup, rows, ("ttt", "closed")).tests == {"ttt-closed": mcnemar(a, b, clusters)}
    many = [replace(row, item=Item(f"{row.item.id}{n}", str(n), str(n))) for row in rows[:1] for n in range(200)]
    assert summed_up(task, setup, many, ("ttt", "closed")).tests == {}
    measured_task = MeasuredTask(task, setup, ("ttt", "closed"), tuple(rows), found)
    described = {
        **{"config": context.config.model_dump(mode="json"), "adapter": None, "device": "a CPU"},
        "notices": {"made up": ["wrong", "swuggy"]},
    }
    assert "- data of wrong, swuggy: made up\n" in summary_text([measured_task], described)
    (line,) = [line for line in summary_text([measured_task], described).splitlines() if line.startswith("| wrong")]
    assert line.endswith("| 6 | 0 |")


@pytest.mark.parametrize("streams", ["semantic", "all"])
@pytest.mark.parametrize("normalise", ["mean", "sum", "continuation"])
def test_a_pair_is_judged_by_the_score_that_the_config_names(streams: str, normalise: str) -> None:
    context = planted(score={"normalise": normalise})
    facts = replace(PlantedBackbone().score_facts(context.config), chosen=streams)
    context.backbone.score_facts = lambda config: facts  # type: ignore[attr-defined]
    chosen = f"{streams}.{normalise}"
    variants = [f"{s}.{n}" for s in ("semantic", "all") for n in ("mean", "sum", "continuation")]
    numbers = {
        f"{member}.{variant}": float((member == "correct") == (variant == chosen))
        for member in ("correct", "incorrect")
        for variant in variants
    }
    task = TStory()
    setup = setup_of(task, context, task.options(name="tstory"))
    found = task.values(setup, Item("a", "a", "a"), numbers)
    assert found == {"acc": 1.0, **{f"acc/{variant}": float(variant == chosen) for variant in variants}}
    assert with_chosen({"loss.semantic": 1.0, "loss.all": 2.0}, streams)["loss"] == 1.0 + (streams == "all")


def test_a_submission_has_each_recordings_own_score(pairs: Path) -> None:
    task = SWuggy()
    rows, setup = rows_for(task, planted(finds_likely("w")), data=str(pairs))
    (text,) = task.texts(setup, rows).values()
    scores = dict(line.split() for line in text.splitlines())
    assert len(scores) == 2 * len(rows)
    assert {stem: float(score) for stem, score in scores.items()} == {
        stem: -1.0 if stem.endswith("1") else -2.0 for stem in scores
    }


def test_memory_that_runs_out_is_no_items_fault(pairs: Path) -> None:
    def losses(clip: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(EnvironmentProblem, match=r"out of memory at the item .* a smaller eval.eval_batch_size"):
        rows_for(SWuggy(), planted(losses), data=str(pairs))


def test_a_run_gets_the_numbers_of_both_arms(pairs: Path) -> None:
    options = SWuggy.options(name="swuggy", data=str(pairs))
    found = numbers_of(SWuggy(), planted(finds_likely("w")), options)
    assert {"acc", "acc_stderr", "acc_closed", "acc_stderr_closed", "acc_ttt-closed"} <= set(found)
    assert not any("/" in name for name in found)


def test_a_stop_ends_a_runs_measurement(pairs: Path) -> None:
    context = replace(planted(finds_likely("w")), stop=lambda: True)
    assert numbers_of(SWuggy(), context, SWuggy.options(name="swuggy", data=str(pairs))) == {}


def test_what_a_user_must_know_of_data_that_a_backbone_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    context = planted()
    monkeypatch.setattr(PlantedBackbone, "own_tasks_notice", "made up")
    own, given = (SWuggy.options(name="swuggy", data=data) for data in (None, "words"))
    assert setup_of(SWuggy(), context, own).notice == "made up"
    assert setup_of(SWuggy(), context, given).notice is None
    assert setup_of(Wrong(), context, TaskOptions(name="wrong")).notice is None  # it reads no data
