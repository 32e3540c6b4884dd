"""The evaluation tasks of a config: look them up, and check their options with the tasks' own models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from pydantic import create_model

from ttt.check.codes import REINSTALL, TTT103, TTT106, TTT605, TTT802, TTT803
from ttt.check.validation import Validated, validate
from ttt.config.findings import Code, Finding
from ttt.config.schema import RunConfig
from ttt.config.section import Section
from ttt.config.source import Source
from ttt.config.spelling import nearest
from ttt.config.tasks import TaskOptions
from ttt.errors import EnvironmentProblem, PluginError, TTTError
from ttt.plugins.asking import WAY_OUT, asked
from ttt.plugins.installed_tasks import InstalledTask, InstalledTasks, installed_tasks

_TASKS = ("eval", "tasks")


def resolve_tasks(result: Validated, source: Source) -> None:
    """Replace each entry of `eval.tasks` by its task's options, and add findings about what is wrong with them."""
    config = result.config
    if config is None or not config.eval.tasks:
        return
    installed = installed_tasks()
    resolved: list[TaskOptions] = []
    for number, entry in enumerate(config.eval.tasks):
        findings = list(_misnamed(config, number, installed))
        options: TaskOptions | None = None
        if not findings:
            options, findings = _options(number, entry, installed.by_name[entry.name], source)
        resolved.append(options or entry)
        result.findings += findings
        if findings:
            result.untrusted.add((*_TASKS, number))
    result.config = config.model_copy(update={"eval": config.eval.model_copy(update={"tasks": tuple(resolved)})})


def _finding(code: Code, number: int, message: str, fix: str, **more: Any) -> Finding:
    path = f"eval.tasks.{number}.name"
    return code.at(path, message, fix, **more)


def _misnamed(config: RunConfig, number: int, installed: InstalledTasks) -> Iterator[Finding]:
    """Findings about the name of a task."""
    name = config.eval.tasks[number].name
    if any(entry.name == name for entry in config.eval.tasks[:number]):
        message = f"the task `{name}` stands in `eval.tasks` already, and its numbers have one name each"
        yield _finding(TTT106, number, message, "leave one of them out", value=name)
    if name in installed.by_name:
        return
    close = nearest(name, installed.by_name)
    if close is None and installed.failures:
        for failure in installed.failures:
            code = TTT802 if failure.broken else TTT803
            yield _finding(code, number, failure.told, REINSTALL, value=name)
        return
    message = f"no installed plugin brings a task {name!r}"
    fix = f"write `{close}`" if close else installed.in_words()
    yield _finding(TTT103, number, message, fix, value=name, replacement=close)


def _options(
    number: int, entry: TaskOptions, found: InstalledTask, source: Source
) -> tuple[TaskOptions | None, list[Finding]]:
    """The options of a task, validated by its own model, and findings about them, each at its place."""
    section = f"eval.tasks.{number}"  # one word, so that findings about its keys have their whole path
    written = (*_TASKS, number)
    places = {
        (section, *path[len(written) :]): at for path, at in source.places.items() if path[: len(written)] == written
    }
    data = {section: {**entry.model_dump(), "name": entry.name}}
    try:
        with asked(found.plugin, f"the options of its task {entry.name}", found.task.options):
            fields: Any = {section: (found.task.options, ...)}
            model = create_model("Tasks", __base__=Section, **fields)
            checked = validate(cast("type[RunConfig]", model), data, Source(source.file, data, places))
    except TTTError as error:
        failed = isinstance(error, PluginError)
        code = TTT803 if failed else TTT605 if isinstance(error, EnvironmentProblem) else TTT106
        return None, [_finding(code, number, error.told, WAY_OUT if failed else error.fix, value=entry.name)]
    return getattr(checked.config, section, None), checked.findings
