"""What `ttt eval` found of a run, from the `results.json` of its newest checkpoint that was evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttt.errors import EnvironmentProblem
from ttt.eval.folder import RESULTS
from ttt.eval.results import TRAINED
from ttt.files import read_json
from ttt.runs.metrics_ends import number

EVAL = "eval"
"""A run's folder of evaluations; each has a folder of its own, named after its checkpoint."""


@dataclass(frozen=True)
class Evaluated:
    """The results of an evaluation."""

    of: str = ""
    """The folder's name, which is the checkpoint's unless the user named another."""
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    """By `results.TASK.METRIC`, with `_closed` and the like for other arms and `_stderr` before it for errors."""
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By task, what decides whether two runs' numbers are of the same measurement: options, version, items."""


def evaluated(run: Path) -> tuple[Evaluated, list[str]]:
    """The newest results of a run, and a sentence about each that cannot be read."""
    problems: list[str] = []
    for file in sorted(run.glob(f"{EVAL}/*/{RESULTS}"), key=_age, reverse=True):
        try:
            content = read_json(file, sealed=True)
        except EnvironmentProblem as problem:
            problems.append(str(problem))
            continue
        return Evaluated(file.parent.name, _numbers(content), _conditions(content)), problems
    return Evaluated(), problems


def _age(file: Path) -> tuple[int, str]:
    """Orders results by the step of their checkpoint, those in folders of other names before all of them."""
    name = file.parent.name
    step = name.removeprefix("step_")
    return (int(step) if step != name and step.isascii() and step.isdigit() else -1), name


def _numbers(content: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for task, results in _mapping(content.get("results")).items():
        for name, value in _mapping(results).items():
            metric, comma, arm = name.rpartition(",")
            if comma and (value is None or number(value) is not None):
                ending = "" if arm == TRAINED else f"_{arm}"
                found[f"results.{task}.{metric}{ending}"] = number(value)
    return found


def _conditions(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    configs, versions, samples = (_mapping(content.get(key)) for key in ("configs", "versions", "n-samples"))
    found = {}
    for task in _mapping(content.get("results")):
        options, counts = _mapping(configs.get(task)), _mapping(samples.get(task))
        found[task] = {**options, "version": versions.get(task), "items": counts.get("original")}
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
