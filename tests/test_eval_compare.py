"""Two evaluations beside each other: refused if they are not of the same, else paired item by item."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ttt.check import load_config
from ttt.checksums import sealed_line
from ttt.errors import EnvironmentProblem, PluginError, TTTError, UsageError
from ttt.eval.compare import Compared, Evaluated, Outcome, average_difference, compared, refusals
from ttt.eval.comparing import comparison
from ttt.eval.items import Item, Row
from ttt.eval.statistics import Estimate, mcnemar, paired_difference
from ttt.files import write_json
from ttt_cli.main import main

CONDITIONS = {"version": 1, "eval.score.normalise": "mean"}


def outcome(value: float, unit: str, *, closed: float = 0.5, digest: str = "") -> Outcome:
    values = {"ttt": {"acc": value, "acc/other": 1 - value}, "closed": {"acc": closed}}
    return Outcome(unit, unit, (digest or f"sha of {unit}",), values)


def evaluated(values: Mapping[str, float]) -> Evaluated:
    """Items are named UNIT/VOICE."""
    return Evaluated(CONDITIONS, {item: outcome(value, item.split("/")[0]) for item, value in values.items()})


ONE = evaluated({"a/A": 0.0, "a/B": 1.0, "b/A": 0.0, "c/A": 0.5, "d/A": 1.0})
OTHER = evaluated({"d/A": 1.0, "a/A": 1.0, "b/A": 1.0, "c/A": 0.0, "a/B": 1.0})


def changed(one: Evaluated, item: str, **changes: Any) -> Evaluated:
    return replace(one, outcomes={**one.outcomes, item: replace(one.outcomes[item], **changes)})


# --- items ---


def test_the_second_minus_the_first_item_by_item() -> None:
    assert refusals(ONE, OTHER) == []
    found = compared(ONE, OTHER)
    assert found is not None
    assert (found.metric, list(found.arms), found.failed) == ("acc", ["ttt", "closed"], 0)
    units = ["a", "a", "b", "c", "d"]
    before, after = [0.0, 1.0, 0.0, 0.5, 1.0], [1.0, 1.0, 1.0, 0.0, 1.0]
    assert found.arms["ttt"] == paired_difference(after, before, units, units)
    assert found.arms["ttt"].mean == (0.5 + 1 - 0.5 + 0) / 4
    assert found.tests["ttt"] == mcnemar(after, before, units)
    assert (found.tests["ttt"].wins, found.tests["ttt"].losses) == (2, 1)
    assert found.arms["closed"].mean == found.arms["closed"].stderr == 0
    back = compared(OTHER, ONE)
    assert back is not None
    assert back.arms["ttt"].mean == -found.arms["ttt"].mean


def test_an_item_that_failed_in_one_is_left_out_of_both() -> None:
    for one, other in ((changed(ONE, "b/A", values={}), OTHER), (ONE, changed(OTHER, "b/A", values={}, digests=()))):
        assert refusals(one, other) == []
        found = compared(one, other)
        assert found is not None
        assert (found.failed, found.arms["ttt"].items, found.arms["ttt"].units) == (1, 4, 3)
        assert found.arms["ttt"].mean == (0.5 - 0.5 + 0) / 3
    nothing = Evaluated(CONDITIONS, {item: replace(each, values={}) for item, each in ONE.outcomes.items()})
    assert compared(nothing, OTHER) is None


def test_arms_that_one_lacks_are_not_compared() -> None:
    def only(arm: str, each: Evaluated) -> Evaluated:
        kept = {item: replace(o, values={arm: o.values[arm]}) for item, o in each.outcomes.items()}
        return replace(each, outcomes=kept)

    found = compared(only("ttt", ONE), OTHER)
    assert found is not None
    assert list(found.arms) == ["ttt"]
    assert compared(only("ttt", ONE), only("closed", OTHER)) is None


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(OTHER, conditions={**CONDITIONS, "version": 2}), "version is 1 in the first, 2 in the second"),
        (replace(OTHER, conditions={"version": 1}), 'eval.score.normalise is "mean" in the first, not known in the se'),
        (
            replace(OTHER, conditions={**CONDITIONS, "reader.codec": None}),
            "reader.codec is not known in the first, null",
        ),
        (changed(OTHER, "a/A", digests=("x",)), "the data differ: 1 item (a/A) had other content"),
        (changed(OTHER, "a/A", unit="b"), "the data differ: 1 item (a/A) had other content"),
        (changed(OTHER, "a/A", cluster="b"), "the data differ: 1 item (a/A) had other content"),
        (evaluated({"a/A": 1.0}), "the second lacks 4 items (a/B, b/A, c/A and 1 more); evaluate both with the same d"),
        (evaluated({**dict.fromkeys(OTHER.outcomes, 1.0), "e": 1.0}), "the first lacks 1 item (e); evaluate both with"),
    ],
)
def test_what_is_of_something_else_is_refused(other: Evaluated, told: str) -> None:
    found = refusals(ONE, other)
    assert len(found) == 1
    assert found[0].startswith(told)
    assert len(refusals(other, ONE)) == 1


def test_what_decides_one_arm_alone_matters_if_both_have_it() -> None:
    of_arms = {"closed": {"eval.reset_sec": 15}, "reset": {"eval.reset_sec": 15}}
    one, other = (replace(each, of_arms=of_arms) for each in (ONE, OTHER))
    assert refusals(one, other) == []
    assert refusals(one, replace(other, of_arms={**of_arms, "reset": {"eval.reset_sec": 30}})) == []  # none has it
    wrong = refusals(one, replace(other, of_arms={**of_arms, "closed": {"eval.reset_sec": 30}}))
    assert wrong == ["eval.reset_sec is 15 in the first, 30 in the second"]


def test_mcnemars_test_is_of_few_wins_and_losses() -> None:
    many = {str(number): float(number % 2) for number in range(200)}
    found = compared(evaluated(many), evaluated(dict.fromkeys(many, 1.0)))
    assert found is not None
    assert found.tests == {}
    del many["0"]
    found = compared(evaluated(many), evaluated(dict.fromkeys(many, 1.0)))
    assert found is not None
    assert (found.tests["ttt"].wins, found.tests["ttt"].losses) == (99, 0)
    losses = compared(evaluated({"a": 2.31, "b": 2.5}), evaluated({"a": 2.3, "b": 2.4}))
    assert losses is not None
    assert list(losses.tests) == ["closed"]


def test_the_average_needs_every_task() -> None:
    def task(mean: float, metric: str = "acc") -> Compared:
        return Compared(metric, {"ttt": Estimate(mean, 0.03, 9, 9, 9)})

    found = average_difference([task(0.1), task(0.3)], "ttt")
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.stderr == pytest.approx(0.03 * 2**0.5 / 2)
    assert average_difference([task(0.1), None], "ttt") is None
    assert average_difference([task(0.1), task(0.3, "loss")], "ttt") is None
    assert average_difference([task(0.1)], "ttt") is average_difference([], "ttt") is None
    assert average_difference([task(0.1), task(0.3)], "closed") is None


# --- folders ---

TASKS = ("tstory", "sstory")


def results_of(folder: Path, *, seed: int, normalise: str = "mean", tasks: tuple[str, ...] = TASKS) -> Path:
    """The files of an evaluation of 20 stories, with scores that are drawn."""
    text = f"backbone: {{name: moshi}}\nttt: {{layers: [1]}}\neval: {{score: {{normalise: {normalise}}}}}\n"
    config = load_config("c.yaml", text=text, training=False).config
    (folder / "samples").mkdir(parents=True)
    for task in tasks:
        generator, rows = random.Random(f"{seed} {task}"), []
        for number in range(20):
            item = Item(f"{number}", f"{number}", f"{number}", {}, (Path(f"{number}.wav"), Path(f"{number}x.wav")))
            arms = {
                arm: {
                    f"{member}.{streams}.{way}": generator.random()
                    for member in ("correct", "incorrect")
                    for streams in ("weighted", "semantic", "all", "text")
                    for way in ("mean", "sum", "continuation")
                }
                for arm in ("ttt", "closed")
            }
            rows.append(Row(item, arms, {str(file): f"sha of {file}" for file in item.files}))
        write_rows(folder, task, [row.as_line() for row in rows])
    write_json(
        folder / "results.json",
        {
            "results": {task: {"alias": task} for task in tasks},
            "n-samples": {task: {"original": 20} for task in tasks},
            "versions": dict.fromkeys(tasks, 1),
            "configs": {task: {"name": task, "data": str(folder), "limit": None, "seed": seed} for task in tasks},
            "config": config.model_dump(mode="json"),
            "made_from": {"reader": {"codec": "mimi"}},
        },
    )
    return folder


def rows_file(folder: Path, task: str) -> Path:
    return folder / "samples" / f"{task}.jsonl"


def write_rows(folder: Path, task: str, rows: list[dict[str, Any]]) -> None:
    rows_file(folder, task).write_text("".join(f"{sealed_line(row)}\n" for row in rows))


def edit_rows(folder: Path, task: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    rows = [json.loads(line) for line in rows_file(folder, task).read_text().splitlines()]
    for row in rows:
        del row[next(key for key in row if key not in Row(Item("", "", ""), {}).as_line())]  # the line's checksum
    change(rows)
    write_rows(folder, task, rows)


def edit_results(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "results.json").read_text())
    change(content)
    write_json(folder / "results.json", {key: value for key, value in content.items() if key != "checksum"})


def accuracy(folder: Path, task: str, arm: str) -> list[float]:
    rows = [json.loads(line) for line in rows_file(folder, task).read_text().splitlines()]
    return [float(r["arms"][arm]["correct.weighted.mean"] > r["arms"][arm]["incorrect.weighted.mean"]) for r in rows]


def test_two_folders_are_compared_by_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = results_of(tmp_path / "one", seed=1), results_of(tmp_path / "other", seed=2)
    edit_rows(other, "tstory", random.Random(0).shuffle)
    edit_results(other, lambda content: content["config"]["backbone"].update(name="moshi"))
    head, tstory, sstory, average = comparison(one, other / "results.json")
    assert head == f"{other / 'results.json'} minus {one}, item by item, ± one standard error"
    found = {}
    ids = [f"{number}" for number in range(20)]
    fresh = results_of(tmp_path / "again", seed=2)
    for task, line in (("tstory", tstory), ("sstory", sstory)):
        after, before = accuracy(fresh, task, "ttt"), accuracy(one, task, "ttt")
        found[task] = paired_difference(after, before, ids, ids)
        test = mcnemar(after, before, ids)
        assert line.startswith(f"{task}: acc: ttt {found[task].mean:+.3f} ± {found[task].stderr:.3f} ({test.wins} bett")
        assert line.endswith("; 20 units")
    mean = sum(each.mean for each in found.values()) / 2
    assert average.startswith(f"average (acc): ttt {mean:+.3f} ± ")
    assert main(["eval", "--compare", str(one), str(other)]) == 0
    assert tstory in capsys.readouterr().out


def test_a_task_that_one_lacks_has_no_result_and_there_is_no_average(tmp_path: Path) -> None:
    one, other = results_of(tmp_path / "one", seed=1), results_of(tmp_path / "other", seed=2, tasks=("tstory",))
    lines = list(comparison(one, other))
    assert len(lines) == 3
    assert lines[1].startswith("tstory: acc: ttt ")
    assert lines[2] == "sstory: no result in one of them"
    null = results_of(tmp_path / "null", seed=2)
    edit_results(null, lambda content: content["results"].update(sstory=None))
    assert [line.replace(str(null), str(other)) for line in comparison(one, null)] == lines
    third = results_of(tmp_path / "third", seed=3, tasks=("sstory",))
    with pytest.raises(UsageError, match="have no task in common; evaluate the same tasks"):
        list(comparison(other, third))


def test_arms_of_which_none_is_in_both_are_named(tmp_path: Path) -> None:
    one, other = results_of(tmp_path / "one", seed=1), results_of(tmp_path / "other", seed=2)

    def reset_alone(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["arms"] = {"reset": row["arms"]["ttt"]}

    edit_rows(other, "tstory", reset_alone)
    line = list(comparison(one, other))[1]
    assert line.startswith("tstory: no arm in common: ")
    assert line.endswith(" in the first, reset in the second")
    edit_rows(one, "tstory", lambda rows: [row.update(arms={}, error="EOFError: broken") for row in rows])
    assert list(comparison(one, other))[1].startswith("tstory: no item that both could measure")


def test_a_row_with_an_error_counts_in_nothing(tmp_path: Path) -> None:
    one, other = results_of(tmp_path / "one", seed=1), results_of(tmp_path / "other", seed=2)
    edit_rows(other, "tstory", lambda rows: rows[3].update(arms={}, files={}, error="EOFError: broken"))
    assert list(comparison(one, other))[1].endswith("; 19 units; without items that failed: 1")


def test_other_options_and_other_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = results_of(tmp_path / "one", seed=1), results_of(tmp_path / "other", seed=2, normalise="sum")
    edit_rows(other, "tstory", lambda rows: rows[3]["files"].update({"3.wav": "sha of another"}))
    edit_results(other, lambda content: content["made_from"]["reader"].update(codec="another"))
    assert main(["eval", "--compare", str(one), str(other)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {one}, {other}: 5 things differ, so that they cannot be compared:",
        '  tstory: eval.score.normalise is "mean" in the first, "sum" in the second',
        '  tstory: reader.codec is "mimi" in the first, "another" in the second',
        "  tstory: the data differ: 1 item (3) had other content",
        '  sstory: eval.score.normalise is "mean" in the first, "sum" in the second',
        '  sstory: reader.codec is "mimi" in the first, "another" in the second',
    ]


def test_the_same_data_elsewhere_are_the_same(tmp_path: Path) -> None:
    one, other = results_of(tmp_path / "one", seed=1), results_of(tmp_path / "other", seed=2)
    expected = list(comparison(one, other))

    def move(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["files"] = {f"/elsewhere/{file}": digest for file, digest in row["files"].items()}

    for task in TASKS:
        edit_rows(other, task, move)
    assert list(comparison(one, other)) == expected


BROKEN: dict[str, tuple[Callable[[Path], object], type[TTTError], str]] = {
    "no results": (lambda f: (f / "results.json").unlink(), EnvironmentProblem, "F: holds no results (results.json)"),
    "damage": (
        lambda f: (f / "results.json").write_text((f / "results.json").read_text().replace("mimi", "mine")),
        EnvironmentProblem,
        "F/results.json: damaged: its checksum",
    ),
    "another's": (
        lambda f: (f / "results.json").write_text('{"epochs": 3}'),
        EnvironmentProblem,
        "F/results.json: has no 'results'; it is no result of `ttt eval`",
    ),
    "no rows": (lambda f: rows_file(f, "tstory").unlink(), EnvironmentProblem, "F/samples/tstory.jsonl: no such file"),
    "a torn row": (
        lambda f: rows_file(f, "tstory").write_bytes(rows_file(f, "tstory").read_bytes()[:-9]),
        EnvironmentProblem,
        "F/samples/tstory.jsonl:20: ",
    ),
    "too few rows": (
        lambda f: edit_rows(f, "tstory", lambda rows: rows.pop()),
        EnvironmentProblem,
        "F/results.json: is of 20 items of tstory, but 19 have rows in samples/; finish the evaluation with --resume",
    ),
    "a row without": (
        lambda f: edit_rows(f, "tstory", lambda rows: rows[4].pop("unit")),
        EnvironmentProblem,
        "F/samples/tstory.jsonl:5: is no row of `ttt eval`: 'unit'",
    ),
    "numbers without": (
        lambda f: edit_rows(f, "tstory", lambda rows: rows[4]["arms"]["ttt"].pop("correct.weighted.mean")),
        PluginError,
        "F/samples/tstory.jsonl:5: the task tstory makes nothing of it: ",
    ),
    "no task": (
        lambda f: edit_results(f, lambda c: c["results"].update(gone={}) or c["n-samples"].update(gone={})),
        EnvironmentProblem,
        "F/results.json: the task gone is not installed; write one of those installed",
    ),
    "a config of old": (
        lambda f: edit_results(f, lambda c: c["config"]["eval"].update(no_such_key=1)),
        EnvironmentProblem,
        "F/results.json: its config is of another version of moshi: eval.no_such_key: Extra inputs",
    ),
    "options of old": (
        lambda f: edit_results(f, lambda c: c["configs"]["tstory"].update(no_such_key=1)),
        EnvironmentProblem,
        "F/results.json: the options of tstory are of another version: no_such_key: Extra inputs",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path: Path, name: str) -> None:
    folder = results_of(tmp_path / "F", seed=1)
    assert len(list(comparison(folder, folder))) == 4
    broken, kind, told = BROKEN[name]
    broken(folder)
    with pytest.raises(TTTError) as caught:
        list(comparison(folder, folder))
    assert type(caught.value) is kind
    assert str(caught.value).replace(str(tmp_path) + "/", "").startswith(told)
    assert "\n" not in str(caught.value)
