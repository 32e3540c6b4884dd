"""What the rows of a task amount to, and `results.json`: the shape that lm-evaluation-harness writes.

`results[task]["acc,none"]` is the outcome as trained, `"acc_stderr,none"` its standard error; the other arms stand
where that program has the names of filters: `"acc,closed"`, `"acc,reset"`, and `"acc,ttt-closed"` for the paired
difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttt.eval.items import Row
from ttt.eval.statistics import MCNEMAR_BELOW, Estimate, McNemar, average, estimate, mcnemar, paired_difference
from ttt.eval.tasks import ItemTask, Setup

TRAINED = "none"
"""The arm `ttt`, as lm-evaluation-harness calls results without a filter."""


@dataclass(frozen=True)
class TaskSummary:
    """What the items of a task amount to."""

    task: str
    metrics: Mapping[str, Mapping[str, Estimate]]
    """By metric, then by arm, or by two arms for their paired difference: `ttt-closed`."""
    parts: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """The first metric of the items with a tag, by `tag=value`, then by arm."""
    tests: Mapping[str, McNemar] = field(default_factory=dict)
    """McNemar's test of the first metric by two arms, if its outcomes are wins and losses of few units."""
    references: Mapping[str, Estimate] = field(default_factory=dict)
    """The first metric without a model, as by the length of clips alone."""
    items: int = 0
    """How many the task has."""
    failed: int = 0
    """How many of them could not be measured and count in nothing."""
    first_error: str | None = None
    """The first of them, and why: `ITEM: …`."""

    @property
    def has_result(self) -> bool:
        """Whether any item was measured; a task without metrics, as one that makes samples, has a result too."""
        return self.items > self.failed

    @property
    def main(self) -> str | None:
        """The first metric; None if nothing was measured, or the task has no metric."""
        return next(iter(self.metrics), None)

    def as_metrics(self) -> dict[str, float]:
        """The numbers of a run's evaluation: each metric that is no variant, its error, and with gates closed."""
        numbers: dict[str, float] = {}
        for metric, by_arm in self.metrics.items():
            if "/" in metric:
                continue
            for arm, found in by_arm.items():
                suffix = "" if arm == "ttt" else f"_{arm}"
                numbers[f"{metric}{suffix}"] = found.mean
                if found.stderr is not None:
                    numbers[f"{metric}_stderr{suffix}"] = found.stderr
        return numbers


@dataclass(frozen=True)
class MeasuredTask:
    """A task as it was measured."""

    task: ItemTask
    setup: Setup
    arms: tuple[str, ...]
    rows: tuple[Row, ...]
    """Of the items that did not fail."""
    summary: TaskSummary


def summed_up(
    task: ItemTask,
    setup: Setup,
    rows: Sequence[Row],
    arms: Sequence[str],
    references: Mapping[str, Sequence[float]] | None = None,
) -> TaskSummary:
    """The estimates of a task from its rows, those that failed left out.

    Args:
        task: the task.
        setup: its options.
        rows: of all items.
        arms: which were measured.
        references: from `ItemTask.references`, of the rows that did not fail.
    """
    good = [row for row in rows if row.error is None]
    failed = [row for row in rows if row.error is not None]
    first_error = f"{failed[0].item.id}: {failed[0].error}" if failed else None
    if not good:
        return TaskSummary(task.name, {}, items=len(rows), failed=len(failed), first_error=first_error)
    values = {arm: [dict(task.values(setup, row.item, row.arms[arm])) for row in good] for arm in arms}
    names = list(values[arms[0]][0])
    if not names:
        return TaskSummary(task.name, {}, items=len(rows), failed=len(failed), first_error=first_error)
    pairs = list(itertools.combinations(arms, 2))
    metrics: dict[str, dict[str, Estimate]] = {}
    for name in names:
        by_arm = {arm: [value[name] for value in values[arm]] for arm in arms}
        metrics[name] = _by_arm(by_arm, good, pairs)
    main = {arm: [value[names[0]] for value in values[arm]] for arm in arms}
    return TaskSummary(
        task.name,
        metrics,
        _parts(main, good, pairs),
        _tests(task, main, good, pairs),
        _by_arm(references or {}, good, ()),
        items=len(rows),
        failed=len(failed),
        first_error=first_error,
    )


