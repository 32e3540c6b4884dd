"""ZeroSpeech's `gold.csv`: a row for each recording, with what is said in it and whether it is the correct one.

The table is not trusted: encodings, quotes, missing columns and rows that stand there twice are told with their line.
"""

from __future__ import annotations

import csv
import errno
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ttt.errors import EnvironmentProblem
from ttt.printable import shortened
from ttt.reading import read_text, require_file, unreadable
from ttt.words import first_entries

_MOST_TABLE = 1 << 28  # bytes; the largest published one has 10 MB
_NAMED = 5
_LONGEST = 60  # characters of a value in a message


@dataclass(frozen=True)
class Entry:
    """A row of a gold.csv."""

    place: str
    """`FILE:LINE`."""
    row: Mapping[str, str]
    """Values by column, without blanks around them."""
    audio: Path
    """Its recording."""

    @property
    def correct(self) -> bool:
        """Whether it is the correct one of its pair."""
        return self.row["correct"] == "1"


def read_entries(gold: Path, folder: Path, columns: Sequence[str], key: Sequence[str]) -> list[Entry]:
    """The rows of a gold.csv, with their recordings.

    Args:
        gold: the table.
        folder: of the recordings.
        columns: what the table must have.
        key: the columns that say which rows belong together; none of them is empty.

    Raises:
        EnvironmentProblem: the table cannot be read, lacks a column, or rows of it cannot be used; the message names
            their lines.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    lines: dict[Path, str] = {}
    for place, row in _rows(gold, columns):
        name = row["filename"]
        entry = Entry(place, row, folder / (name if name.casefold().endswith(".wav") else f"{name}.wav"))
        wrong = _wrong_in(entry, key)
        if wrong is None and entry.audio in lines:
            wrong = f"names the recording of line {lines[entry.audio].rpartition(':')[2]} again"
        lines.setdefault(entry.audio, place)
        if wrong is not None:
            problems.append(f"{place}: {wrong}")
        entries.append(entry)
    if problems:
        raise refused(gold, problems, "rows cannot be used", "mend the table, or name the folder of its recordings")
    if not entries:
        raise EnvironmentProblem(f"{gold}: has no rows", fix="write a row for each recording")
    return entries


def refused(where: Path, problems: Sequence[str], what: str, fix: str) -> EnvironmentProblem:
    """One error about several problems. A single one is the whole message."""
    if len(problems) == 1:
        return EnvironmentProblem(problems[0], fix=fix)
    return EnvironmentProblem(f"{where}: {len(problems):,} {what}", details=first_entries(problems, _NAMED), fix=fix)


def _wrong_in(entry: Entry, key: Sequence[str]) -> str | None:
    """What is wrong with a row; None if nothing is."""
    row, name = entry.row, entry.row["filename"]
    if not name:
        return "names no file"
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts:
        return f"the filename {_told(name)} leads out of the folder of recordings"
    if row["correct"] not in ("0", "1"):
        return f"correct is {_told(row['correct'])}, not 0 or 1"
    empty = [column for column in key if not row[column]]
    if empty:
        return f"has no {empty[0]}"
    try:
        require_file(entry.audio)
    except FileNotFoundError:
        return f"there is no file {entry.audio}"
    except OSError as error:
        return f"{_told(str(entry.audio))}: {unreadable(error)}"
    return None


def _told(value: str) -> str:
    return repr(shortened(value, _LONGEST))


def _rows(gold: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and values of each row.

    Raises:
        EnvironmentProblem: the table cannot be read as one.
    """
    reader = csv.reader(io.StringIO(_text(gold), newline=""))
    line = 1
    try:
        header = [name.strip() for name in next(reader, ())]
        _require_columns(gold, header, columns)
        line = reader.line_num + 1
        for cells in reader:
            place, line = f"{gold}:{line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                raise EnvironmentProblem(
                    f"{place}: has {len(cells)} columns, and the first line has {len(header)}",
                    fix="put quotes around a value with a comma in it",
                )
            yield place, {name: value.strip() for name, value in zip(header, cells, strict=True) if name in columns}
    except csv.Error as error:
        raise EnvironmentProblem(
            f"{gold}:{line}: is no row of a table: {error}", fix="write a value for each column, separated by commas"
        ) from None


def _require_columns(gold: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in header]
    twice = [name for name in columns if header.count(name) > 1]
    if missing or twice:
        told = f"has no column {', '.join(missing)}" if missing else f"has the column {twice[0]} twice"
        raise EnvironmentProblem(f"{gold}: {told}", fix=f"a gold.csv begins with the line {','.join(columns)}")


def _text(gold: Path) -> str:
    try:
        text = read_text(gold, limit=_MOST_TABLE)
    except OSError as error:
        fix = "" if error.errno == errno.EILSEQ else "name the table with gold: FILE"
        raise EnvironmentProblem(f"{gold}: cannot be read: {unreadable(error)}", fix=fix) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise EnvironmentProblem(f"{gold}:{line}: holds a NUL, so it is no text", fix="write it as UTF-8")
    return text
