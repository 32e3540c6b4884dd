"""Text from elsewhere made safe to show: names, metadata, other programs' words.

A file's name may hold a line break, an adapter's metadata an escape sequence, a transcript a letter that turns the line
around. Shown as they are, they steer the terminal, or forge a line of ours or a command to a log that reads commands.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_ESCAPES = {"[": r"\x5b", "\n": r"\n", "\r": r"\r", "\t": r"\t", "'": r"\'", "\\": r"\\"}


def printable(text: str) -> str:
    """The text in one line and without what would steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def as_line(text: str) -> str:
    """A whole line to be shown: `printable`, and no workflow command.

    GitHub's runner takes a line for a command if it begins with `::`, after any spaces, or holds `##[`
    (actions/runner, `ActionCommand.cs`).
    """
    text = printable(text).replace("##[", "##(")
    return re.sub(r"^(\s*):(?=:)", r"\1: ", text)


def say(console: Console, text: str) -> None:
    """Print a line: not wrapped, not highlighted, brackets kept, with nothing in it that steers a terminal or a log."""
    console.print(as_line(text), soft_wrap=True, highlight=False, markup=False, emoji=False)


def shortened(text: str, most: int) -> str:
    """The text in at most `most` characters, marked if it was longer."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """JSON in its own letters, with escapes for what would steer a terminal or a log."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    lines = text.replace("##[", r"##\u005b").split("\n")
    return "\n".join(line if line.isprintable() else "".join(map(_json_escaped, line)) for line in lines)


def _json_escaped(character: str) -> str:
    if character.isprintable():
        return character
    return r"\u007f" if character == "\x7f" else json.dumps(character)[1:-1]  # json leaves DEL as it is


def shell_word(path: str | os.PathLike[str]) -> str:
    """A path as one word of a command line, to be shown and pasted: `$'…'` if a character cannot be shown."""
    text = os.fspath(path)
    text = f"./{text}" if text.startswith("-") else text  # or it would be an option
    if text.isprintable() and "##[" not in text:
        return shlex.quote(text)
    return f"$'{''.join(_shell_escaped(character) for character in text)}'"


def _shell_escaped(character: str) -> str:
    code = ord(character)
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\U{code:08x}"
