"""Every installed plugin with what it brings, working or broken: for `ttt plugins` and `ttt doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from ttt.plugins import registry
from ttt.plugins.backbone import Backbone
from ttt.plugins.discovery import PluginInfo, discover
from ttt.plugins.hookspecs import BACKBONES, EVAL_TASKS, KINDS, Kind
from ttt.plugins.installed_tasks import installed_tasks
from ttt.plugins.origin import distribution_of, version_of


@dataclass(frozen=True)
class InstalledPlugin:
    """A module that a distribution declares under one name, in however many groups."""

    name: str
    module: str
    distribution: str
    version: str
    brings: tuple[Kind, ...]
    """What its entry points declare."""
    points: tuple[metadata.EntryPoint, ...]
    """The entry points, one for each kind."""
    error: str | None
    """Why it is broken, in one line; None if it can be loaded."""

    backbone: Backbone | None = None
    """The backbone that it brings; None if it brings none, or is broken."""
    tasks: tuple[str, ...] = ()
    """Names of the evaluation tasks that it brings, as a config writes them."""


def installed_plugins() -> tuple[InstalledPlugin, ...]:
    """Every plugin, loaded, in order of name."""
    found: dict[tuple[str, str, str], list[tuple[Kind, metadata.EntryPoint]]] = {}
    for kind in KINDS:
        for point in registry.entry_points(kind):
            found.setdefault((point.name, distribution_of(point), point.value), []).append((kind, point))
    backbones = {(plugin.name, plugin.distribution, plugin.module): plugin for plugin in discover()}
    return tuple(_listed(*key, found[key], backbones.get(key)) for key in sorted(found))


def _listed(
    name: str,
    distribution: str,
    module: str,
    declared: list[tuple[Kind, metadata.EntryPoint]],
    found: PluginInfo | None,
) -> InstalledPlugin:
    kinds, points = zip(*declared, strict=True)
    error = next(filter(None, (registry.load(point).error for point in points)), None)
    backbone = None
    if found is not None:
        error, backbone = found.error or error, found.backbone
    tasks = _tasks_of(points[kinds.index(EVAL_TASKS)]) if EVAL_TASKS in kinds else ()
    return InstalledPlugin(name, module, distribution, version_of(points[0]), kinds, points, error, backbone, tasks)


def _tasks_of(point: metadata.EntryPoint) -> tuple[str, ...]:
    plugin = registry.load(point).plugin
    return tuple(sorted(name for name, found in installed_tasks().by_name.items() if found.plugin is plugin))


def without_backbones(found: tuple[InstalledPlugin, ...]) -> bool:
    """Whether no plugin declares a backbone."""
    return not any(BACKBONES in plugin.brings for plugin in found)
