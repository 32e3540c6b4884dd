"""Outputs that a run outlives: a terminal that is gone, a pipe that nobody reads, a log on a full disk, a picture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from rich.console import Console

from ttt.plugins.asking import in_one_line


class LastingStream:
    """A text stream whose writing never fails: what cannot be written is lost, and what writes goes on."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on what can be passed on."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting(console: Console) -> Iterator[None]:
    """Inside, printing to the console raises nothing when its output is gone."""
    before: Any = vars(console).get("_file")  # None: standard output, whatever that is at the time
    console.file = LastingStream(console.file)  # type: ignore[assignment]
    try:
        yield
    finally:
        console.file = before


@contextlib.contextmanager
def survived(what: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Warn of what fails inside, and go on. It is for what a run tells beside its metrics.

    Args:
        what: what cannot be done then, as a clause.
        warn: called with one sentence that says so, and why.
    """
    try:
        yield
    except Exception as error:  # of the disk, or of a library, its fonts and its settings
        warn(f"warning: {what} ({cause(error)}); the run goes on")


def cause(error: BaseException) -> str:
    """Why something failed: the system's word for it, or else the error's own."""
    return getattr(error, "strerror", None) or in_one_line(error)
