"""Every installed plugin with what it brings, working or broken: for `ttt plugins` and `ttt doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from ttt.plugins import registry
from ttt.plugins.discovery import discover
from ttt.plugins.hookspecs import BACKBONES, KINDS, Kind
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
    """They themselves, one for each kind."""
    error: str | None
    """Why it is broken, in one line; None where it can be loaded."""

    @property
    def brings_in_words(self) -> str:
        """What it brings, as `backbone, import of configs`."""
        return ", ".join(kind.words for kind in self.brings)


def installed_plugins() -> tuple[InstalledPlugin, ...]:
    """Every plugin, loaded, in order of name."""
    found: dict[tuple[str, str, str], list[tuple[Kind, metadata.EntryPoint]]] = {}
    for kind in KINDS:
        for point in registry.entry_points(kind):
            found.setdefault((point.name, distribution_of(point), point.value), []).append((kind, point))
    errors = {(plugin.name, plugin.distribution, plugin.module): plugin.error for plugin in discover()}
    return tuple(_listed(*key, found[key], errors.get(key)) for key in sorted(found))


def _listed(
    name: str, distribution: str, module: str, declared: list[tuple[Kind, metadata.EntryPoint]], error: str | None
) -> InstalledPlugin:
    kinds, points = zip(*declared, strict=True)
    error = error or next(filter(None, (registry.load(point).error for point in points)), None)
    return InstalledPlugin(name, module, distribution, version_of(points[0]), kinds, points, error)


def without_backbones(found: tuple[InstalledPlugin, ...]) -> bool:
    """Whether none of the plugins is to bring a backbone."""
    return not any(BACKBONES in plugin.brings for plugin in found)
