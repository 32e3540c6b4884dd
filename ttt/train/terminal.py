"""An output that a run outlives: a terminal that is gone, a pipe that nobody reads, a log on a full disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console


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
