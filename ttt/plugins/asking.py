"""Asking a plugin: what it raises, or answers wrongly, is one sentence about the plugin.

Every method that a subclass of `ttt.plugins.Backbone` brings is asked so (`ttt.plugins.guarding`). Errors of
`ttt.errors`, which a plugin raises on purpose, pass through as they are, and so do an interrupt, a closed pipe and
running out of memory. All else becomes a `PluginError` that names the plugin with its distribution and version, the
method, the line in the plugin's own code, and what was raised; `__cause__` is the error itself, and `TTT_TRACEBACK=1`
prints its traceback.

Between the methods of one plugin nothing is changed: what one raises, another can catch.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ttt.errors import PluginError, TTTError
from ttt.plugins.origin import distribution_of, origin_of, version_of
from ttt.printable import printable, shortened

if TYPE_CHECKING:
    from ttt.plugins.data import Batch, WindowDataset

TRACEBACK = "TTT_TRACEBACK"
"""The variable that, set to anything but 0, has tracebacks of plugins printed on standard error."""

WAY_OUT = f"tell who made it ({TRACEBACK}=1 shows all of it)"
"""How the sentence about a plugin that failed ends."""

_LONGEST = 400
"""Characters of an error's own message that are told."""
_inside: ContextVar[int] = ContextVar("ttt_plugin_is_asked", default=0)
"""How many questions to plugins are open in this context."""


class WrongAnswer(TypeError):  # noqa: N818 - it never leaves this module's guard
    """An answer that is not what the method promises; the message completes "it returned"."""


def is_asked() -> bool:
    """Whether a question to a plugin is open in this context: then what it asks of itself is between its methods."""
    return _inside.get() > 0


@contextlib.contextmanager
def asked(backbone: object, what: str, called: Any = None) -> Iterator[None]:
    """Ask a plugin inside: what it raises becomes a sentence.

    Args:
        backbone: which plugin.
        what: what it is asked for, as `its rule no_cats`.
        called: what of the plugin is called, which is to blame where no line of the plugin's is on the way to the
            error. Without it such an error is none of the plugin's, and passes.

    Raises:
        PluginError: the plugin failed.
    """
    mark = _inside.set(_inside.get() + 1)
    try:
        yield
    except (TTTError, BrokenPipeError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit, and what of others' is no Exception: a panic of Rust's for one
        if is_out_of_memory(error):
            raise
        place = place_in(error, packages_of(backbone)) or (None if called is None else definition(called))
        if place is None:
            raise
        print_traceback(error)
        told = f"{owner(backbone)} failed in {what}, {place}: {in_one_line(error)}"
        raise PluginError(told, fix=WAY_OUT) from error
    finally:
        _inside.reset(mark)


class AskedDataset:
    """A plugin's dataset whose every method is asked; anything else that it has is its own."""

    def __init__(self, backbone: object, dataset: WindowDataset) -> None:
        self._backbone = backbone
        self._dataset = dataset

    def _asked(self, method: str) -> contextlib.AbstractContextManager[None]:
        return asked(self._backbone, f"`{method}` of its dataset", getattr(type(self._dataset), method, self._dataset))

    def __len__(self) -> int:
        with self._asked("__len__"):
            return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        with self._asked("__getitem__"):
            return self._dataset[index]

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Windows to a batch."""
        with self._asked("collate"):
            return self._dataset.collate(samples)

    @property
    def files(self) -> Sequence[range]:
        """The windows of each file."""
        with self._asked("files"):
            return self._dataset.files

    def describe(self, index: int) -> str:
        """A window in the user's words. It is asked for when something else went wrong, so it never fails itself."""
        try:
            with self._asked("describe"):
                return str(self._dataset.describe(index))
        except TTTError as error:
            return f"window {index} ({error})"

    @property
    def notice(self) -> str | None:
        """What a user must know about this data."""
        with self._asked("notice"):
            return self._dataset.notice

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


# --- the sentence ---


def with_article(kind: str) -> str:
    """A noun behind its article."""
    return f"{'an' if kind[:1] in 'aeiouAEIOU' else 'a'} {kind}"


def with_its_type(value: Any) -> str:
    """What a wrong answer is: `None`, `a list`."""
    return "None" if value is None else with_article(type(value).__name__)


def owner(backbone: object) -> str:
    """A plugin by name, with the distribution that brought it: `the plugin toy (ttt-toy 1.2)`."""
    name = getattr(backbone, "name", type(backbone).__name__)
    origin = origin_of(backbone)
    if origin is not None:
        return f"the plugin {name} ({distribution_of(origin)} {version_of(origin)})"
    return f"the plugin {name} ({type(backbone).__module__})"


def packages_of(backbone: object) -> frozenset[str]:
    """Top-level packages that a plugin's own code is in."""
    modules = [cls.__module__ for cls in type(backbone).__mro__]
    origin = origin_of(backbone)
    if origin is not None:
        modules.append(origin.value)
    return frozenset(top_of(module) for module in modules) - {"ttt", "abc", "builtins", "typing"}


def place_in(error: BaseException, packages: frozenset[str]) -> str | None:
    """File and line of the innermost frame, of all that led to an error, that is in one of the packages."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}:{error.lineno}"
    found = None
    step: TracebackType | None = error.__traceback__
    while step is not None:
        if top_of(step.tb_frame.f_globals.get("__name__", "")) in packages:
            found = f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}"
        step = step.tb_next
    return found


def in_one_line(error: BaseException) -> str:
    """Type and message of an error in one line of letters, cut where it is long."""
    if isinstance(error, WrongAnswer):
        return f"it returned {error}"
    try:
        told = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # an error whose own message fails
        told = ""
    text = " ".join(f"{type(error).__name__}: {told}".split())
    return shortened(printable(text).rstrip(": "), _LONGEST)


def print_traceback(error: BaseException) -> None:
    """Print where an error of a plugin comes from, if `TTT_TRACEBACK` asks for it."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on the CPU or on a device."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def definition(called: Any) -> str | None:
    """File and line where a function or a class is defined, the file alone where the line cannot be had."""
    function = inspect.unwrap(getattr(called, "__func__", getattr(called, "fget", called)))
    code = getattr(function, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    owner = called if isinstance(called, type) else type(called)
    file = getattr(sys.modules.get(owner.__module__), "__file__", None)
    with contextlib.suppress(OSError, TypeError):
        return f"{inspect.getsourcefile(owner)}:{inspect.getsourcelines(owner)[1]}"
    return file


def top_of(module: str) -> str:
    """The package that a module, or the value of an entry point, lies in."""
    return module.partition(":")[0].partition(".")[0]
