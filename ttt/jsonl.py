"""Lists in `.jsonl` files: a JSON object on each line, which names files relative to the folder of the list.

Backbones read their data from such lists, and `ttt check` reads the first lines of them. A blank line is skipped, a
line may not be longer than 1 MiB unless a caller says so, and what cannot be read is told with its place. This module
imports no torch.
"""

from __future__ import annotations

import errno
import json
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ttt.checksums import no_duplicates
from ttt.errors import EnvironmentProblem
from ttt.printable import shortened
from ttt.reading import MAX_LINE, read_lines, unreadable

_SHOWN = 120
"""Characters of a value or of a parser's message that are told."""


class Line(NamedTuple):
    """A line of a list."""

    file: Path
    number: int
    """From 1."""
    content: bytes
    """Without the line's end."""

    @property
    def place(self) -> str:
        """`folder/list.jsonl:3`."""
        return f"{self.file}:{self.number}"

    @property
    def short_place(self) -> str:
        """`list.jsonl:3`."""
        return f"{self.file.name}:{self.number}"

    @property
    def folder(self) -> Path:
        """What its paths are relative to."""
        return self.file.parent


@dataclass(frozen=True)
class Excerpt:
    """The first lines of one list or of several."""

    lines: Sequence[Line]
    complete: bool
    """Whether they are all."""
    broken_off: Mapping[Path, str] = field(default_factory=dict)
    """Lists with a line that is longer than a run reads, and which: the lines before it were read."""
    foreign: Mapping[Path, str] = field(default_factory=dict)
    """Lists that are something else, such as compressed: what they are, and the way out. Nothing of them was read."""


def jsonl_files(source: Path) -> list[Path]:
    """The lists that a config's value means: the file itself, or the `.jsonl` files in a folder at any depth."""
    return sorted(source.rglob("*.jsonl")) if source.is_dir() else [source]


def read_jsonl(file: Path, *, limit: int = MAX_LINE, most_bytes: int | None = None) -> Iterator[Line]:
    """The lines of a list that are not blank.

    Args:
        file: the list.
        limit: bytes of the longest line.
        most_bytes: where to stop; a line that lies across is left out.

    Raises:
        EnvironmentProblem: the file cannot be read, or a line is too long; the message names the file.
    """
    try:
        yield from _lines(file, limit, most_bytes)
    except OSError as error:
        raise EnvironmentProblem(f"{file}: cannot be read: {unreadable(error)}") from None


def _lines(file: Path, limit: int, most_bytes: int | None) -> Iterator[Line]:
    for number, content in read_lines(file, limit=limit, most=most_bytes):
        yield Line(file, number, content)


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    r"""The lines of a text that was read already, if not blank, with their numbers from 1 and no spaces around.

    A line ends with `\n` alone: other characters that `str.splitlines` splits at may stand in JSON.
    """
    stripped = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return ((number, line) for number, line in stripped if line)


def read_excerpt(source: str | Path, *, most_lines: int, most_bytes: int, limit: int = MAX_LINE) -> Excerpt | None:
    """The first lines of the lists that a config's value means; None if there is no such file, or it cannot be read.

    Args:
        source: a list, or a folder with lists at any depth.
        most_lines: how many lines to read, of all lists together.
        most_bytes: how many bytes.
        limit: bytes of the longest line.
    """
    lines: list[Line] = []
    broken_off: dict[Path, str] = {}
    foreign: dict[Path, str] = {}
    complete = True
    try:
        if not Path(source).exists():
            return None
        for file in jsonl_files(Path(source)):
            size = file.stat().st_size
            try:
                for line in _lines(file, limit, most_bytes):
                    if len(lines) == most_lines:
                        return Excerpt(lines, complete=False, broken_off=broken_off, foreign=foreign)
                    lines.append(line)
            except OSError as error:
                if error.errno not in (errno.EFBIG, errno.EILSEQ):
                    raise
                if error.errno == errno.EILSEQ:
                    foreign[file] = unreadable(error)
                else:
                    broken_off[file], complete = unreadable(error), False
                continue
            complete = complete and size <= most_bytes
            most_bytes = max(most_bytes - size, 0)
    except (OSError, ValueError):  # gone, not readable, or a name that no file can have
        return None
    return Excerpt(lines, complete, broken_off, foreign)


def parse_object(content: bytes, *, unique_keys: bool = False) -> dict[str, Any]:
    """The JSON object in a line.

    Args:
        content: the line.
        unique_keys: refuse an object in which a key stands twice, instead of taking the last.

    Raises:
        ValueError: there is none; the message says why, "no JSON (…)" or "not an object".
    """
    try:
        entry = json.loads(_decoded(content), object_pairs_hook=no_duplicates if unique_keys else None)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and b"\r" in content:
            raise ValueError("no JSON (its lines end with CR alone, so all are one; end them with LF)") from None
        raise ValueError(f"no JSON ({shortened(str(error), _SHOWN)})") from None
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    return entry


def _decoded(content: bytes) -> str:
    """The text of a line.

    Raises:
        ValueError: it is none; the message says what it is instead.
    """
    if b"\0" in content:
        raise ValueError("it holds NUL bytes: UTF-16 without its mark, or a file not written to its end")
    try:
        return content.removeprefix(BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start + 1}, 0x{content[error.start]:02x}, is not UTF-8; save the file as UTF-8, from Latin-1 "
            f"by iconv -f LATIN1 -t UTF-8"
        ) from None


def path_in(entry: Mapping[str, Any], key: str) -> str | None:
    """The path under a key; None if there is none that a file can have."""
    value = entry.get(key)
    return value if isinstance(value, str) and value and "\0" not in value else None


def number_in(entry: Mapping[str, Any], key: str) -> float | None:
    """The number under a key; None if there is none, or none that is finite."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def value_in_words(entry: Mapping[str, Any], key: str) -> str:
    """What stands under a key, as Python writes it and not too long; "missing" if nothing does."""
    return shortened(repr(entry[key]), _SHOWN) if key in entry else "missing"
