"""Writes what an evaluation amounts to: `results.json`, `summary.md`, pictures, and the tasks' own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ttt.eval.folder import RESULTS, SUMMARY, EvalFolder
from ttt.eval.items import Item, Row
from ttt.eval.report import summary_text
from ttt.eval.results import TaskSummary, as_results
from ttt.eval.tasks import ItemTask, Setup
from ttt.files import write_json, write_text, writing


class Measurement(Protocol):
    """A task as it was measured."""

    @property
    def task(self) -> ItemTask:
        """The task."""
        ...

    @property
    def setup(self) -> Setup:
        """Its options."""
        ...

    @property
    def items(self) -> tuple[Item, ...]:
        """Its items."""
        ...

    @property
    def arms(self) -> tuple[str, ...]:
        """Under which arms."""
        ...


def write_results(
    folder: EvalFolder,
    summaries: Mapping[str, TaskSummary],
    plans: Mapping[str, Measurement],
    *,
    described: Mapping[str, Any],
) -> list[Path]:
    """Write everything; returns the files, the results first.

    Raises:
        EnvironmentProblem: the disk is full, or the folder cannot be written.
    """
    configs = {name: plan.setup.options.model_dump(mode="json") for name, plan in plans.items()}
    results = as_results(
        summaries,
        versions={name: plan.task.version for name, plan in plans.items()},
        described={"configs": configs, "higher_is_better": _directions(summaries, plans), **described},
    )
    write_json(folder.path / RESULTS, results)
    write_text(folder.path / SUMMARY, summary_text(summaries, plans, described))
    written = [folder.path / RESULTS, folder.path / SUMMARY]
    for name, plan in plans.items():
        found = folder.rows(name, plan.items)
        rows = [found[item.id] for item in plan.items if item.id in found]
        written += _of_task(folder, plan, rows)
    return written


def _directions(summaries: Mapping[str, TaskSummary], plans: Mapping[str, Measurement]) -> dict[str, dict[str, bool]]:
    """For each metric of a task whether a larger number is better, as lm-evaluation-harness has it."""
    return {
        name: dict.fromkeys(summary.metrics, plans[name].task.higher_is_better) for name, summary in summaries.items()
    }


def _of_task(folder: EvalFolder, plan: Measurement, rows: list[Row]) -> list[Path]:
    """A task's own texts and pictures."""
    if not rows:
        return []
    written = []
    for name, text in plan.task.texts(plan.setup, rows).items():
        file = folder.path / name
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
        written.append(file)
    written += plan.task.files(plan.setup, rows, folder.path)
    for name, figure in plan.task.figures(plan.setup, rows, folder.arrays(plan.task.name)).items():
        written.append(_picture(folder.path / name, figure))
    return written


def _picture(file: Path, figure: Any) -> Path:
    import io

    from ttt.files import write_bytes

    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(file, content.getvalue())
    return file
