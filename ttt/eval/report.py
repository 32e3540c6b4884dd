"""`summary.md`: the table that one pastes into a paper, with the conditions under which it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ttt.eval.results import MeasuredTask, TaskSummary, averaged
from ttt.eval.statistics import Estimate


def summary_text(measured: Sequence[MeasuredTask], described: Mapping[str, Any]) -> str:
    """The text of `summary.md`.

    Args:
        measured: the tasks.
        described: what the numbers are of.
    """
    arms = list(dict.fromkeys(arm for each in measured for arm in each.arms))
    columns = [*arms, *(f"{arms[0]}-{arm}" for arm in arms[1:])]
    lines = [
        "# Evaluation",
        "",
        f"| task | {' | '.join(columns)} | units | failed |",
        "|---" * (len(columns) + 3) + "|",
    ]
    lines += [_line(each, columns) for each in measured]
    mean = averaged({each.task.name: each.summary for each in measured})
    if mean:
        cells = [in_words(mean.get(column)) for column in columns]
        lines.append(f"| average (acc) | {' | '.join(cells)} | | |")
    return "\n".join([*lines, "", *_references(measured), *_conditions(measured, described), ""])


def _line(each: MeasuredTask, columns: Sequence[str]) -> str:
    """A task's line; an arrow stands where less is better."""
    summary, main = each.summary, each.summary.main
    units = summary.items - summary.failed if main is None else next(iter(summary.metrics[main].values())).units
    cells = " | ".join(_cell(summary, column) for column in columns)
    told = "" if main is None else f" ({main}{'' if each.task.higher_is_better else ' ↓'})"
    return f"| {summary.task}{told} | {cells} | {units} | {summary.failed} |"


def _references(measured: Sequence[MeasuredTask]) -> list[str]:
    """A table of what tasks score without a model."""
    found = {each.task.name: each.summary.references for each in measured if each.summary.references}
    names = list(dict.fromkeys(name for references in found.values() for name in references))
    if not names:
        return []
    head = [f"| without a model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines = [
        f"| {task} | {' | '.join(in_words(references.get(name)) for name in names)} |"
        for task, references in found.items()
    ]
    return [*head, *lines, ""]


def _cell(summary: TaskSummary, column: str) -> str:
    return in_words(None if summary.main is None else summary.metrics[summary.main].get(column))


def in_words(found: Estimate | None) -> str:
    """An estimate with its standard error, as `0.614 ± 0.021`; `–` if there is none."""
    if found is None:
        return "–"
    error = "?" if found.stderr is None else f"{found.stderr:.3f}"
    return f"{found.mean:.3f} ± {error}"


def _conditions(measured: Sequence[MeasuredTask], described: Mapping[str, Any]) -> list[str]:
    config = described["config"]
    adapter = described["adapter"]
    learned = "none: the model as training would start it" if adapter is None else adapter["path"]
    lines = [
        "± is one standard error, clustered by what is not independent. `ttt` is the model as trained; `closed` the "
        "same with its gates closed and LoRA off, which is the plain backbone; `reset` starts fast weights anew every "
        "now and then. A difference is paired, item by item. ↓: less is better.",
        "",
        f"- adapter: {config.get('adapter', 'ttt')}, {learned}",
        f"- backbone: {', '.join(f'{key} {value}' for key, value in config['backbone'].items() if value is not None)}",
        f"- score: {', '.join(f'{key} {value}' for key, value in config['eval']['score'].items())}",
        f"- device: {described['device']}, {config['train']['param_dtype']}",
    ]
    lines += [f"- data of {', '.join(names)}: {notice}" for notice, names in described["notices"].items()]
    for each in measured:
        options = each.setup.options.model_dump(mode="json")
        told = ", ".join(f"{key} {value}" for key, value in options.items() if key != "name" and value is not None)
        lines.append(f"- {each.task.name}: version {each.task.version}" + (f", {told}" if told else ""))
    return lines
