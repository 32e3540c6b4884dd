"""The one plugin manager of the process: modules that entry points name, each loaded when its kind is first asked for.

A module is registered once, in however many groups it is declared, and checked at once: a misspelt hook is an error and
not a plugin that does nothing. What goes wrong in one plugin, when it is loaded or when it is asked, is one sentence;
the others go on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pluggy

from ttt.config.spelling import nearest
from ttt.errors import PluginError, TTTError
from ttt.plugins import hookspecs
from ttt.plugins.asking import asked, in_one_line, owner, place_in, print_traceback, top_of
from ttt.plugins.hook_answers import HOOK_ANSWERS
from ttt.plugins.hookspecs import KINDS, Kind
from ttt.plugins.origin import brought, distribution_of, origin_of, version_of

_BY_HOOK = {kind.hook: kind for kind in KINDS}


class Plugin:
    """What an entry point names, as it is registered: its implementations of hooks, each behind a guard."""

    def __init__(self, name: str) -> None:
        self.name = name
        """Of the entry point by which it was loaded."""


@dataclass(frozen=True)
class Loaded:
    """The result of loading an entry point."""

    plugin: Plugin | None
    """None if it is broken."""
    error: str | None
    """Why it is broken, in one line."""


@dataclass(frozen=True)
class Answer:
    """What one plugin answered to a hook."""

    plugin: Plugin
    value: Any


@dataclass(frozen=True)
class Failure:
    """A plugin that is broken, or that failed when it was asked."""

    plugin: str
    """Its name."""
    broken: bool
    """Whether it could not be loaded at all."""
    told: str
    """One sentence about it, without the way out."""
    error: Exception | None = field(default=None, compare=False)
    """What failed when it was asked."""
    claimed_by: tuple[str, ...] = ()
    """The distributions that claim one name, if that is the failure."""


@dataclass(frozen=True)
class Answers:
    """What the plugins answered to a hook."""

    given: tuple[Answer, ...]
    """In order of the plugins' names, without None."""
    failures: tuple[Failure, ...]


@dataclass
class _Call:
    """A hook that is being called."""

    accepts: Callable[[Any], bool]
    failures: list[Failure]


_calling: ContextVar[_Call] = ContextVar("ttt_hook_is_called")


# --- entry points ---


@functools.cache
def _installed() -> tuple[metadata.EntryPoint, ...]:
    """The entry points of our groups, in the order in which imports find their distributions.

    `metadata.entry_points` gives the same, but parses the metadata of everything that is installed.
    """
    groups = {kind.group for kind in KINDS}
    return tuple(point for points, _ in _declared() for point in points if point.group in groups)


@functools.cache
def _declared() -> tuple[tuple[Iterable[metadata.EntryPoint], str | None], ...]:
    """The entry points of each distribution that may have some of ours, or why they cannot be read."""
    return tuple(map(_declared_by, metadata.distributions()))


def _declared_by(distribution: metadata.Distribution) -> tuple[Iterable[metadata.EntryPoint], str | None]:
    try:
        ours = "[ttt." in (distribution.read_text("entry_points.txt") or "")
        return (distribution.entry_points if ours else (), None)
    except (OSError, ValueError, TypeError) as error:
        return (), f"the entry points of {_name_of(distribution)} cannot be read ({in_one_line(error)})"


def _name_of(distribution: metadata.Distribution) -> str:
    try:
        return distribution.metadata["Name"] or str(distribution.locate_file(""))
    except (OSError, ValueError, TypeError):
        return str(distribution.locate_file(""))


def unreadable_metadata() -> tuple[str, ...]:
    """One sentence for each distribution whose entry points cannot be read: none of its plugins is found."""
    return tuple(problem for _, problem in _declared() if problem is not None)


@functools.cache
def entry_points(kind: Kind) -> tuple[metadata.EntryPoint, ...]:
    """The entry points of a kind, in order of name; none is loaded.

    If a distribution is installed twice, the first on the path is kept.
    """
    by_name: dict[str, list[metadata.EntryPoint]] = {}
    for point in _installed():
        if point.group == kind.group:
            by_name.setdefault(point.name, []).append(point)
    return tuple(point for name in sorted(by_name) for point in _once_each(by_name[name]))