def _by_arm(
    values: Mapping[str, Sequence[float]], rows: Sequence[Row], pairs: Sequence[tuple[str, str]]
) -> dict[str, Estimate]:
    units, clusters = [row.item.unit for row in rows], [row.item.cluster for row in rows]
    found = {arm: estimate(numbers, units, clusters) for arm, numbers in values.items()}
    for one, other in pairs:
        found[f"{one}-{other}"] = paired_difference(values[one], values[other], units, clusters)
    return found


def _parts(
    values: Mapping[str, Sequence[float]], rows: Sequence[Row], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, Estimate]]:
    found = {}
    for tag, value in sorted({pair for row in rows for pair in row.item.tags.items()}):
        places = [place for place, row in enumerate(rows) if row.item.tags.get(tag) == value]
        chosen = {arm: [numbers[place] for place in places] for arm, numbers in values.items()}
        found[f"{tag}={value}"] = _by_arm(chosen, [rows[place] for place in places], pairs)
    return found


def _tests(
    task: ItemTask, values: Mapping[str, Sequence[float]], rows: Sequence[Row], pairs: Sequence[tuple[str, str]]
) -> dict[str, McNemar]:
    clusters = [row.item.cluster for row in rows]
    if task.chance is None or len(set(clusters)) >= MCNEMAR_BELOW:
        return {}
    return {f"{one}-{other}": mcnemar(values[one], values[other], clusters) for one, other in pairs}


def averaged(summaries: Mapping[str, TaskSummary | None]) -> dict[str, Estimate]:
    """The average of the tasks whose outcome is `acc`, by arm; empty if one has no result, or there are not two."""
    if len(summaries) < 2 or any(summary is None or not summary.has_result for summary in summaries.values()):
        return {}
    tables = [summary.metrics["acc"] for summary in summaries.values() if summary and "acc" in summary.metrics]
    if len(tables) < 2:
        return {}
    found = {arm: average([table.get(arm) for table in tables]) for arm in tables[0]}
    return {arm: one for arm, one in found.items() if one is not None}


def filter_name(arm: str) -> str:
    """What stands after the comma of a result's name."""
    return TRAINED if arm == "ttt" else arm


def as_results(
    summaries: Mapping[str, TaskSummary | None], *, versions: Mapping[str, Any], described: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        summaries: by task; None for a task that has no result.
        versions: of each task.
        described: the other entries: `config`, `configs` and what the numbers were made from.
    """
    mean = averaged(summaries)
    return {
        "results": {name: _told(summary) for name, summary in summaries.items()},
        "groups": {"average": _numbers({"acc": mean})} if mean else {"average": None},
        "parts": {name: _numbers(summary.parts) for name, summary in summaries.items() if summary and summary.parts},
        "references": {
            name: _numbers({summary.main: summary.references})
            for name, summary in summaries.items()
            if summary and summary.main is not None and summary.references
        },
        "tests": {name: _tests_told(summary) for name, summary in summaries.items() if summary and summary.tests},
        "n-samples": {name: _samples(summary) for name, summary in summaries.items()},
        "versions": dict(versions),
        **described,
    }


def _told(summary: TaskSummary | None) -> dict[str, Any] | None:
    if summary is None or not summary.has_result:
        return None
    return {"alias": summary.task, **_numbers(summary.metrics)}


def _numbers(metrics: Mapping[str, Mapping[str, Estimate]]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for metric, by_arm in metrics.items():
        for arm, found in by_arm.items():
            numbers[f"{metric},{filter_name(arm)}"] = found.mean
            numbers[f"{metric}_stderr,{filter_name(arm)}"] = found.stderr
    return numbers


def _samples(summary: TaskSummary | None) -> dict[str, int] | None:
    if summary is None:
        return None
    main = None if summary.main is None else next(iter(summary.metrics[summary.main].values()))
    counts = {"units": main.units, "clusters": main.clusters} if main is not None else {}
    return {"original": summary.items, "effective": summary.items - summary.failed, "failed": summary.failed, **counts}


def _tests_told(summary: TaskSummary) -> dict[str, Any]:
    return {
        arms: {"wins": test.wins, "losses": test.losses, "ties": test.ties, "p": test.p}
        for arms, test in summary.tests.items()
    }
