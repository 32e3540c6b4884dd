"""Finding backbone plugins. A broken one is listed with its cause and never stops the others.

A backbone's entry point is in the group `ttt.backbones`. Its module is loaded on the first use of its name
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
    """The backbone; None if the plugin is broken."""
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
        """The version of the distribution."""
        return version_of(self.entry_point)


def _found(point: metadata.EntryPoint) -> PluginInfo:
    """Load the backbone of an entry point; if that fails, record the cause."""
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
    except BaseException as error:  # also errors that are not Exceptions, such as a panic in Rust
        return PluginInfo(point, None, cause_in_words(error, point.value))


def _backbone(point: metadata.EntryPoint, backbone: Any = None) -> Backbone:
    """The backbone that an entry point brings, checked.

    Raises:
        PluginError: it is not a backbone, has another name than its entry point, or has a wrong attribute.
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
    """The plugins that claim a name, loaded once in a process.

    If two plugins claim one name, both are broken: the order of a directory must not decide.
    """
    points = [point for point in entry_points(BACKBONES) if point.name == name]
    if len(points) > 1:
        owners = ", ".join(sorted({distribution_of(other) for other in points}))
        error = f"the name {name!r} is claimed more than once: {owners}; uninstall all but one"
        return tuple(PluginInfo(point, None, error) for point in points)
    return tuple(_found(point) for point in points)


def forget() -> None:
    """Discover again at the next call, because what is installed changed during the process."""
    registry.forget()
    _load_all.cache_clear()


def names() -> tuple[str, ...]:
    """The names of the installed backbone plugins, broken ones included. Loads none of them."""
    return tuple(dict.fromkeys(point.name for point in entry_points(BACKBONES)))


def find(name: str) -> PluginInfo | None:
    """The plugin of that name, working or broken; None if there is none. Loads no other plugin."""
    return next(iter(_load_all(name)), None)


def discover() -> tuple[PluginInfo, ...]:
    """Every installed backbone plugin, broken ones included, in order of name. Read once in a process."""
    return tuple(plugin for name in names() for plugin in _load_all(name))


def get_backbone(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
        PluginError: it is installed but broken.
        UsageError: no plugin has that name; the message lists the installed ones.
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
    damaged = "".join(f"; {problem}, install it again" for problem in registry.unreadable_metadata())
    raise UsageError(f"unknown backbone {name!r}{hint}; installed: {listed}{damaged}")
