r"""Signals as a request to stop after the step, and a second one as an order to stop at once.

    SIGINT      Ctrl-C
    SIGTERM     batch systems, `kill`, `timeout`
    SIGHUP      the terminal was closed; left alone if it is ignored, as under nohup
    SIGQUIT     Ctrl-\
    SIGUSR1, SIGUSR2      batch systems, some time before the end of a job (`sbatch --signal=USR1@120`)

All of them mean the same. Importing this module is cheap, so that it can be done before anything else is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, ClassVar

INTERRUPTED = 130
"""The exit code of a program that a signal asked to stop, whichever it was."""

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Those of them that the system has."""

_ALWAYS = (signal.SIGINT, signal.SIGTERM)
_SAME_REQUEST_SECONDS = 0.2
"""Signals this close together are one: `timeout` sends its signal twice, and so does a terminal that is closed."""

STARTING = "stopping before the first step; once more stops at once"
STEPPING = "stopping after this step, then saving; once more stops at once"
FINISHING = "writing the last files, then stopping; once more stops at once"


class StopRequested(KeyboardInterrupt):
    """Somebody asked to stop before the first step: nothing was learned, so nothing is saved."""


class Interrupt:
    """Inside, the first signal sets `requested`; the second raises KeyboardInterrupt.

    In a library's process, a handler for SIGHUP, SIGQUIT, SIGUSR1 or SIGUSR2 that somebody else installed stays.
    Outside the main thread Python handles no signals, so nothing is caught. Processes forked inside leave signals
    to their parent, but for SIGTERM, which ends them.

    Args:
        at_once: the first signal raises KeyboardInterrupt.
        own_process: this is a program's whole process. Where an exception could be swallowed, inside an import, the
            process ends by itself instead, with `INTERRUPTED`; and afterwards signals are ignored: everything is done.
    """

    _active: ClassVar[Interrupt | None] = None

    def __init__(self, *, at_once: bool = False, own_process: bool = False) -> None:
        self.requested = False
        self.told = STARTING
        """What the first signal says that it does."""
        self._at_once = at_once
        self._own_process = own_process
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._last = -_SAME_REQUEST_SECONDS
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
            Interrupt._active = self
            for number in SIGNALS:
                if self._takes(number):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if Interrupt._active is self:
            Interrupt._active = None
        for number, handler in self._before.items():
            # None: it was installed by something that is not Python, and cannot be put back from here
            after = signal.SIG_IGN if self._own_process else signal.SIG_DFL if handler is None else handler
            signal.signal(number, after)

    def _takes(self, number: int) -> bool:
        """Whether a signal is handled here."""
        handler = signal.getsignal(number)
        if number == getattr(signal, "SIGHUP", None) and handler == signal.SIG_IGN:
            return False  # nohup
        if number in _ALWAYS or self._own_process:
            return True
        return handler in (signal.SIG_DFL, signal.SIG_IGN) and not _caught_outside_python(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _in_child(number)
            return
        now = time.monotonic()
        if now - self._last < _SAME_REQUEST_SECONDS:
            return
        self._last = now
        if self.requested or self._at_once:
            self.requested = True
            self._order(frame)
            return
        self.requested = True
        # a handler may run inside a print, so it writes past Python's buffers; the terminal may be gone
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.told}\n".encode())

    def _order(self, frame: FrameType | None) -> None:
        """Stop at once."""
        again, self._ordered = self._ordered, True
        if self._held:
            return
        if self._own_process and (again or _importing(frame)):
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """The `Interrupt` that is in force already, or one for what is inside."""
    if Interrupt._active is not None:
        yield Interrupt._active
        return
    with Interrupt() as interrupt:
        yield interrupt


def stop_if_asked() -> None:
    """End what has not begun.

    Raises:
        StopRequested: a signal asked to stop.
    """
    if Interrupt._active is not None and Interrupt._active.requested:
        raise StopRequested


def _importing(frame: FrameType | None) -> bool:
    """Whether an import is going on: some of what runs in one swallows exceptions, or aborts the process."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _caught_outside_python(number: int) -> bool:
    """Whether something that is not Python handles a signal, as `faulthandler.register` does."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _in_child(number: int) -> None:
    """In a forked process: what a terminal sends to all is for the parent to heed; SIGTERM is how parents end one."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
