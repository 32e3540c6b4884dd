"""Asking a plugin: an error that it raises, or a wrong answer, becomes one sentence about the plugin.

Every method of a subclass of `ttt.plugins.Backbone` is asked in this way (`ttt.plugins.guarding`). Errors of
`ttt.errors`, which a plugin raises on purpose, pass through unchanged. So do an interrupt, a closed pipe and running
out of memory. Every other error becomes a `PluginError`. It names the plugin with its distribution and version, the
method, the line in the plugin's own code, and the error; `__cause__` is the error itself, and `TTT_TRACEBACK=1` prints
its traceback.

Calls between methods of one plugin are not changed: one method can catch what another raises.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ttt.errors import PluginError, TTTError
from ttt.plugins.origin import brought, distribution_of, origin_of, version_of
from ttt.printable import printable, shortened

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import Tensor

    from ttt.plugins.data import Batch, WindowDataset
    from ttt.plugins.scoring import Scores, ScoreStream

TRACEBACK = "TTT_TRACEBACK"
"""The environment variable that, set to anything but 0, prints tracebacks of plugins on standard error."""

WAY_OUT = f"tell who made it ({TRACEBACK}=1 shows all of it)"
"""The fix of an error in a plugin."""

_LONGEST = 400
"""Most characters that are shown of an error's own message."""
_inside: ContextVar[int] = ContextVar("ttt_plugin_is_asked", default=0)
"""How many calls of plugins are running in this context."""


class WrongAnswer(TypeError):  # noqa: N818 - it never leaves this module's guard
    """An answer that a method must not return. The message completes "it returned …"."""


def is_asked() -> bool:
    """Whether a call of a plugin is running in this context. If so, further calls are the plugin's own."""
    return _inside.get() > 0


@contextlib.contextmanager
def asked(backbone: object, what: str, called: Any = None) -> Iterator[None]:
    """Ask a plugin in the `with` block: an error that it raises becomes a `PluginError`.

    Args:
        backbone: the plugin.
        what: what it is asked for, as `its rule no_cats`.
        called: the plugin's function or class that is called. It is to blame if the traceback has no line of the
            plugin's code. Without it, such an error is not the plugin's, and passes through.

    Raises:
        PluginError: the plugin failed.
    """
    mark = _inside.set(_inside.get() + 1)
    try:
        yield
    except (TTTError, BrokenPipeError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # also SystemExit, and errors that are not Exceptions, such as a panic in Rust
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
    """A plugin's dataset. The methods of `WindowDataset` are asked; other attributes are the dataset's own."""

    def __init__(self, backbone: object, dataset: WindowDataset) -> None:
        self._backbone = backbone
        self._dataset = dataset

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self._backbone, origin_of(self._backbone), self._dataset)

    def _asked(self, method: str) -> contextlib.AbstractContextManager[None]:
        return asked(self._backbone, f"`{method}` of its dataset", getattr(type(self._dataset), method, self._dataset))

    def __len__(self) -> int:
        with self._asked("__len__"):
            return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        with self._asked("__getitem__"):
            return self._dataset[index]

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Collate windows to a batch."""
        with self._asked("collate"):
            return self._dataset.collate(samples)

    @property
    def files(self) -> Sequence[range]:
        """The windows of each file."""
        with self._asked("files"):
            return self._dataset.files

    def describe(self, index: int) -> str:
        """A window in the user's words. It is called after an error, so it never raises one itself."""
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

    @property
    def plugin(self) -> object:
        """The backbone whose dataset it is."""
        return self._backbone

    @property
    def reader(self) -> AskedReader | None:
        """The part of a `StagedDataset` that reads files; None of other datasets."""
        with self._asked("reader"):
            reader = getattr(self._dataset, "reader", None)
        return None if reader is None else AskedReader(self._backbone, reader)

    def finish(self, index: int, read: Any) -> Any:
        """Make a window of what the reader read."""
        with self._asked("finish"):
            return self._dataset.finish(index, read)  # type: ignore[attr-defined]

    def kept(self, index: int) -> bool:
        """Whether a window need not be read again."""
        with self._asked("kept"):
            return bool(self._dataset.kept(index))  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


