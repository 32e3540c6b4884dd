"""Ctrl-C and SIGTERM as a request to stop after the step, and a second one as an order to stop at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Inside, the first SIGINT or SIGTERM sets `requested`; the second raises KeyboardInterrupt.

    Outside the main thread, where Python handles no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}
        self._held = False
        self._ordered = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a second signal waits: an exception in the middle of a writer's locks could block its closing."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._ordered:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: it was installed by something that is not Python, and cannot be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._ordered = True
            if self._held:
                return
            raise KeyboardInterrupt
        self.requested = True
        # a handler may run inside a print, so it writes past Python's buffers
        os.write(2, b"\nstopping after this step, then saving; once more stops at once\n")
