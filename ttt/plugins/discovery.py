"""Finding backbone plugins. A broken one is listed with its cause and never stops the others.

Discovery reads the entry points of the group `ttt.backbones`. Each is loaded when it is first asked for, registered on
its own, and checked against the hook specifications at once, so that a misspelt hook is an error and not a plugin that
does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from dataclasses import dataclass
from importlib import metadata

import pluggy

from ttt.config.spelling import nearest
from ttt.errors import PluginError, UsageError
from ttt.plugins import hookspecs
from ttt.plugins.asking import in_one_line, place_in, print_traceback, top_of
from ttt.plugins.backbone import Backbone
from ttt.plugins.declared import require_declared
from ttt.plugins.origin import brought, distribution_of, version_of

GROUP = "ttt.backbones"


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


def _cause(error: BaseException, module: str) -> str:
    """Why a plugin cannot be loaded, in one line; the place is the last one in its own package."""
    if isinstance(error, PluginError):
        return str(error)
    print_traceback(error)
    place = place_in(error, frozenset({top_of(module)}))
    return in_one_line(error) + (f" ({place})" if place else "")


def _load(entry_point: metadata.EntryPoint) -> Backbone:
    """Load and register one entry point on a manager of its own, and ask it for its backbone."""
    manager = pluggy.PluginManager("ttt")
    manager.add_hookspecs(hookspecs)
    manager.register(entry_point.load(), name=entry_point.name)
    manager.check_pending()
    answers = manager.hook.ttt_backbone()
    if len(answers) != 1:
        raise PluginError(f"{entry_point.value} implements no hook `ttt_backbone` that returns a backbone")
    backbone = answers[0]
    if not isinstance(backbone, Backbone):
        raise PluginError(f"`ttt_backbone` of {entry_point.value} returned {type(backbone).__name__}, not a Backbone")
    if getattr(backbone, "name", entry_point.name) != entry_point.name:
        raise PluginError(f"the backbone calls itself {backbone.name!r}, its entry point {entry_point.name!r}")
    require_declared(backbone)
    brought(backbone, entry_point)
    return backbone


@functools.cache
def _entry_points() -> tuple[metadata.EntryPoint, ...]:
    """The entry points of our group, in the order in which imports find their distributions.

    `metadata.entry_points(group=GROUP)` gives the same, but parses the metadata of everything that is installed.
    """
    return tuple(
        point
        for distribution in metadata.distributions()
        if GROUP in (distribution.read_text("entry_points.txt") or "")
        for point in distribution.entry_points
        if point.group == GROUP
    )


def _claims(name: str) -> list[metadata.EntryPoint]:
    """The entry points of a name, of a distribution that is installed twice those that imports would find."""
    points = [point for point in _entry_points() if point.name == name]
    if len(points) < 2:
        return points
    first: dict[str, metadata.EntryPoint] = {}
    for point in points:
        first.setdefault(distribution_of(point), point)
    return sorted(first.values(), key=lambda point: point.value)


@functools.cache
def _load_all(name: str) -> tuple[PluginInfo, ...]:
    """The plugins that claim a name, loaded once for each process.

    Two plugins that claim one name are both broken: neither may win by the order of a directory.
    """
    points = _claims(name)
    if len(points) > 1:
        owners = ", ".join(sorted({distribution_of(other) for other in points}))
        error = f"the name {name!r} is claimed more than once: {owners}; uninstall all but one"
        return tuple(PluginInfo(point, None, error) for point in points)
    found = []
    for point in points:
        try:
            # What an import prints would stand in the middle of JSON.
            with contextlib.redirect_stdout(sys.stderr):
                found.append(PluginInfo(point, _load(point), None))
        except KeyboardInterrupt:
            raise
        except BaseException as exception:  # whatever a third party's import raises, a panic of Rust's for one
            found.append(PluginInfo(point, None, _cause(exception, point.value)))
    return tuple(found)


def forget() -> None:
    """Discover anew when next asked: what is installed has changed within the process."""
    _entry_points.cache_clear()
    _load_all.cache_clear()


def names() -> tuple[str, ...]:
    """What the installed backbone plugins are called, working or broken; none is loaded."""
    return tuple(sorted({point.name for point in _entry_points()}))


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
