"""Finding backbone plugins. A broken one is listed with its cause and never stops the others.

Discovery reads the entry points of the group `ttt.backbones`. Each is loaded and registered on its own, and
checked against the hook specifications at once, so that a misspelt hook is an error and not a plugin that
does nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata

import pluggy

from ttt import hookspecs
from ttt.backbone import Backbone
from ttt.config.schema import BackboneOptions, DataOptions
from ttt.errors import PluginError, UsageError

GROUP = "ttt.backbones"


@dataclass(frozen=True)
class PluginInfo:
    """One entry point, whether it works or not."""

    name: str
    """Name of the entry point, which is the backbone's name."""
    distribution: str
    """The distribution that declares it."""
    version: str
    module: str
    """The module that it points to."""
    backbone: Backbone | None
    """What it brings; None where it is broken."""
    error: str | None
    """Why it is broken, in one line."""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1:] if error.__traceback__ else []
    place = f" ({last[0].filename}:{last[0].lineno})" if last else ""
    return f"{type(error).__name__}: {text}{place}"


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
    if backbone.name != entry_point.name:
        raise PluginError(f"the backbone calls itself {backbone.name!r}, its entry point {entry_point.name!r}")
    require_options(backbone)
    return backbone


def require_options(backbone: Backbone) -> None:
    """Refuse a backbone whose options are no options.

    Raises:
        PluginError: saying which, and of what they must be a subclass.
    """
    for name, base in (("options", BackboneOptions), ("data_options", DataOptions)):
        given = getattr(backbone, name, None)
        if not (isinstance(given, type) and issubclass(given, base)):
            raise PluginError(f"{type(backbone).__name__}.{name} is {given!r}, not a subclass of {base.__name__}")


def _entry_points() -> list[metadata.EntryPoint]:
    """The entry points of our group, of each distribution the one that imports would find.

    `metadata.entry_points(group=GROUP)` gives the same, but parses the metadata of everything that is installed.
    """
    found: dict[str, list[metadata.EntryPoint]] = {}
    for distribution in metadata.distributions():
        if GROUP in (distribution.read_text("entry_points.txt") or ""):
            points = [point for point in distribution.entry_points if point.group == GROUP]
            found.setdefault(distribution.name, points)
    return [point for points in found.values() for point in points]


@functools.cache
def discover() -> tuple[PluginInfo, ...]:
    """Every installed backbone plugin, in order of name, working or broken. Read once for each process.

    Two plugins that claim one name are both broken: neither may win by the order of a directory.
    """
    entry_points = sorted(_entry_points(), key=lambda point: (point.name, point.value))
    names = [point.name for point in entry_points]
    found = []
    for point in entry_points:
        distribution = point.dist.name if point.dist else "?"
        version = point.dist.version if point.dist else "?"
        backbone: Backbone | None = None
        error: str | None = None
        if names.count(point.name) > 1:
            owners = ", ".join(sorted({p.dist.name if p.dist else "?" for p in entry_points if p.name == point.name}))
            error = f"the name {point.name!r} is claimed more than once: {owners}; uninstall all but one"
        else:
            try:
                backbone = _load(point)
            except (Exception, SystemExit) as exception:  # whatever a third party's import raises
                error = _one_line(exception)
        found.append(PluginInfo(point.name, distribution, version, point.value, backbone, error))
    return tuple(found)


def get_backbone(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
        PluginError: it is installed but broken.
        UsageError: none has that name; the message lists those there are.
    """
    plugins = discover()
    for plugin in plugins:
        if plugin.name == name:
            if plugin.backbone is None:
                raise PluginError(
                    f"backbone {name!r} of {plugin.distribution} {plugin.version} is broken: {plugin.error}"
                )
            return plugin.backbone
    working = [plugin.name for plugin in plugins if plugin.backbone is not None]
    import difflib

    close = difflib.get_close_matches(name, working, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    listed = ", ".join(working) if working else "none (install one, as `pip install ttt-moshi`)"
    raise UsageError(f"unknown backbone {name!r}{hint}; installed: {listed}")