def _once_each(points: list[metadata.EntryPoint]) -> list[metadata.EntryPoint]:
    if len(points) < 2:
        return points
    first: dict[str, metadata.EntryPoint] = {}
    for point in points:
        first.setdefault(distribution_of(point), point)
    return sorted(first.values(), key=lambda point: point.value)


# --- loading ---


class _Registry:
    """The plugin manager, and the result of every entry point that was loaded."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("ttt")
        self.manager.add_hookspecs(hookspecs)
        self.own: dict[str, Plugin] = {}
        """What the library brings itself, without an entry point, by the name of its module."""
        self._loaded: dict[str, Loaded] = {}

    def load(self, point: metadata.EntryPoint) -> Loaded:
        """What an entry point names, loaded and registered when it is first asked for."""
        if point.value not in self._loaded:
            self._loaded[point.value] = self._load(point)
        return self._loaded[point.value]

    def _load(self, point: metadata.EntryPoint) -> Loaded:
        plugin = Plugin(point.name)
        brought(plugin, point)
        try:
            # What an import prints would stand in the middle of JSON.
            with contextlib.redirect_stdout(sys.stderr):
                kinds = self._register(plugin, point.load(), name=point.value)
                _require_as_declared(point.value, kinds)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a third party's import raises, a panic of Rust's for one
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            return Loaded(None, cause_in_words(error, point.value))
        return Loaded(plugin, None)

    def register_own(self, module: Any) -> None:
        """Register a module of the library, unless it is registered."""
        name = module.__name__
        if name not in self.own:
            self.own[name] = Plugin(name.rpartition(".")[2])
            self._register(self.own[name], module, name=name)

    def _register(self, plugin: Plugin, module: Any, *, name: str) -> set[Kind]:
        """Register a module or another object; returns what it brings.

        Raises:
            PluginError: a hook is misspelt, or has a parameter that never gets a value.
        """
        kinds = set()
        for attribute, kind in self._implementations(module):
            written = getattr(module, attribute)
            _require_passable(attribute, kind, written)
            vars(plugin)[attribute] = _guarded(plugin, kind, written)
            kinds.add(kind)
        try:
            self.manager.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            raise PluginError(" ".join(str(error).split())) from error
        return kinds

    def _implementations(self, module: Any) -> Iterator[tuple[str, Kind]]:
        """The attributes of a module that are marked as implementations, each with what it brings.

        Raises:
            PluginError: there is no such hook, or it wraps the answers of others.
        """
        for attribute in dir(module):
            options: Any = self.manager.parse_hookimpl_opts(module, attribute)
            if options is None:
                continue
            hook = options.get("specname") or attribute
            if hook not in _BY_HOOK:
                close = nearest(hook, _BY_HOOK)
                hint = f"did you mean `{close}`?" if close else f"the hooks are {', '.join(_BY_HOOK)}"
                raise PluginError(f"unknown hook {hook!r}; {hint}")
            if options.get("wrapper") or options.get("hookwrapper"):
                raise PluginError(f"`{attribute}` wraps what other plugins answer; let it return an answer of its own")
            yield attribute, _BY_HOOK[hook]


def _require_passable(attribute: str, kind: Kind, written: Any) -> None:
    """Refuse parameters that would never get a value: pluggy passes nothing to one with a default, or by keyword."""
    wanted = inspect.signature(getattr(hookspecs, kind.hook)).parameters
    for name, parameter in inspect.signature(written).parameters.items():
        if name in wanted and (parameter.default is not parameter.empty or parameter.kind is parameter.KEYWORD_ONLY):
            raise PluginError(f"`{attribute}` would never get its `{name}`; write it as a parameter without a default")


def _require_as_declared(value: str, kinds: set[Kind]) -> None:
    """Refuse a module that implements a hook without an entry point of its group, or has one without the hook."""
    groups = {point.group for point in _installed() if point.value == value}
    for kind in KINDS:
        if kind.group in groups and kind not in kinds:
            raise PluginError(
                f"{value} implements no hook `{kind.hook}`, which its entry point in the group {kind.group} declares; "
                f"mark the function with @ttt.hookimpl, or take the entry point out"
            )
        if kind in kinds and kind.group not in groups:
            raise PluginError(
                f"{value} implements the hook `{kind.hook}`, but no entry point in the group {kind.group} declares it; "
                f"add one, or it is never asked"
            )


def _guarded(plugin: Plugin, kind: Kind, written: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an implementation: record its failure, check its answer, and name the plugin with the answer."""

    @functools.wraps(written)
    def ask(*arguments: Any) -> Answer | None:
        call = _calling.get()
        try:
            with asked(plugin, f"`{kind.hook}`", written):
                value = written(*arguments)
                if value is not None:
                    HOOK_ANSWERS[kind.hook](value)
        except Exception as error:
            if kind.first and isinstance(error, TTTError) and not isinstance(error, PluginError):
                raise  # it refuses what is the user's to mend
            call.failures.append(Failure(plugin.name, False, in_its_name(plugin, error), error))
            return None
        return None if value is None or not call.accepts(value) else Answer(plugin, value)

    return ask


