"""Comparing two evaluations item by item, for `ttt eval --compare`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ttt.checksums import parse_line
from ttt.config.schema import RunConfig
from ttt.dotted import dotted
from ttt.errors import EnvironmentProblem, PluginError, TTTError, UsageError
from ttt.eval.compare import Compared, Evaluated, Outcome, average_difference, compared, refusals
from ttt.eval.folder import RESULTS, SAMPLES
from ttt.eval.items import Item
from ttt.eval.report import in_words
from ttt.eval.sources import is_there
from ttt.eval.statistics import Estimate
from ttt.eval.tasks import ItemTask, Setup
from ttt.files import read_json
from ttt.plugins import Backbone, get_backbone
from ttt.plugins.installed_tasks import installed_tasks
from ttt.plugins.run_config import run_config_model
from ttt.reading import read_file, unreadable
from ttt.words import first_line

_MOST_ROWS = 1 << 31  # bytes of a file of rows
_RESET = ("reset_sec", "reset_tokens")
_WHICH_DATA = ("name", "data", "limit", "seed")
_WAY_OUT = "evaluate again"


def comparison(one: Path, other: Path) -> Iterator[str]:
    """Lines that tell how two results differ.

    Args:
        one: the folder of an evaluation, or its `results.json`.
        other: another one; differences are this one minus the first.

    Raises:
        EnvironmentProblem: a result is missing or broken; or its backbone or a task is not installed.
        UsageError: they are of other data or other score options; the message says which.
    """
    first, second = _Results(one), _Results(other)
    names = list(dict.fromkeys((*first.tasks, *second.tasks)))
    shared = [name for name in names if all(each.tasks.get(name) is not None for each in (first, second))]
    if not shared:
        raise UsageError(f"{one}, {other}: have no task in common; evaluate the same tasks")
    pairs = {name: (first.evaluated(name), second.evaluated(name)) for name in shared}
    wrong = [f"{name}: {reason}" for name, pair in pairs.items() for reason in refusals(*pair)]
    if wrong:
        raise UsageError.about(wrong, "things differ, so that they cannot be compared", where=f"{one}, {other}")
    found = {name: compared(*pairs[name]) if name in pairs else None for name in names}
    yield f"{other} minus {one}, item by item, ± one standard error"
    if first.adapter != second.adapter:
        yield f"the arm ttt is the model as trained: adapter: {second.adapter} minus adapter: {first.adapter}"
    for name, task in found.items():
        yield f"{name}: {_nothing_in_common(pairs.get(name)) if task is None else _task_in_words(task)}"
    yield from _average(found)


def _nothing_in_common(pair: tuple[Evaluated, Evaluated] | None) -> str:
    """Why there is nothing to compare."""
    if pair is None:
        return "no result in one of them"
    arms = [sorted(each.arms) for each in pair]
    if not all(arms) or set(arms[0]) & set(arms[1]):
        return "no item that both could measure"
    return f"no arm in common: {', '.join(arms[0])} in the first, {', '.join(arms[1])} in the second"


def _task_in_words(task: Compared) -> str:
    told = [f"{arm} {_signed(found)}{_test(task, arm)}" for arm, found in task.arms.items()]
    units = next(iter(task.arms.values())).units
    failed = f"; without items that failed: {task.failed}" if task.failed else ""
    return f"{task.metric}: {', '.join(told)}; {units} units{failed}"


def _test(task: Compared, arm: str) -> str:
    test = task.tests.get(arm)
    return "" if test is None else f" ({test.wins} better, {test.losses} worse, McNemar p = {test.p:.2g})"


def _average(found: Mapping[str, Compared | None]) -> Iterator[str]:
    """A line for the average, if every task has a result."""
    arms = next((list(task.arms) for task in found.values() if task is not None), [])
    tasks = list(found.values())
    told = [(arm, average_difference(tasks, arm)) for arm in arms]
    parts = [f"{arm} {_signed(mean)}" for arm, mean in told if mean is not None]
    if parts:
        yield f"average (acc): {', '.join(parts)}"


def _signed(found: Estimate) -> str:
    return f"{'+' if found.mean >= 0 else ''}{in_words(found)}"


class _Results:
    """The results in a folder.

    Args:
        path: the folder, or its `results.json`.

    Raises:
        EnvironmentProblem: it holds none.
    """

    def __init__(self, path: Path) -> None:
        self._file = _result_in(path)
        self._content = read_json(self._file, sealed=True)
        self.tasks = self._section("results", dict)
        self._config, self._backbone = self._its_config()

    @property
    def adapter(self) -> str:
        """What was added to the backbone, as the config says it."""
        return self._config.adapter

    def _section(self, name: str, kind: type) -> Any:
        if not isinstance(self._content.get(name), kind):
            raise EnvironmentProblem(f"{self._file}: has no {name!r}; it is no result of `ttt eval`: name its folder")
        return self._content[name]

    def _its_config(self) -> tuple[RunConfig, Backbone]:
        written = self._section("config", dict)
        name = written.get("backbone", {}).get("name") if isinstance(written.get("backbone"), dict) else None
        backbone = get_backbone(str(name))
        try:
            return run_config_model(backbone).model_validate(written), backbone
        except ValidationError as error:
            raise EnvironmentProblem(
                f"{self._file}: its config is of another version of {name}: {_first_misfit(error)}; {_WAY_OUT}"
            ) from None

    def evaluated(self, name: str) -> Evaluated:
        """What it gave for a task."""
        task, setup = self._task(name)
        evaluation = setup.config.eval.model_dump(mode="json")
        reset = dotted({key: evaluation[key] for key in _RESET}, "eval.")
        rows = dict(self._rows(name, task, setup))
        self._require_all(name, len(rows))
        return Evaluated(self._conditions(name), rows, {"reset": reset})

    def _require_all(self, name: str, rows: int) -> None:
        """Refuse rows of an evaluation that was begun anew and did not end."""
        counts = self._of_task("n-samples", name)
        written = counts.get("original") if isinstance(counts, dict) else 0
        if written != rows:
            raise EnvironmentProblem(
                f"{self._file}: is of {written} items of {name}, but {rows} have rows in {SAMPLES}/; finish the "
                f"evaluation with --resume"
            )

    def _task(self, name: str) -> tuple[ItemTask, Setup]:
        installed = installed_tasks()
        task = installed.by_name[name].task if name in installed.by_name else None
        if not isinstance(task, ItemTask):
            raise EnvironmentProblem(f"{self._file}: the task {name} is not installed; {installed.in_words()}")
        try:
            options = task.options.model_validate(self._of_task("configs", name))
        except ValidationError as error:
            raise EnvironmentProblem(
                f"{self._file}: the options of {name} are of another version: {_first_misfit(error)}; {_WAY_OUT}"
            ) from None
        return task, Setup(self._config, self._backbone, options, task.folder)

    def _of_task(self, section: str, name: str) -> Any:
        content = self._section(section, dict)
        if name not in content:
            raise EnvironmentProblem(f"{self._file}: {section!r} lacks the task {name}; {_WAY_OUT}")
        return content[name]

    def _conditions(self, name: str) -> dict[str, Any]:
        """What decides what a task's numbers mean: not the model, and not which data, which rows tell."""
        options = {k: v for k, v in dict(self._of_task("configs", name)).items() if k not in _WHICH_DATA}
        made_from = self._content.get("made_from")
        reader = made_from.get("reader", {}) if isinstance(made_from, dict) else {}
        return {
            "version": self._of_task("versions", name),
            **dotted(options, "options."),
            **dotted(self._config.eval.score.model_dump(mode="json"), "eval.score."),
            **dotted(reader, "reader."),
        }

    def _rows(self, name: str, task: ItemTask, setup: Setup) -> Iterator[tuple[str, Outcome]]:
        for place, row in _lines(self._file.parent / SAMPLES / f"{name}.jsonl"):
            try:
                item = Item(row["item"], row["unit"], row["cluster"], row["tags"], tuple(map(Path, row["files"])))
                arms = {} if row["error"] is not None else dict(row["arms"])
                digests = tuple(row["files"].values())
            except (KeyError, TypeError, AttributeError) as error:
                raise EnvironmentProblem(f"{place}: is no row of `ttt eval`: {first_line(error)}; {_WAY_OUT}") from None
            try:
                values = {arm: dict(task.values(setup, item, numbers)) for arm, numbers in arms.items()}
            except TTTError:
                raise
            except Exception as error:  # of the task, or numbers of another version of it
                raise PluginError(f"{place}: the task {name} makes nothing of it: {first_line(error)}") from error
            yield item.id, Outcome(item.unit, item.cluster, digests, values)


def _result_in(path: Path) -> Path:
    """The file of results that a path means.

    Raises:
        EnvironmentProblem: there is none.
    """
    file = path / RESULTS if path.is_dir() else path
    if is_there(file):
        return file
    inside = sorted(path.glob(f"eval/*/{RESULTS}")) if path.is_dir() else []
    way_out = f"name {inside[-1].parent}" if inside else "name the folder that `ttt eval` wrote"
    raise EnvironmentProblem(f"{path}: holds no results ({RESULTS}) of an evaluation; {way_out}")


def _first_misfit(error: ValidationError) -> str:
    """The first thing that does not fit, as `eval.score: Field required`."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows in a file, each with its place."""
    try:
        lines = read_file(file, limit=_MOST_ROWS).splitlines()
    except FileNotFoundError:
        raise EnvironmentProblem(f"{file}: no such file; results are compared item by item: {_WAY_OUT}") from None
    except OSError as error:
        raise EnvironmentProblem(f"{file}: cannot be read: {unreadable(error)}") from None
    for number, line in enumerate(lines, 1):
        try:
            yield f"{file}:{number}", parse_line(line)
        except ValueError as error:
            raise EnvironmentProblem(f"{file}:{number}: {error}; {_WAY_OUT}") from None
