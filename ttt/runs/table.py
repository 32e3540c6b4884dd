"""The table of several runs: its columns, its rows, their order, and what in it cannot be compared."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ttt.errors import EnvironmentProblem, UsageError
from ttt.runs.differing import ABSENT, differing
from ttt.runs.finding import LeftOut, run_folders
from ttt.runs.run import Run, read_run
from ttt.words import first_few

_HEADS = {
    "eval_loss_ema": "averaged",
    "eval_loss_gates_closed": "closed",
    "eval_gain": "gain",
    "learned_parameters": "learned",
    "tokens_per_second": "tokens/s",
    "seconds": "time",
}
"""Names in a narrow table. `closed` is the plain backbone."""
_ALWAYS_BESIDE = {"max_steps", "eval_split", "eval_windows", "evaluated", "device", "peak_memory_bytes"}
"""Not in the narrow table."""
_IN_NARROW = {
    *("steps", "loss", "eval_loss", "eval_loss_ema", "eval_loss_gates_closed", "eval_gain", "gate", "movement"),
    *("learned_parameters", "tokens", "seconds", "tokens_per_second"),
}
_SAME_DATA = ("eval_split", "eval_windows")
_NAMED = 4


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    key: str
    """Its name in CSV and for `--sort`."""
    head: str
    """Its name in a narrow table."""
    values: Sequence[Any]
    """By run; `ABSENT` where there is none, None for a number that is not finite or a config's null."""
    is_config: bool = False
    main: bool = True
    """Whether it is in the narrow table too."""


@dataclass(frozen=True)
class Table:
    """Several runs, a row each."""

    runs: Sequence[Run]
    columns: Sequence[Column]
    left_out: Sequence[LeftOut]
    notes: Sequence[str]
    """What a reader of the numbers has to know."""

    def column(self, key: str) -> Column:
        """The column of a name, or of its last word if only one has it.

        Raises:
            UsageError: there is none, or several.
        """
        found = [column for column in self.columns if column.key == key]
        found = found or [column for column in self.columns if key in (column.head, _last(column.key))]
        if len(found) != 1:
            what = "names several columns" if found else "is no column"
            names = first_few([column.key for column in found or self.columns], 30)
            raise UsageError(f"--sort: {key} {what} of this table; it has {names}")
        return found[0]

    def sorted_by(self, key: str, *, reverse: bool = False) -> Table:
        """The same table in the order of a column: numbers before texts, and what is not finite or not there last.

        Raises:
            UsageError: as for `column`.
        """
        values = self.column(key).values
        known = [place for place, value in enumerate(values) if _is_known(value)]
        rest = [place for place, value in enumerate(values) if not _is_known(value)]
        known.sort(key=lambda place: sorting_key(values[place]), reverse=reverse)
        rest.sort(key=lambda place: values[place] is ABSENT)
        return self._in_order([*known, *rest])

    def reversed(self) -> Table:
        """The same table, the last run first."""
        return self._in_order(list(reversed(range(len(self.runs)))))

    def _in_order(self, places: Sequence[int]) -> Table:
        columns = [replace(column, values=[column.values[place] for place in places]) for column in self.columns]
        return replace(self, runs=[self.runs[place] for place in places], columns=columns)


def table_of(folder: Path, *, tell: Callable[[int], None] = lambda count: None) -> Table:
    """The table of the runs at or below a folder, in the order of their names.

    Args:
        folder: of runs, or a run's own.
        tell: called with the number of runs read so far.

    Raises:
        UsageError: it is no folder.
        EnvironmentProblem: it cannot be read, or holds no run.
    """
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for found in run_folders(folder):
        read = found if isinstance(found, LeftOut) else read_run(found, _name(found, folder))
        if isinstance(read, Run):
            runs.append(read)
            tell(len(runs))
        else:
            left_out.append(read)
    if not runs:
        why = f" ({first_few([str(each) for each in left_out], _NAMED, separator='; ')})" if left_out else ""
        raise EnvironmentProblem(f"{folder}: holds no run that `ttt train` has begun{why}; name a folder of runs")
    runs.sort(key=lambda run: sorting_key(run.name))
    return Table(runs, columns_of(runs), left_out, _notes(runs))


