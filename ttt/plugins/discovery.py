"""Finding backbone plugins. A broken one is listed with its cause and never stops the others.

A backbone's entry point is in the group `ttt.backbones`; its module is loaded when its name is first asked for
(`ttt.plugins.registry`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ttt.config.spelling import nearest
from ttt.errors import PluginError, UsageError
from ttt.plugins import registry
from ttt.plugins.backbone import Backbone
from ttt.plugins.declared import require_declared
from ttt.plugins.hookspecs import BACKBONES
from ttt.plugins.origin import brought, distribution_of, version_of
from ttt.plugins.registry import cause_in_words, entry_points

GROUP = BACKBONES.group


@dataclass(frozen=True)
class PluginInfo:
    """One entry point, whether it works or not."""

    entry_point: metadata.EntryPoint
    backbone: Backbone | None
    """What it brings; None where it is broken."""
    error: str | None
    """Why it is broken, in one line."""

    @property
    def name(self) -> str:
        """Name of the entry point, which is the backbone's name."""
        return self.entry_point.name

    @property
    def module(self) -> str:
        """The module that it points to."""
        return self.entry_point.value

    @functools.cached_property
    def distribution(self) -> str:
        """The distribution that declares it."""
        return distribution_of(self.entry_point)

    @functools.cached_property
    def version(self) -> str:
        """That of the distribution."""
        return version_of(self.entry_point)


def _found(point: metadata.EntryPoint) -> PluginInfo:
    """What became of an entry point."""
    loaded = registry.load(point)
    if loaded.plugin is None:
        return PluginInfo(point, None, loaded.error)
    try:
        answers = registry.ask(BACKBONES, only=[point], name=point.name)
        for failure in answers.failures:
            assert failure.error is not None
            raise failure.error.__cause__ or failure.error
        return PluginInfo(point, _backbone(point, *(answer.value for answer in answers.given)), None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust's, say
        return PluginInfo(point, None, cause_in_words(error, point.value))


def _backbone(point: metadata.EntryPoint, backbone: Any = None) -> Backbone:
    """The backbone that an entry point brings, looked at.

    Raises:
        PluginError: it is none, is called something else, or declares what cannot be.
    """
    if backbone is None:
        raise PluginError(f"{point.value} implements no hook `{BACKBONES.hook}` that returns a backbone")
    if not isinstance(backbone, Backbone):
        raise PluginError(f"`{BACKBONES.hook}` of {point.value} returned {type(backbone).__name__}, not a Backbone")
    if getattr(backbone, "name", point.name) != point.name:
        raise PluginError(f"the backbone calls itself {backbone.name!r}, its entry point {point.name!r}")
    require_declared(backbone)
    brought(backbone, point)
    return backbone


@functools.cache
def _load_all(name: str) -> tuple[PluginInfo, ...]:
    """The plugins that claim a name, loaded once for each process.

    Two plugins that claim one name are both broken: neither may win by the order of a directory.
    """
    points = [point for point in entry_points(BACKBONES) if point.name == name]
    if len(points) > 1:
        owners = ", ".join(sorted({distribution_of(other) for other in points}))
        error = f"the name {name!r} is claimed more than once: {owners}; uninstall all but one"
        return tuple(PluginInfo(point, None, error) for point in points)
    return tuple(_found(point) for point in points)


def forget() -> None:
    """Discover anew when next asked: what is installed has changed within the process."""
    registry.forget()
    _load_all.cache_clear()


def names() -> tuple[str, ...]:
    """What the installed backbone plugins are called, working or broken; none is loaded."""
    return tuple(dict.fromkeys(point.name for point in entry_points(BACKBONES)))


def find(name: str) -> PluginInfo | None:
    """The plugin of that name, working or broken, or None where none has it; no other is loaded."""
    return next(iter(_load_all(name)), None)


def discover() -> tuple[PluginInfo, ...]:
    """Every installed backbone plugin, in order of name, working or broken. Read once for each process."""
    return tuple(plugin for name in names() for plugin in _load_all(name))


def get_backbone(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
        PluginError: it is installed but broken.
        UsageError: none has that name; the message lists those there are.
    """
    plugin = find(name)
    if plugin is not None:
        if plugin.backbone is None:
            raise PluginError(f"backbone {name!r} of {plugin.distribution} {plugin.version} is broken: {plugin.error}")
        return plugin.backbone
    working = [plugin.name for plugin in discover() if plugin.backbone is not None]
    close = nearest(name, working)
    hint = f" (did you mean {close!r}?)" if close else ""
    listed = ", ".join(working) if working else "none (install one, as `pip install ttt-moshi`)"
    raise UsageError(f"unknown backbone {name!r}{hint}; installed: {listed}")