class AskedReader:
    """The part of a plugin's dataset that reads files, which may go to another process."""

    def __init__(self, backbone: object, reader: Any) -> None:
        self._backbone = backbone
        self._reader = reader

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self._backbone, origin_of(self._backbone), self._reader)

    def __getitem__(self, index: int) -> Any:
        called = getattr(type(self._reader), "__getitem__", self._reader)
        with asked(self._backbone, "`__getitem__` of its dataset's reader", called):
            return self._reader[index]


def _again(kind: Any, backbone: object, origin: EntryPoint | None, part: Any) -> Any:
    """An `AskedDataset` or `AskedReader` in another process, where the backbone was not discovered."""
    if origin is not None:
        brought(backbone, origin)
    return kind(backbone, part)


class AskedScoring:
    """A plugin's context of a `ScoreStream`: entering and leaving it is asked, and so are the stream's methods.

    Args:
        backbone: the plugin.
        context: what its `score_stream` returned.
        check: the check of the `Scores` that the stream returns.
    """

    def __init__(self, backbone: object, context: Any, check: Callable[[Any, Any], Any]) -> None:
        self._backbone = backbone
        self._context = context
        self._check = check

    def __enter__(self) -> AskedScoreStream:
        with asked(self._backbone, "`score_stream`", type(self._backbone).score_stream):  # type: ignore[attr-defined]
            stream = self._context.__enter__()
            missing = [name for name in ("read", "finish", "learn_anew") if not callable(getattr(stream, name, None))]
            if missing:
                raise WrongAnswer(f"{with_its_type(stream)} without `{missing[0]}`, which a ScoreStream has")
        return AskedScoreStream(self._backbone, stream, self._check)

    def __exit__(self, *error: Any) -> bool | None:
        with asked(self._backbone, "`score_stream`"):
            left: bool | None = self._context.__exit__(*error)
        return left


class AskedScoreStream:
    """A plugin's `ScoreStream`."""

    def __init__(self, backbone: object, stream: ScoreStream, check: Callable[[Any, Any], Any]) -> None:
        self._backbone = backbone
        self._stream = stream
        self._check = check

    def _asked(self, method: str) -> contextlib.AbstractContextManager[None]:
        return asked(self._backbone, f"`{method}` of its score stream", getattr(self._stream, method))

    def read(self, piece: Tensor) -> Scores:
        """Read the next piece of each stream."""
        with self._asked("read"):
            scores: Scores = self._check(self._backbone, self._stream.read(piece))
            return scores

    def finish(self) -> Scores:
        """The scores that were held back."""
        with self._asked("finish"):
            scores: Scores = self._check(self._backbone, self._stream.finish())
            return scores

    def learn_anew(self) -> None:
        """Start fast weights anew."""
        with self._asked("learn_anew"):
            self._stream.learn_anew()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# --- the sentence ---


def with_article(kind: str) -> str:
    """A noun with its article."""
    return f"{'an' if kind[:1] in 'aeiouAEIOU' else 'a'} {kind}"


def with_its_type(value: Any) -> str:
    """The type of a value, in words: `None`, `a list`."""
    return "None" if value is None else with_article(type(value).__name__)


def owner(backbone: object) -> str:
    """The name of a plugin with the distribution that brings it: `the plugin toy (ttt-toy 1.2)`."""
    name = getattr(backbone, "name", type(backbone).__name__)
    origin = origin_of(backbone)
    if origin is not None:
        return f"the plugin {name} ({distribution_of(origin)} {version_of(origin)})"
    return f"the plugin {name} ({type(backbone).__module__})"


def packages_of(backbone: object) -> frozenset[str]:
    """The top-level packages of a plugin's own code."""
    modules = [cls.__module__ for cls in type(backbone).__mro__]
    origin = origin_of(backbone)
    if origin is not None:
        modules.append(origin.value)
    return frozenset(top_of(module) for module in modules) - {"ttt", "abc", "builtins", "typing"}


def place_in(error: BaseException, packages: frozenset[str]) -> str | None:
    """File and line of the innermost frame of an error's traceback that is in one of the packages; None without one."""
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
    """Type and message of an error on one printable line, shortened if it is long."""
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
    """Print the traceback of a plugin's error, if `TTT_TRACEBACK` asks for it."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the CPU or on a device."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def definition(called: Any) -> str | None:
    """File and line of the definition of a function or class; only the file if the line is unknown."""
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
    """The top-level package of a module or of an entry point's value."""
    return module.partition(":")[0].partition(".")[0]
