r"""Signals as a request to stop after the step, and a second one as an order to stop at once.

A program that has nothing to lose yet ends with the first one, there and then.

    SIGINT      Ctrl-C
    SIGTERM     batch systems, `kill`, `timeout`
    SIGHUP      the terminal was closed; left alone if it is ignored, as under nohup
    SIGQUIT     Ctrl-\
    SIGUSR1, SIGUSR2      batch systems, some time before the end of a job (`sbatch --signal=USR1@120`)

All of them mean the same. In a job of Slurm only a second SIGINT is an order: Slurm repeats its signals (SIGTERM as a
preempted job's time begins and as it ends, or once one task of several has ended; `--signal` before it), so a step
that is being finished or saved must outlive them, and SIGKILL is how Slurm stops at once. Importing this module is
cheap, so that it can be done before anything else is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
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
_LOST_AFTER_SECONDS = 10.0
"""A program whose order to stop was swallowed ends by then; its files are cleared away in less."""
_SAME_REQUEST_SECONDS = 0.2
"""Signals this close together are one: `timeout` sends its signal twice, and so does a terminal that is closed."""

NOT_BEGUN = "interrupted before the run began; nothing was written: the same command starts it again"
_JOB = "SLURM_JOB_ID"
"""Set in every process of a job of Slurm."""
_AGAIN = "" if os.environ.get(_JOB) else "; once more stops at once"
STARTING = f"stopping before the first step{_AGAIN}"
STEPPING = f"stopping after this step, then saving{_AGAIN}"
FINISHING = f"writing the last files, then stopping{_AGAIN}"


class StopRequested(KeyboardInterrupt):
    """Somebody asked to stop before the first step: nothing was learned, so nothing is saved."""


class Interrupt:
    """Inside, the first signal sets `requested`; the second raises KeyboardInterrupt.

    In a library's process, a handler for SIGHUP, SIGQUIT, SIGUSR1 or SIGUSR2 that somebody else installed stays.
    Outside the main thread Python handles no signals, so nothing is caught. Processes forked inside leave signals
    to their parent, but for SIGTERM, which ends them.

    Args:
        at_once: the first signal raises KeyboardInterrupt.
        own_process: this is a program's whole process. Until `begin` the first signal ends it there and then, with
            `INTERRUPTED`. If the first signal raises, it ends so too where the exception could be swallowed, inside an
            import or where Python ignores exceptions, or was swallowed after all. Afterwards signals are ignored:
            everything is done.
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
        self._begun = not own_process or at_once
        self._hook: Any = None
        self._late: threading.Timer | None = None

    def begin(self) -> None:
        """From now on there is something to lose: the first signal is a request, and a step is made and saved."""
        self._begun, self.told = True, STEPPING

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
            if self._own_process:
                self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
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
        if self._late is not None:
            self._late.cancel()
        if self._hook is not None:
            sys.unraisablehook, self._hook = self._hook, None

    def _unraisable(self, ignored: Any) -> None:
        """End the process if what Python is about to ignore, in a finaliser say, is the order to stop."""
        if issubclass(ignored.exc_type, KeyboardInterrupt) and os.getpid() == self._process:
            os._exit(INTERRUPTED)
        (self._hook or sys.__unraisablehook__)(ignored)

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
        silent = _is_told_elsewhere(number)
        if not self._begun:
            _tell("" if silent else NOT_BEGUN)
            os._exit(INTERRUPTED)
        if self.requested and not self._at_once and _repeats(number):
            return
        if self.requested or self._at_once:
            self.requested = True
            self._order(frame)
            return
        self.requested = True
        _tell("" if silent else self.told)

    def _order(self, frame: FrameType | None) -> None:
        """Stop at once."""
        again, self._ordered = self._ordered, True
        if self._held:
            return
        if self._own_process:
            if again or _importing(frame):
                os._exit(INTERRUPTED)
            self._late = threading.Timer(_LOST_AFTER_SECONDS, os._exit, [INTERRUPTED])
            self._late.daemon = True
            self._late.start()
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """The `Interrupt` that is in force already, or one for what is inside."""
    if Interrupt._active is not None:
        yield Interrupt._active
        return
    with Interrupt() as interrupt:
        yield interrupt


def begin() -> None:
    """Say to the `Interrupt` in force, if there is one, that from now on there is something to lose."""
    if Interrupt._active is not None:
        Interrupt._active.begin()


def is_asked_to_stop() -> bool:
    """Whether a signal asked this process to stop."""
    return Interrupt._active is not None and Interrupt._active.requested


def stop_if_asked() -> None:
    """End what has not begun.

    Raises:
        StopRequested: a signal asked to stop.
    """
    if is_asked_to_stop():
        raise StopRequested


def _repeats(number: int) -> bool:
    """Whether a second signal only says the first one's request again."""
    return number != signal.SIGINT and bool(os.environ.get(_JOB))


def _tell(line: str) -> None:
    """Write a line. A handler may run inside a print, so it writes past Python's buffers; the terminal may be gone."""
    if not line:
        return
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def _is_told_elsewhere(number: int) -> bool:
    """Whether another process tells the user: the first of several, or a launcher, whose SIGTERM says that one failed.

    The launcher is that of `ttt.parallel.launching`; it passes on what the user sends as SIGINT.
    """
    one_of_several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    later = one_of_several and os.environ.get("RANK", "0") != "0"
    return later or (number == signal.SIGTERM and "TTT_LAUNCHER" in os.environ)


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
