"""What was measured of a run, as lines for its model card. Nothing is shown that was not measured of this adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ttt.adapter_file import AdapterInfo
from ttt.checkpoint_folder import CHECKPOINTS, TRAINER_STATE
from ttt.eval.folder import RESULTS
from ttt.files import read_json
from ttt.printable import printable

SUMMARY = "summary.json"
_ARMS = {"none": "ttt", "closed": "closed", "reset": "reset"}
"""What `results.json` calls the arms, and what they are called here."""


def figures(info: AdapterInfo) -> list[str]:
    """The figures of an adapter: those of its run, and its evaluations.

    Raises:
        EnvironmentProblem: a file of them is damaged.
    """
    return [*_of_training(info), *_of_evaluations(info)]


def _run_of(info: AdapterInfo) -> Path | None:
    """The run whose checkpoint an adapter is; None if it is none."""
    folder = info.path.absolute().parent
    in_a_run = folder.parent.name == CHECKPOINTS and (folder / TRAINER_STATE).is_file()
    return folder.parent.parent if in_a_run else None


def _of_training(info: AdapterInfo) -> list[str]:
    run = _run_of(info)
    if run is None or not (run / SUMMARY).is_file():
        return []
    summary = read_json(run / SUMMARY, sealed=True)
    if summary.get("steps") != info.training.get("steps"):  # of another checkpoint
        return []
    told = [
        ("optimiser steps", summary.get("steps")),
        ("tokens", summary.get("tokens")),
        ("outer loss", summary.get("eval_loss")),
        ("outer loss, gates closed", summary.get("eval_loss_gates_closed")),
        ("windows that was measured on", _windows(summary)),
    ]
    lines = [f"| {name} | {_shown(value)} |" for name, value in told if value is not None]
    return ["## Training", "", "| | |", "|---|---|", *lines, ""]


def _windows(summary: Mapping[str, Any]) -> str | None:
    count, split = summary.get("eval_windows"), summary.get("eval_split")
    held_out = "held out" if split == "eval" else "of the training data"
    return None if count is None else f"{count} {held_out}"


def _of_evaluations(info: AdapterInfo) -> list[str]:
    lines: list[str] = []
    for file in _result_files(info):
        results = read_json(file, sealed=True)
        if info.checksum is not None and (results.get("adapter") or {}).get("checksum") == info.checksum:
            lines += _table(results)
    return lines and ["## Evaluation", "", *lines, *_LEGEND]


_LEGEND = (
    "± is one standard error, clustered by what is not independent. `ttt` is the model as trained; `closed` the same "
    "with its gates closed, which is the plain backbone; `reset` starts fast weights anew every now and then; a "
    "difference is paired, item by item. ↓: less is better.",
    "",
)


def _result_files(info: AdapterInfo) -> Iterator[Path]:
    """Where `ttt eval` writes: in the run's folder `eval`, or beside the adapter."""
    run = _run_of(info)
    folder = info.path.parent
    places = [folder / "eval"] if run is None else [run / "eval" / folder.name, folder / "eval"]
    yield from (place / RESULTS for place in places if (place / RESULTS).is_file())


def _table(results: Mapping[str, Any]) -> list[str]:
    """A table with a line for each metric of each task, a column for each arm and difference."""
    found = {name: numbers for name, numbers in results.get("results", {}).items() if isinstance(numbers, Mapping)}
    rows = {(task, metric): _by_arm(numbers, metric) for task, numbers in found.items() for metric in _metrics(numbers)}
    columns = list(dict.fromkeys(arm for arms in rows.values() for arm in arms))
    if not columns:
        return []
    lines = [
        f"| task | {' | '.join(_ARMS.get(arm, arm) for arm in columns)} | units |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for (task, metric), arms in rows.items():
        units = (results.get("n-samples", {}).get(task) or {}).get("units", "")
        more = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
        cells = " | ".join(arms.get(arm, "–") for arm in columns)
        lines.append(f"| {_cell(task)} ({_cell(metric)}{'' if more else ' ↓'}) | {cells} | {_cell(units)} |")
    notices = [f"- {_cell(notice)}" for notice in results.get("notices", {})]
    return [*lines, "", *notices, *([""] if notices else [])]


def _metrics(numbers: Mapping[str, Any]) -> list[str]:
    """The metrics of a task; variants, as of single layers, are left out."""
    names = (key.partition(",")[0] for key in numbers if "," in key)
    return [name for name in dict.fromkeys(names) if "/" not in name and not name.endswith("_stderr")]


def _by_arm(numbers: Mapping[str, Any], metric: str) -> dict[str, str]:
    told = {}
    for key, value in numbers.items():
        name, _, arm = key.partition(",")
        if name == metric and isinstance(value, (int, float)):
            error = numbers.get(f"{metric}_stderr,{arm}")
            told[arm] = f"{value:.4g} ± {f'{error:.2g}' if isinstance(error, (int, float)) else '?'}"
    return told


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else _cell(value)


def _cell(value: Any) -> str:
    """Text from a file, safe inside a table of Markdown."""
    return printable(str(value)).replace("|", "\\|").replace("<", "&lt;")
