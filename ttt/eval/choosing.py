"""Which tasks an evaluation measures. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ttt.config.schema import RunConfig
from ttt.errors import UsageError
from ttt.eval.tasks import ItemTask, Setup
from ttt.plugins.backbone import Backbone
from ttt.plugins.installed_tasks import ChosenTask, InstalledTask, chosen_tasks, installed_tasks
from ttt.plugins.origin import distribution_of, origin_of


def chosen_for(config: RunConfig, backbone: Backbone, names: Sequence[str] | None) -> list[ChosenTask]:
    """The tasks to measure, each with its options.

    Args:
        config: resolved; tasks of `eval.tasks` have the options written there.
        backbone: the config's.
        names: which ones; None is those of the config or, if it has none, those that the backbone brings data for.

    Raises:
        ConfigError: a task of the config is not installed.
        UsageError: a named task is not installed.
    """
    written = {chosen.task.name: chosen for chosen in chosen_tasks(config)}
    if names is None and written:
        return list(written.values())
    installed = installed_tasks()
    if names is None:
        usual = [_with_defaults(each) for each in installed.by_name.values() if isinstance(each.task, ItemTask)]
        return [chosen for chosen in usual if _has_data(chosen, config, backbone)]
    found = []
    for name in dict.fromkeys(names):
        if name in written:
            found.append(written[name])
            continue
        if name not in installed.by_name:
            raise UsageError(f"--tasks: no installed plugin brings a task {name!r}; {installed.in_words()}")
        found.append(_with_defaults(installed.by_name[name]))
    return found


def _with_defaults(installed: InstalledTask) -> ChosenTask:
    task = installed.task
    return ChosenTask(task, installed.plugin, task.options(name=task.name))


def _has_data(chosen: ChosenTask, config: RunConfig, backbone: Backbone) -> bool:
    task = chosen.task
    assert isinstance(task, ItemTask)
    setup = Setup(config, backbone, chosen.options, task.folder)
    if task.lacks(setup) is not None:
        return False
    return task.is_ready(setup)


def task_lines() -> Iterator[str]:
    """A line for each installed task: its name, its plugin, what it needs."""
    installed = installed_tasks()
    width = max(map(len, installed.by_name), default=0)
    for name, each in sorted(installed.by_name.items()):
        point = origin_of(each.plugin)
        owner = "" if point is None else distribution_of(point)
        first = (type(each.task).__doc__ or "").strip().partition("\n")[0]
        yield f"{name:{width}}  {first}  [{owner}]"
    for failure in installed.failures:
        yield failure.told
