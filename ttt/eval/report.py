"""`summary.md`: the table that one pastes into a paper, with the conditions under which it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttt.eval.results import TaskSummary, averaged
from ttt.eval.statistics import Estimate


def summary_text(summaries: Mapping[str, TaskSummary], plans: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    """The text of `summary.md`.

    Args:
        summaries: by task.
        plans: the tasks as they were measured.
        described: what the numbers are of.
    """
    arms = list(dict.fromkeys(arm for plan in plans.values() for arm in plan.arms))
    differences = [f"{arms[0]}-{arm}" for arm in arms[1:]]
    columns = [*arms, *differences]
    lines = [
        "# Evaluation",
        "",
        f"| task | {' | '.join(columns)} | units | failed |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, summary in summaries.items():
        cells = [_cell(summary, column) for column in columns]
        main = summary.main
        units = next(iter(summary.metrics[main].values())).units if main is not None else summary.items - summary.failed
        lines.append(f"| {_named(name, main, plans[name])} | {' | '.join(cells)} | {units} | {summary.failed} |")
    mean = averaged(summaries)
    if mean:
        cells = [in_words(mean.get(column)) for column in columns]
        lines.append(f"| average (acc) | {' | '.join(cells)} | | |")
    lines += ["", *_conditions(plans, described), ""]
    return "\n".join(lines)


def _named(name: str, metric: str | None, plan: Any) -> str:
    """A task with its metric, and an arrow where less is better."""
    if metric is None:
        return name
    return f"{name} ({metric}{'' if plan.task.higher_is_better else ' ↓'})"


def _cell(summary: TaskSummary, column: str) -> str:
    return in_words(None if summary.main is None else summary.metrics[summary.main].get(column))


def in_words(found: Estimate | None) -> str:
    """An estimate with its standard error, as `0.614 ± 0.021`; `–` if there is none."""
    if found is None:
        return "–"
    error = "?" if found.stderr is None else f"{found.stderr:.3f}"
    return f"{found.mean:.3f} ± {error}"


def _conditions(plans: Mapping[str, Any], described: Mapping[str, Any]) -> list[str]:
    config = described["config"]
    adapter = described["adapter"]
    learned = "none: the model as training would start it" if adapter is None else adapter["path"]
    lines = [
        "± is one standard error, clustered by what is not independent. `ttt` is the model as trained; `closed` the "
        "same with its gates closed, which is the plain backbone; `reset` starts fast weights anew every now and then. "
        "A difference is paired, item by item. ↓: less is better.",
        "",
        f"- adapter: {learned}",
        f"- backbone: {', '.join(f'{key} {value}' for key, value in config['backbone'].items() if value is not None)}",
        f"- score: {', '.join(f'{key} {value}' for key, value in config['eval']['score'].items())}",
        f"- device: {described['device']}, {config['train']['param_dtype']}",
    ]
    for name, plan in plans.items():
        options = plan.setup.options.model_dump(mode="json")
        told = ", ".join(f"{key} {value}" for key, value in options.items() if key != "name" and value is not None)
        lines.append(f"- {name}: version {plan.task.version}" + (f", {told}" if told else ""))
    return lines
