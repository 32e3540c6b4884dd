"""The documents in text files, lines of `.jsonl` files and rows of `.parquet` files; imports no torch.

They are checked as far as possible before the first is read, so that a run that cannot start says so at once.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from ttt.errors import EnvironmentProblem
from ttt.jsonl import Line, parse_object, read_jsonl, value_in_words
from ttt.reading import other_kind, read_text, unreadable
from ttt.words import first_few, first_line

LARGEST = 1 << 30
"""Bytes of the largest text file that is read."""
LONGEST_LINE = 64 << 20
"""Bytes of the longest line of a `.jsonl` file, which may hold a book."""
TEXT = (".txt", ".md")
"""Text files that are looked for in a folder; a file that the config names may have any name."""
LINES, ROWS = ".jsonl", ".parquet"


@dataclass(frozen=True)
class Document:
    """A text that is read from its beginning, and the place where it is."""

    file: Path
    number: int | None
    """Of its line or row, from 1; None if it is the whole file."""
    text: str

    @property
    def place(self) -> str:
        """`folder/list.jsonl:3`."""
        return place_of(str(self.file), self.number)


def place_of(file: str, number: int | None) -> str:
    """`folder/list.jsonl:3`; the file alone if the document is all of it."""
    return file if number is None else f"{file}:{number}"


@dataclass(frozen=True)
class Source:
    """The files that a config's value means, and what else lies in the folder."""

    files: tuple[Path, ...]
    others: int = 0
    """Files in the folder that are not read."""
    other_endings: tuple[str, ...] = ()
    """What their names end in."""

    @property
    def notice(self) -> str | None:
        """What a user must know of files that are not read."""
        if not self.others:
            return None
        return f"{self.others} other files there are not read ({first_few(self.other_endings)})"


def find_source(written: str | Path, *, field: str, most: int | None = None) -> Source:
    """The files with documents that a config's value names.

    Args:
        written: a file, or a folder with files at any depth.
        field: the config key of it, with which messages begin.
        most: how many entries of a folder to look at, for a check that must be instant; None is all.

    Raises:
        EnvironmentProblem: there is no such file or folder, or the folder holds none.
    """
    path = Path(written)
    kind = other_kind(path)
    if kind == "a folder":
        return _in_folder(path, field, most)
    try:
        there = path.exists()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if kind is not None or not there:
        told = f"is {kind}, not a file" if kind is not None else "does not exist"
        raise EnvironmentProblem(
            f"{path} {told}", key=field, fix="name a text file, a .jsonl, a .parquet, or a folder of them"
        )
    return Source((path,))


def _in_folder(folder: Path, field: str, most: int | None) -> Source:
    try:
        entries = list(islice(folder.rglob("*"), most))
        found = sorted(file for file in entries if file.is_file())
    except OSError as error:
        raise EnvironmentProblem(f"{folder}: cannot be read: {unreadable(error)}", key=field) from None
    mine = tuple(file for file in found if file.suffix.lower() in (*TEXT, LINES, ROWS))
    if not mine and len(entries) != most:
        endings = " or ".join((*TEXT, LINES, ROWS))
        raise EnvironmentProblem(
            f"{folder} holds no {endings} file" + (f", but {len(found)} others" if found else "; it is empty"),
            key=field,
            fix="name a file, or a folder with such files",
        )
    others = Counter(file.suffix or file.name for file in found if file not in set(mine))
    return Source(mine, sum(others.values()), tuple(ending for ending, _ in others.most_common()))


def read_documents(source: Source, *, text_key: str, field: str) -> Iterator[Document]:
    """The documents of the files, in order.

    Args:
        source: the files.
        text_key: the key or column of the text.
        field: the config key, with which messages begin.

    Raises:
        EnvironmentProblem: a file, line or row cannot be read; the message names the place.
    """
    require_good_lines(source.files, text_key=text_key, field=field)
    for file in source.files:
        kind = file.suffix.lower()
        if kind == LINES:
            for line in read_jsonl(file, limit=LONGEST_LINE):
                yield Document(file, line.number, parse_object(line.content)[text_key])
        elif kind == ROWS:
            yield from _read_rows(file, text_key, field)
        else:
            yield Document(file, None, _read_text(file, field))


def _read_text(file: Path, field: str) -> str:
    try:
        return read_text(file, limit=LARGEST, prose=True)
    except OSError as error:
        fix = "or leave it out" if error.errno == errno.EILSEQ else ""
        raise EnvironmentProblem(f"{file}: cannot be read: {unreadable(error)}", key=field, fix=fix) from None


# --- lines ---


def require_good_lines(files: Sequence[Path], *, text_key: str, field: str) -> None:
    """Refuse lines that hold no text.

    Raises:
        EnvironmentProblem: naming the first few of them.
    """
    problems = [
        f"{line.place}: {problem}"
        for file in files
        if file.suffix.lower() == LINES
        for line in read_jsonl(file, limit=LONGEST_LINE)
        for problem in [wrong_with_line(line, text_key)]
        if problem is not None
    ]
    if problems:
        raise EnvironmentProblem.about(problems, "lines cannot be used", where=field)


def wrong_with_line(line: Line, text_key: str) -> str | None:
    """Why a line holds no text, and the way out; None if it does."""
    fix = f"write lines such as {example_line(text_key)}"
    try:
        entry = parse_object(line.content)
    except ValueError as error:
        return f"{error}; {fix}"
    if text_key not in entry:
        held = ", ".join(entry) or "no keys"
        return f"has no {text_key!r} (it has {held[:80]}); write data.text_key: KEY with the key of the text"
    if not isinstance(entry[text_key], str):
        return f"{text_key!r} is {value_in_words(entry, text_key)}, not a text; {fix}"
    return None


def example_line(text_key: str) -> str:
    """A good line, for messages."""
    return f'{{"{text_key}": "Once upon a time …"}}'


# --- rows ---


def _read_rows(file: Path, text_key: str, field: str) -> Iterator[Document]:
    """The rows of a Parquet file, a few at a time; `datasets` reads them, and writes no copy."""
    if find_spec("datasets") is None:
        raise EnvironmentProblem(
            f"{file}: reading Parquet needs the package datasets", key=field, fix="pip install datasets"
        )
    try:
        rows = _rows(file)
        columns = list(rows.features or {})
        if text_key not in columns:
            told = f"has no column {text_key!r}, but {first_few(columns, 8)}"
            raise EnvironmentProblem(f"{file}: {told}", key=field, fix="write data.text_key: COLUMN")
        for number, row in enumerate(rows.select_columns([text_key]), 1):
            if not isinstance(row[text_key], str):
                raise EnvironmentProblem(
                    f"{file}: row {number}: {text_key!r} is {value_in_words(row, text_key)}, not a text",
                    key=field,
                    fix="leave such rows out, or write data.text_key with a column of texts",
                )
            yield Document(file, number, row[text_key])
    except (EnvironmentProblem, GeneratorExit):
        raise
    except Exception as error:  # datasets and pyarrow raise errors of many kinds
        raise EnvironmentProblem(f"{file}: cannot be read as Parquet: {first_line(error)}", key=field) from error


def _rows(file: Path) -> Any:
    import datasets

    return datasets.load_dataset("parquet", data_files=[str(file)], split="train", streaming=True)
