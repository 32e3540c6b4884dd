"""How a command ends: its exit code, and the sentence where something is wrong."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ttt_cli.terminal import show_error, show_findings, show_warning

INTERRUPTED = 130
PIPE_CLOSED = 141  # as a shell reports a program that SIGPIPE ended


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Run a command; what it raises that is foreseeable becomes a sentence and an exit code.

    Raises:
        Exception: whatever else it raises, a bug most likely, with its traceback.
    """
    from ttt.errors import ConfigError, DamagedFileWarning, TTTError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", DamagedFileWarning)  # whatever else is asked for, and each once
            warnings.showwarning = _shown_by(warnings.showwarning)
            return command() or 0
    except ConfigError as error:
        if error.findings:
            show_findings(error.findings, stream=sys.stderr)
            show_error(str(error).rsplit("\n", 1)[-1])
        else:
            show_error(str(error))
        return error.exit_code
    except TTTError as error:
        show_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return silence_output()


def _shown_by(usual: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: this library's own for users as a sentence, the others as usual."""
    from ttt.errors import DamagedFileWarning

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, DamagedFileWarning):
            show_warning(str(message))
        else:
            usual(message, category, *place, **more)

    return show


def silence_output() -> int:
    """Let nothing more be written to an output that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
