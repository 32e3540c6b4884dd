"""Writes what an evaluation amounts to: `results.json`, `summary.md`, pictures, and the tasks' own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt.drawing import png
from ttt.eval.folder import RESULTS, SUMMARY, EvalFolder
from ttt.eval.pictures import outcome_figure
from ttt.eval.report import summary_text
from ttt.eval.results import MeasuredTask, as_results
from ttt.files import write_bytes, write_json, write_text, writing

OUTCOMES = "outcomes.png"

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_results(folder: EvalFolder, measured: Sequence[MeasuredTask], *, described: Mapping[str, Any]) -> list[Path]:
    """Write everything; returns the files, the results first.

    Args:
        folder: where to.
        measured: the tasks.
        described: what the numbers are of: `config`, `adapter`, `device` and more.

    Raises:
        EnvironmentProblem: the disk is full, or the folder cannot be written.
    """
    summaries = {each.task.name: each.summary for each in measured}
    results = as_results(
        summaries,
        versions={each.task.name: each.task.version for each in measured},
        described={
            "configs": {each.task.name: each.setup.options.model_dump(mode="json") for each in measured},
            "higher_is_better": {
                each.task.name: dict.fromkeys(each.summary.metrics, each.task.higher_is_better) for each in measured
            },
            **described,
        },
    )
    write_json(folder.path / RESULTS, results)
    write_text(folder.path / SUMMARY, summary_text(measured, described))
    written = [folder.path / RESULTS, folder.path / SUMMARY]
    outcomes = outcome_figure(summaries, {each.task.name: each.task.chance for each in measured})
    if outcomes is not None:
        written.append(_picture(folder.path / OUTCOMES, outcomes))
    for each in measured:
        written += _of_task(folder, each)
    folder.wrote(written)
    for each in measured:  # what people fill in, such as ratings, is never taken away with results
        written += each.task.files(each.setup, each.rows, folder.path) if each.rows else ()
    return written


def _of_task(folder: EvalFolder, each: MeasuredTask) -> list[Path]:
    """A task's own texts and pictures."""
    if not each.rows:
        return []
    written = []
    for name, text in each.task.texts(each.setup, each.rows).items():
        file = folder.path / name
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
        written.append(file)
    for name, figure in each.task.figures(each.setup, each.rows, folder.arrays(each.task.name)).items():
        written.append(_picture(folder.path / name, figure))
    return written


def _picture(file: Path, figure: Figure) -> Path:
    write_bytes(file, png(figure))
    return file
