"""The evaluation tasks that installed plugins bring, by name, and those that a config chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ttt.config.schema import RunConfig
from ttt.config.spelling import nearest
from ttt.errors import ConfigError, PluginError
from ttt.plugins.asking import asked
from ttt.plugins.eval_tasks import AnyEvalTask
from ttt.plugins.hookspecs import EVAL_TASKS
from ttt.plugins.origin import distribution_of, origin_of
from ttt.plugins.registry import Failure, Plugin, ask


@dataclass(frozen=True)
class InstalledTask:
    """A task and the plugin that brings it."""

    task: AnyEvalTask
    plugin: Plugin


@dataclass(frozen=True)
class InstalledTasks:
    """What all plugins bring."""

    by_name: Mapping[str, InstalledTask]
    failures: tuple[Failure, ...]
    """Plugins that are broken or failed, and names that more than one of them claims."""

    def in_words(self) -> str:
        """What to write instead of a task that is not there."""
        names = ", ".join(f"`{name}`" for name in sorted(self.by_name))
        return f"write one of those installed, {names}, or install its plugin" if names else "install its plugin"


@dataclass(frozen=True)
class ChosenTask:
    """A task that a config chooses."""

    task: AnyEvalTask
    plugin: Plugin
    options: Any
    """An instance of the task's options."""


def installed_tasks() -> InstalledTasks:
    """Every task of every plugin. If two plugins claim one name, neither gets it."""
    answers = ask(EVAL_TASKS)
    claims: dict[str, list[InstalledTask]] = {}
    for answer in answers.given:
        for task in answer.value:
            claims.setdefault(task.name, []).append(InstalledTask(task, answer.plugin))
    claimed = tuple(_claimed(name, found) for name, found in claims.items() if len(found) > 1)
    by_name = {name: found[0] for name, found in claims.items() if len(found) == 1}
    return InstalledTasks(by_name, (*answers.failures, *claimed))


def _claimed(name: str, found: list[InstalledTask]) -> Failure:
    points = [origin_of(each.plugin) for each in found]
    owners = tuple(sorted({distribution_of(point) for point in points if point is not None}))
    told = f"the task {name!r} is claimed more than once: {', '.join(owners)}; uninstall all but one"
    return Failure(name, True, told, claimed_by=owners)


def chosen_tasks(config: RunConfig) -> tuple[ChosenTask, ...]:
    """The tasks of `eval.tasks`, each with its options.

    Raises:
        ConfigError: no task has that name, or the options are not the task's.
        PluginError: no task has that name, but a plugin that may bring it is broken.
    """
    if not config.eval.tasks:
        return ()
    installed = installed_tasks()
    return tuple(_chosen(entry, installed) for entry in config.eval.tasks)


def _chosen(entry: Any, installed: InstalledTasks) -> ChosenTask:
    found = installed.by_name.get(entry.name)
    if found is None:
        if installed.failures and nearest(entry.name, installed.by_name) is None:
            raise PluginError("; ".join(failure.told for failure in installed.failures))
        raise ConfigError(f"eval.tasks: no installed plugin brings a task {entry.name!r}; {installed.in_words()}")
    options = found.task.options
    if isinstance(entry, options):
        return ChosenTask(found.task, found.plugin, entry)
    with asked(found.plugin, f"the options of its task {entry.name}", options):
        try:
            return ChosenTask(found.task, found.plugin, options.model_validate(entry.model_dump()))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, ("eval", "tasks", entry.name, *problem["loc"])))
            raise ConfigError(f"{key}: {problem['msg']}") from None
