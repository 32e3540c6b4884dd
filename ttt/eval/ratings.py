"""Human pairwise ratings: a folder for raters that hides the arms, and reading what they filled in.

A rater gets a folder with `ratings.csv` and `clips/`. Each row is a comparison of two clips of one prompt; which arm is
on the left is drawn, and names of clips say nothing of arms. The rater writes `left`, `right` or `tie` under `winner`.
A key, kept elsewhere, says which side is which.

    write_sheet(Path("raters"), Path("key.csv"), comparisons, seed=0)
    ratings = read_ratings(Path("key.csv"), [Path("anna.csv"), Path("ben.csv")])

What follows from ratings is in `strengths.py`. This module imports no torch.
"""

from __future__ import annotations

import csv
import errno
import io
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import write_text, writing
from ttt.printable import shortened
from ttt.reading import MAX_JSON, read_text, unreadable
from ttt.words import first_few

SHEET = "ratings.csv"
CLIPS = "clips"
_SHEET_COLUMNS = ("comparison", "prompt", "left", "right", "winner")
_KEY_COLUMNS = ("comparison", "prompt", "left", "right", "left_arm", "right_arm")
_SCORES = {"left": 1.0, "right": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Comparison:
    """Two arms' clips of one prompt."""

    prompt: str
    """What the clips were made from, as raters read it. Ratings of one prompt form a cluster."""
    files: Mapping[str, Path]
    """The clip of each of two arms."""


@dataclass(frozen=True)
class Rating:
    """What one rater said of one comparison."""

    comparison: str
    """Its number on the sheet."""
    prompt: str
    left: str
    """The arm that was on the left."""
    right: str
    """The arm that was on the right."""
    score: float
    """Of the left arm: 1 if it won, 0 if it lost, ½ for a tie."""


def write_sheet(folder: Path, key: Path, comparisons: Sequence[Comparison], *, seed: int) -> None:
    """Write a folder for raters, and the key to it.

    Args:
        folder: is made; a rater gets it whole.
        key: where the key goes, outside `folder`.
        comparisons: what is compared. Their order, and which arm is on the left, is drawn.
        seed: of the draw.

    Raises:
        UsageError: the folder holds something; the key would lie in it; there are no comparisons, or one is not of two
            arms.
        EnvironmentProblem: a clip is missing or cannot be copied, or the place cannot be written.
    """
    _require_writable(folder, key, comparisons)
    generator = random.Random(seed)
    drawn = list(comparisons)
    generator.shuffle(drawn)
    rows = []
    for number, comparison in enumerate(drawn, 1):
        arms = sorted(comparison.files)
        generator.shuffle(arms)
        names = [_copied(comparison.files[arm], folder, number, side) for arm, side in zip(arms, _SCORES, strict=False)]
        rows.append([str(number), comparison.prompt, *names, *arms])
    write_text(key, _as_csv(_KEY_COLUMNS, rows))
    write_text(folder / SHEET, _as_csv(_SHEET_COLUMNS, [[*row[:4], ""] for row in rows]))


def read_ratings(key: Path, sheets: Sequence[Path], *, arms: Sequence[str] | None = None) -> list[Rating]:
    """The ratings in sheets that were filled in, one for each rater. A row with a blank `winner` is not rated.

    Args:
        key: as `write_sheet` wrote it.
        sheets: of the raters; a spreadsheet program may have saved them with `;` or tabs.
        arms: the arms that the key may name; None is any.

    Raises:
        EnvironmentProblem: a file is missing or cannot be read.
        UsageError: a file is not what it should be; the message names file and line.
    """
    rows = _read_key(key, arms)
    ratings = [rating for sheet in sheets for rating in _read_sheet(sheet, key, rows)]
    if not ratings:
        raise UsageError(f"{first_few(sheets) or key}: nothing is rated; write left, right or tie under `winner`")
    return ratings


# --- sheets and keys ---


class _Row(NamedTuple):
    """A row of a CSV file."""

    place: str
    """`file.csv:3`."""
    cells: dict[str, str]


def _require_writable(folder: Path, key: Path, comparisons: Sequence[Comparison]) -> None:
    if not comparisons:
        raise UsageError("there is nothing to compare; give clips of two arms")
    for comparison in comparisons:
        if len(comparison.files) != 2:
            named = ", ".join(sorted(comparison.files)) or "none"
            raise UsageError(f"{shortened(comparison.prompt, 60)!r} has clips of {named}; a comparison is of two arms")
        for file in comparison.files.values():
            if not file.is_file():
                raise EnvironmentProblem(f"{file}: no such file; make the clips of both arms first")
    if folder.resolve() in key.resolve().parents:
        raise UsageError(f"{key}: raters would see the key; write it outside {folder}")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: holds files already; name a new folder for the raters")


def _copied(source: Path, folder: Path, number: int, side: str) -> str:
    """Copy a clip under a name that does not tell its arm; the name is relative to the folder."""
    name = f"{CLIPS}/{number:04d}-{side}{source.suffix}"
    with writing(folder / name):
        (folder / CLIPS).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    return name


def _as_csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def _read_key(key: Path, arms: Sequence[str] | None) -> dict[str, _Row]:
    """The rows of a key by comparison."""
    rows = _by_comparison(key, _KEY_COLUMNS)
    for row in rows.values():
        left, right = row.cells["left_arm"], row.cells["right_arm"]
        if left == right:
            raise UsageError(f"{row.place}: both sides are of arm {left!r}; a comparison is of two arms")
        for arm in (left, right):
            if not arm or (arms is not None and arm not in arms):
                known = f"; the arms are {', '.join(arms)}" if arms is not None else "; write an arm's name"
                raise UsageError(f"{row.place}: there is no arm {shortened(arm, 60)!r}{known}")
    return rows


def _read_sheet(sheet: Path, key: Path, keyed: Mapping[str, _Row]) -> Iterator[Rating]:
    rows = _by_comparison(sheet, _SHEET_COLUMNS)
    for number, row in rows.items():
        if number not in keyed:
            raise UsageError(f"{row.place}: comparison {number!r} is not in {key}; read the sheet with its own key")
        yield from _rating(row, keyed[number])
    for number, row in keyed.items():
        if number not in rows:
            raise UsageError(
                f"{sheet}: has no row for comparison {number!r} ({row.place}); "
                f"put the row back, with a blank `winner` if it is not rated"
            )


def _rating(row: _Row, keyed: _Row) -> Iterator[Rating]:
    """The rating in a row, if it holds one."""
    for column in ("left", "right"):
        if row.cells[column] != keyed.cells[column]:
            raise UsageError(
                f"{row.place}: `{column}` is {shortened(row.cells[column], 60)!r}, but {keyed.cells[column]!r} in the "
                f"key ({keyed.place}); columns were sorted apart, or the key is another sheet's"
            )
    winner = row.cells["winner"].casefold()
    if not winner:
        return
    if winner not in _SCORES:
        raise UsageError(
            f"{row.place}: the winner is {shortened(row.cells['winner'], 60)!r}; write left, right or tie, or nothing"
        )
    yield Rating(
        comparison=row.cells["comparison"],
        prompt=keyed.cells["prompt"],
        left=keyed.cells["left_arm"],
        right=keyed.cells["right_arm"],
        score=_SCORES[winner],
    )


def _by_comparison(file: Path, columns: Sequence[str]) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    for row in _rows(file, columns):
        number = row.cells["comparison"]
        if number in rows:
            raise UsageError(f"{row.place}: comparison {number!r} stands in {rows[number].place} too; leave one out")
        rows[number] = row
    return rows


def _rows(file: Path, columns: Sequence[str]) -> Iterator[_Row]:
    """The rows of a CSV file that are not blank, cells without spaces around, each with the line it begins on."""
    text = _text(file)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            place, line = f"{file}:{line}", reader.line_num + 1
            cells = [cell.strip() for cell in cells]
            if header is None:
                header = [cell.casefold() for cell in cells]
                _require_columns(place, header, columns)
            elif any(cells):
                if len(cells) != len(header):
                    raise UsageError(f"{place}: has {len(cells)} cells, the first line {len(header)}; mend the row")
                yield _Row(place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UsageError(f"{file}:{reader.line_num}: is not CSV: {error}") from None
    if header is None:
        raise UsageError(f"{file}: is empty; its first line names the columns {', '.join(columns)}")


def _text(file: Path) -> str:
    try:
        return read_text(file, limit=MAX_JSON)
    except FileNotFoundError:
        raise EnvironmentProblem(f"{file}: no such file") from None
    except OSError as error:
        if error.errno == errno.EILSEQ:
            raise UsageError(f"{file}: {unreadable(error)}; it is to be CSV in UTF-8") from None
        raise EnvironmentProblem(f"{file}: cannot be read: {unreadable(error)}") from None


def _delimiter(text: str) -> str:
    """What separates the cells of the first line: a spreadsheet program writes its country's."""
    first = text.partition("\n")[0]
    return max(",;\t", key=first.count)


def _require_columns(place: str, header: Sequence[str], columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in header]
    if missing:
        raise UsageError(f"{place}: there is no column {missing[0]!r}; the columns are {', '.join(columns)}")
    twice = [column for column in columns if header.count(column) > 1]
    if twice:
        raise UsageError(f"{place}: the column {twice[0]!r} stands there twice; leave one out")