def in_its_name(plugin: Plugin, error: Exception) -> str:
    """What a plugin raised when it was asked, as one sentence that names it, unless it is the library itself."""
    if isinstance(error, PluginError):
        return error.told
    told = str(error) if isinstance(error, TTTError) else in_one_line(error)
    return told if origin_of(plugin) is None else f"{owner(plugin)}: {told}"


def cause_in_words(error: BaseException, module: str) -> str:
    """Why a plugin cannot be used, in one line; the place is the last one in its own package."""
    if isinstance(error, PluginError):
        return str(error)
    print_traceback(error)
    place = place_in(error, frozenset({top_of(module)}))
    return in_one_line(error) + (f" ({place})" if place else "")


# --- asking ---


@functools.cache
def _registry() -> _Registry:
    return _Registry()


def load(point: metadata.EntryPoint) -> Loaded:
    """What an entry point names, loaded once for each process."""
    return _registry().load(point)


def register_own(module: Any) -> None:
    """Register a module of the library itself beside the plugins."""
    _registry().register_own(module)


def forget() -> None:
    """Discover again at the next call, because what is installed changed during the process."""
    for cached in (_declared, _installed, entry_points, _registry):
        cached.cache_clear()


def ask(
    kind: Kind,
    *,
    only: Iterable[metadata.EntryPoint] | None = None,
    accepts: Callable[[Any], bool] = lambda value: True,
    **arguments: Any,
) -> Answers:
    """Ask the plugins of a kind. Those that are not loaded yet are loaded.

    Args:
        kind: which hook to call.
        only: the entry points whose plugins are asked; None asks all of the kind, and the library itself.
        accepts: an answer for which it returns false is ignored.
        arguments: the arguments of the hook.

    Raises:
        TTTError: only one answer is wanted, and a plugin refused on purpose.
    """
    registry = _registry()
    failures = []
    wanted = set(registry.own.values()) if only is None else set()
    for point in entry_points(kind) if only is None else only:
        loaded = registry.load(point)
        if loaded.plugin is not None:
            wanted.add(loaded.plugin)
        else:
            failures.append(_broken(point, loaded))
    others = [plugin for plugin in registry.manager.get_plugins() if plugin not in wanted]
    call = _Call(accepts, failures)
    mark = _calling.set(call)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answered: Any = registry.manager.subset_hook_caller(kind.hook, others)(**arguments)
    finally:
        _calling.reset(mark)
    given = answered if isinstance(answered, list) else [answered] if answered is not None else []
    return Answers(tuple(sorted(given, key=lambda answer: answer.plugin.name)), tuple(failures))


def _broken(point: metadata.EntryPoint, loaded: Loaded) -> Failure:
    whose = f"{distribution_of(point)} {version_of(point)}"
    return Failure(point.name, True, f"the plugin {point.name} ({whose}) is broken: {loaded.error}")
