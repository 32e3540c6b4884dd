"""How a command ends: its exit code, and the sentence about an error."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ttt.interrupt import INTERRUPTED
from ttt_cli.terminal import show_error, show_findings, show_warning

PIPE_CLOSED = 141  # as a shell reports a program that SIGPIPE ended
ENVIRONMENT = 3

_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EMFILE", "ENFILE", "EFBIG", "ESTALE", "ENXIO",
        "ENODEV", "ETIMEDOUT", "ELOOP", "ENAMETOOLONG", "EISDIR", "ENOTDIR", "ENOENT", "EBUSY", "ENOLCK", "ETXTBSY",
    )
    if hasattr(errno, name)
)  # fmt: skip
"""System errors about files and disks, if no better message was raised before."""


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Run a command and turn foreseeable errors into a sentence; returns the exit code.

    Raises:
        Exception: any other error, most likely a bug, with its traceback.
    """
    from ttt.errors import ConfigError, DamagedFileWarning, TTTError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", DamagedFileWarning)  # show each once, whatever other filters are set
            warnings.showwarning = _shown_by(warnings.showwarning)
            return command() or 0
    except ConfigError as error:
        if error.findings:
            show_findings(error.findings, stream=sys.stderr)
            show_error(str(error).rsplit("\n", 1)[-1])
        else:
            show_error(error)
        return error.exit_code
    except TTTError as error:
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return silence_output()
    except OSError as error:
        if error.errno not in _MACHINE:
            raise
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        show_error(f"{place}cannot be used: {error.strerror}; look at that file or disk, then repeat the command")
        return ENVIRONMENT


def flush_output(code: int, *, lasting: bool) -> int:
    """Flush standard output; returns the exit code.

    Args:
        code: the command's exit code.
        lasting: whether the command's work is done even if its output could not be written.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        silenced = silence_output()
        if lasting:
            return code
        if isinstance(error, BrokenPipeError):
            return silenced
        show_error(f"standard output: cannot be written: {error.strerror}")
        return ENVIRONMENT
    return code


def _shown_by(usual: Callable[..., None]) -> Callable[..., None]:
    """A function that shows warnings: this library's warnings for users as a sentence, others as `usual` does."""
    from ttt.errors import DamagedFileWarning

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, DamagedFileWarning):
            show_warning(str(message))
        else:
            usual(message, category, *place, **more)

    return show


def silence_output() -> int:
    """Stop writing to an output that nobody reads any more; returns the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
