"""Output to the terminal: findings, lines, diffs, errors, warnings and notes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from ttt.printable import as_line

if TYPE_CHECKING:
    from ttt.config import Finding
    from ttt.errors import TTTError


def has_color(stream: TextIO) -> bool:
    """Whether to use colour: on a terminal that supports it, unless `NO_COLOR` (https://no-color.org) is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width_of(stream: TextIO) -> int | None:
    """Columns to wrap at; None if the stream is not a terminal, so that a message stays on one line."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def show_findings(findings: Sequence[Finding], *, stream: TextIO) -> None:
    """Print findings with their places, lines and fixes; nothing if there are none."""
    from ttt.check import render_text

    if findings:
        with _heard_or_not(stream):
            print(render_text(findings, color=has_color(stream), width=width_of(stream)), file=stream)


def show(text: str = "", *, stream: TextIO | None = None, style: str = "") -> None:
    """Print one line without characters that control a terminal or a log; `style` applies if there is colour."""
    out = sys.stdout if stream is None else stream
    line = as_line(text)
    print(f"\x1b[{style}m{line}\x1b[0m" if style and has_color(out) else line, file=out)


def show_diff(diff: str) -> None:
    """Print a unified diff on standard output."""
    tints = {"+": "32", "-": "31", "@": "36"}
    for number, line in enumerate(diff.split("\n")):
        show(line, style="1" if number < 2 else tints.get(line[:1], ""))


def show_error(error: TTTError | str) -> None:
    """Print an error that ends the command; each of its details gets its own line."""
    message, details = (error, ()) if isinstance(error, str) else (error.message, error.details)
    label = "\x1b[1;31merror:\x1b[0m" if has_color(sys.stderr) else "error:"
    with _heard_or_not(sys.stderr):
        print(label, as_line(message), file=sys.stderr)
        for detail in details:
            show(f"  {detail}", stream=sys.stderr)


def show_warning(message: str) -> None:
    """Print a warning: it does not end the command, but the user has to know it."""
    label = "\x1b[1;33mwarning:\x1b[0m" if has_color(sys.stderr) else "warning:"
    with _heard_or_not(sys.stderr):
        print(label, as_line(message), file=sys.stderr)


def show_note(message: str) -> None:
    """Print a note on standard error, so that it does not mix with the output."""
    with _heard_or_not(sys.stderr):
        show(message, stream=sys.stderr)


@contextlib.contextmanager
def _heard_or_not(stream: TextIO) -> Iterator[None]:
    """Ignore that standard error cannot be written; an error of any other output is raised."""
    try:
        yield
    except OSError:
        if stream is not sys.stderr:
            raise