def _name(run: Path, folder: Path) -> str:
    return run.resolve().name or str(run) if run == folder else run.relative_to(folder).as_posix()


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """The columns: which run and how it stands, the keys that differ, the numbers."""
    keys = differing([run.config for run in runs])
    heads = _short(list(keys))
    numbers = [
        Column(key, _HEADS.get(key, key), [run.numbers.get(key, ABSENT) for run in runs], main=_is_main(key, runs))
        for key in _in_one_order([list(run.numbers) for run in runs])
    ]
    return [
        Column("run", "run", [run.name for run in runs]),
        Column("state", "state", [run.state for run in runs]),
        *(Column(key, heads[key], values, is_config=True) for key, values in keys.items()),
        *numbers,
    ]


def _is_main(key: str, runs: Sequence[Run]) -> bool:
    """Whether a number is in the narrow table: of tasks only the first metric, as trained and with gates closed."""
    if key in _ALWAYS_BESIDE:
        return False
    if key.startswith("results.") or "/" in key:
        return _is_first_metric(key, runs)
    return key in _IN_NARROW


def _is_first_metric(key: str, runs: Sequence[Run]) -> bool:
    task = _task(key)
    first = next((other for run in runs for other in run.numbers if _task(other) == task and other != "results"), key)
    return key in (first, f"{first}_closed")


def _task(key: str) -> str:
    """Whose number it is: `results.swuggy` of `results.swuggy.acc`, `recall/` of `recall/acc`."""
    if key.startswith("results."):
        return key.rpartition(".")[0]
    task, slash, _ = key.partition("/")
    return f"{task}{slash}" if slash else ""


def _in_one_order(orders: Sequence[Sequence[str]]) -> list[str]:
    """All names of several lists, each after those that stand before it in its own list."""
    found: list[str] = []
    for order in orders:
        at = 0
        for name in order:
            if name in found:
                at = found.index(name) + 1
            else:
                found.insert(at, name)
                at += 1
    return found


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key; the whole key where two have the same, or a number's column has it."""
    words = ["backbone" if key == "backbone.name" else _last(key) for key in keys]
    return {
        key: word if words.count(word) == 1 and word not in _IN_NARROW else key
        for key, word in zip(keys, words, strict=True)
    }


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _is_known(value: Any) -> bool:
    return value is not ABSENT and value is not None and not (isinstance(value, float) and not math.isfinite(value))


def sorting_key(value: Any) -> tuple[int, float, list[tuple[int, int, str]]]:
    """Numbers by value, then texts, the numbers in them by value: `run-2` before `run-10`."""
    if isinstance(value, (int, float)):
        return 0, float(value), []
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+|[0-9]+", str(value).casefold())
    return 1, 0.0, [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]


def _notes(runs: Sequence[Run]) -> list[str]:
    """What went wrong with runs, and which numbers are not of the same measurement."""
    own = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return [*_of_other_data(runs), *_of_other_conditions(runs), *own]


def _of_other_data(runs: Sequence[Run]) -> list[str]:
    found: dict[tuple[Any, ...], list[str]] = {}
    for run in runs:
        if "eval_loss" in run.numbers:
            found.setdefault(tuple(run.numbers.get(key) for key in _SAME_DATA), []).append(run.name)
    if len(found) < 2:
        return []
    told = [f"{windows} {_of_split(split)} in {first_few(names)}" for (split, windows), names in found.items()]
    return [f"eval_loss is not of the same windows: {first_few(told, _NAMED, separator='; ')}"]


def _of_split(split: Any) -> str:
    return "held-out windows" if split == "eval" else "training windows"


def _of_other_conditions(runs: Sequence[Run]) -> list[str]:
    """A note for each task whose results are not of the same measurement in all runs."""
    tasks: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for run in runs:
        for task, conditions in run.results.conditions.items():
            tasks.setdefault(task, []).append((run.name, conditions))
    notes = []
    for task, measured in tasks.items():
        keys = dict.fromkeys(key for _, conditions in measured for key in conditions)
        different = [key for key in keys if len({str(conditions.get(key)) for _, conditions in measured}) > 1]
        if different:
            told = "; ".join(f"{key} {_by_value(key, measured)}" for key in different[:_NAMED])
            notes.append(f"results.{task} are not of the same measurement: {told}")
    return notes


def _by_value(key: str, measured: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    found: dict[str, list[str]] = {}
    for name, conditions in measured:
        found.setdefault(str(conditions.get(key)), []).append(name)
    return ", ".join(f"{value} in {first_few(names, 2)}" for value, names in found.items())
