"""Outputs that may fail without ending a run: a closed terminal, a pipe without a reader, a full disk, a picture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from rich.console import Console

from ttt.plugins.asking import in_one_line


class LastingStream:
    """A text stream whose methods never fail: text that cannot be written is lost, and the program goes on."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text if that is possible."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting(console: Console) -> Iterator[Console]:
    """A context in which printing to the console raises nothing, even if its output is closed."""
    before: Any = vars(console).get("_file")  # None means the current standard output
    console.file = LastingStream(console.file)  # type: ignore[assignment]
    try:
        yield console
    finally:
        console.file = before


@contextlib.contextmanager
def survived(what: str, warn: Callable[[str], None]) -> Iterator[None]:
    """A context that turns an error into a warning; for outputs of a run besides its metrics.

    Args:
        what: what cannot be done because of the error, as a clause.
        warn: called with one sentence that says this and the cause.
    """
    try:
        yield
    except Exception as error:  # the disk's, or a library's, for instance about its fonts or settings
        warn(f"warning: {what} ({cause(error)}); the run goes on")


def cause(error: BaseException) -> str:
    """Why something failed: the system's words, or else the error's own."""
    return getattr(error, "strerror", None) or in_one_line(error)
