"""What goes to the terminal, and how."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from ttt.config import Finding


def has_color(stream: TextIO) -> bool:
    """Whether to colour: on a terminal that can, unless `NO_COLOR` (https://no-color.org) asks for none."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width_of(stream: TextIO) -> int | None:
    """Columns to wrap at; None where nobody reads along, so that a message stays on one line."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def show_findings(findings: Sequence[Finding], *, stream: TextIO) -> None:
    """Print findings with their places, lines and fixes; nothing where there are none."""
    from ttt.config import render_text

    if findings:
        print(render_text(findings, color=has_color(stream), width=width_of(stream)), file=stream)


def show_diff(diff: str) -> None:
    """Print a unified diff on standard output."""
    tints = {"+": "32", "-": "31", "@": "36"}
    color = has_color(sys.stdout)
    for number, line in enumerate(diff.splitlines()):
        tint = "1" if number < 2 else tints.get(line[:1])
        print(f"\x1b[{tint}m{line}\x1b[0m" if color and tint else line)


def show_error(message: str) -> None:
    """Print an error that ends the command."""
    label = "\x1b[1;31merror:\x1b[0m" if has_color(sys.stderr) else "error:"
    print(label, message, file=sys.stderr)


def show_warning(message: str) -> None:
    """Print what does not end the command, and has to be known."""
    label = "\x1b[1;33mwarning:\x1b[0m" if has_color(sys.stderr) else "warning:"
    print(label, message, file=sys.stderr)


def show_note(message: str) -> None:
    """Print something by the way, where it does not mix with the output."""
    print(message, file=sys.stderr)
