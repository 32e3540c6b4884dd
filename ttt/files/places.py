"""Places to write to: whether there is room, whether a file may go there, and who else is at it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

from ttt.amounts import show_bytes
from ttt.errors import EnvironmentProblem, UsageError
from ttt.reading import other_kind

_TRIES, _ONE_LOOK = 4, 0.005
"""How often a lock is tried, with how many seconds between: `is_locked` may be looking just then."""

_locked: dict[int, tuple[int, int]] = {}
"""Device and file of what this process has locked, by the number of its handle."""


def _existing(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def free_bytes(path: Path) -> int | None:
    """Bytes that are free where `path` is or will be; None if the system does not say."""
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def free_in_words(path: Path) -> str:
    """How much is free where `path` is, as a clause."""
    free = free_bytes(path)
    return "how much is free is not known" if free is None else f"{show_bytes(free)} are free"


def require_space(path: Path, needed: int, *, what: str) -> None:
    """Refuse to begin if the result does not fit on the disk.

    Raises:
        EnvironmentProblem: less than `needed` bytes are free where `path` is; `what` names what needs them.
    """
    free = free_bytes(path)
    if free is not None and free < needed:
        raise EnvironmentProblem(
            f"{path}: {what} takes {show_bytes(needed)}, but only {show_bytes(free)} are free; free some "
            f"space or choose another place"
        )


def require_place(path: Path) -> None:
    """Refuse to begin if `path` cannot be written in the end. Missing folders are allowed.

    Raises:
        EnvironmentProblem: what should be its folder is a file, or may not be written.
    """
    above = next((folder for folder in path.absolute().parents if os.path.lexists(folder)), None)
    if above is None:
        return
    if not above.is_dir():
        raise EnvironmentProblem(f"{path}: cannot be written: {above} is not a folder; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"{path}: cannot be written: no permission to write in {above}; name another place")


def lock(file: IO[Any] | int, path: Path) -> None:
    """Hold an open file of a run, or the handle of its folder, until it is closed, or this process ends.

    A process that is forked meanwhile has no part in the lock: in it the file is `os.devnull`. Else a killed run would
    be locked for as long as a process that it forked lives on.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            number = file if isinstance(file, int) else file.fileno()
            _locked[number] = _identity(number)
            return
        except BlockingIOError:
            if not left:
                raise UsageError(
                    f"{path.parent}: another process is training in this run_dir; wait for it, or name another"
                ) from None
            time.sleep(_ONE_LOOK)
        except OSError:  # a file system without locks
            return


def _identity(number: int) -> tuple[int, int]:
    facts = os.fstat(number)
    return facts.st_dev, facts.st_ino


def _leave_locks_to_parent() -> None:
    """In a forked process: put nothing in the place of each locked file, unless it was closed since."""
    for number, identity in _locked.items():
        with contextlib.suppress(OSError):
            if _identity(number) == identity:
                nothing = os.open(os.devnull, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
                os.dup2(nothing, number, inheritable=False)
                os.close(nothing)
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_parent)


def is_locked(path: Path) -> bool:
    """Whether a process holds a file or a folder. To look is to hold it for a moment together with others who look.

    False where a system has no locks, or what is there cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    if other_kind(path) not in (None, "a folder"):  # opening a FIFO would block
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except (OSError, ValueError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def replaced_file(path: Path) -> Path:
    """The file that writing to `path` replaces: `path` itself, whether it exists or not, or what a link leads to.

    Raises:
        EnvironmentProblem: something else is there, such as a device, whose node a rename would destroy.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise EnvironmentProblem(f"{path}: cannot be written: it is a link that leads to itself; name another place")
    kind = other_kind(target)
    if kind is not None:
        raise EnvironmentProblem(f"{path}: cannot be written: it is {kind}, not a file; name another place")
    return target
