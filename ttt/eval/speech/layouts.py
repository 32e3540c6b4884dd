"""The published layouts of benchmarks of pairs. A pair is found by its key, never by the order of rows or files."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ttt.errors import EnvironmentProblem
from ttt.reading import read_file, unreadable
from ttt.words import first_few

_MOST_TABLE = 1 << 28  # bytes of a gold.csv; the largest published one has 10 MB
_STORY = re.compile(r"(?P<key>(?P<number>\d+)_(?P<story>.+))_(?P<member>correct|incorrect)")
_LEXICAL = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
_SYNTACTIC = ("filename", "id", "voice", "type", "subtype", "transcription", "correct")
_BANDS = ((5, "1-5"), (20, "6-20"), (100, "21-100"))
"""Bands of a word's frequency, as ZeroSpeech reports them: the largest frequency of each, and its name."""
OUT_OF_VOCABULARY = "oov"


@dataclass(frozen=True)
class Pair:
    """Two recordings of which one is correct."""

    id: str
    unit: str
    cluster: str
    correct: Path
    incorrect: Path
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """A row of a gold.csv."""

    place: str
    row: Mapping[str, str]
    audio: Path


def lexical_pairs(data: Path, split: str, gold: str | None) -> Iterator[Pair]:
    """The pairs of sWUGGY: every word with every non-word of its id and voice.

    Raises:
        EnvironmentProblem: the folder, the table or recordings are missing or broken; the message names file and row.
    """
    table = _table(data, "lexical", split, gold)
    for (number, voice), entries in _grouped(_entries(table, _LEXICAL), ("id", "voice"), table).items():
        for name, right, wrong in _paired(entries, f"{number}-{voice}"):
            frequency = right.row["frequency"].strip().lower()
            tags = {
                "vocabulary": OUT_OF_VOCABULARY if frequency == OUT_OF_VOCABULARY else "in",
                "frequency": _band(frequency),
                "length": right.row["length"].strip(),
            }
            yield Pair(name, number, number, right.audio, wrong.audio, tags)


def syntactic_pairs(data: Path, split: str, gold: str | None) -> Iterator[Pair]:
    """The pairs of sBLIMP: two sentences of one type, subtype, id and voice.

    Raises:
        EnvironmentProblem: as for `lexical_pairs`.
    """
    table = _table(data, "syntactic", split, gold)
    key = ("type", "subtype", "id", "voice")
    for (kind, subtype, number, voice), entries in _grouped(_entries(table, _SYNTACTIC), key, table).items():
        unit = f"{kind}/{subtype}/{number}"
        for name, right, wrong in _paired(entries, f"{unit}-{voice}"):
            yield Pair(name, unit, unit, right.audio, wrong.audio, {"type": kind, "subtype": subtype})


def story_pairs(data: Path) -> Iterator[Pair]:
    """The pairs of a spoken StoryCloze set: `N_uuid_correct.wav` and `N_uuid_incorrect.wav`.

    Raises:
        EnvironmentProblem: the folder is missing, holds no such files, or one of a pair is missing.
    """
    _require_folder(data)
    found: dict[str, dict[str, Path]] = {}
    stories: dict[str, str] = {}
    for file in sorted(data.glob("*.wav")):
        match = _STORY.fullmatch(file.stem)
        if match is not None:
            found.setdefault(match["key"], {})[match["member"]] = file
            stories[match["key"]] = match["story"]
    if not found:
        raise EnvironmentProblem(
            f"{data}: holds no stories; they are called N_uuid_correct.wav and N_uuid_incorrect.wav"
        )
    alone = [str(next(iter(pair.values()))) for pair in found.values() if len(pair) == 1]
    if alone:
        raise EnvironmentProblem(
            f"{data}: {len(alone)} recordings lack the other ending of their story: {first_few(alone)}"
        )
    for key, pair in found.items():
        yield Pair(key, key, stories[key], pair["correct"], pair["incorrect"])


def _require_folder(data: Path) -> None:
    if not data.is_dir():
        raise EnvironmentProblem(f"{data}: {'is not a folder' if data.exists() else 'there is no such folder'}")


def _table(data: Path, part: str, split: str, gold: str | None) -> tuple[Path, Path]:
    """The gold.csv of a split and the folder of its recordings.

    Raises:
        EnvironmentProblem: there is none.
    """
    _require_folder(data)
    folders = [folder for folder in (data / part / split, data / split, data) if folder.is_dir()]
    if gold is not None:
        return Path(gold), next((f for f in folders if any(f.glob("*.wav"))), folders[0])
    for folder in folders:
        if (folder / "gold.csv").is_file():
            return folder / "gold.csv", folder
    raise EnvironmentProblem(
        f"{data}: has no gold.csv in {part}/{split}, in {split} or itself; name the folder of the published set, or "
        f"the table with gold: FILE"
    )


def _entries(table: tuple[Path, Path], columns: Sequence[str]) -> Iterator[_Entry]:
    """The rows of a gold.csv, with their recordings.

    Raises:
        EnvironmentProblem: the table cannot be read, or lacks a column.
    """
    gold, folder = table
    try:
        text = read_file(gold, limit=_MOST_TABLE).decode("utf-8-sig")
    except OSError as error:
        raise EnvironmentProblem(f"{gold}: cannot be read: {unreadable(error)}") from None
    except UnicodeDecodeError:
        raise EnvironmentProblem(f"{gold}: is not text in UTF-8") from None
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise EnvironmentProblem(f"{gold}: has no column {', '.join(missing)}; a gold.csv has {', '.join(columns)}")
    for row in reader:
        values = {name: row[name] for name in columns}
        place = f"{gold}:{reader.line_num}"
        if None in values.values():
            raise EnvironmentProblem(f"{place}: has fewer columns than the first line")
        name = values["filename"].strip()
        if not name or "\0" in name:
            raise EnvironmentProblem(f"{place}: names no file")
        yield _Entry(place, values, folder / (name if name.endswith(".wav") else f"{name}.wav"))


def _grouped(
    entries: Iterator[_Entry], key: Sequence[str], table: tuple[Path, Path]
) -> dict[tuple[str, ...], list[_Entry]]:
    """The rows by their key, in its order.

    Raises:
        EnvironmentProblem: recordings are missing, `correct` is neither 0 nor 1, or there are no rows.
    """
    groups: dict[tuple[str, ...], list[_Entry]] = {}
    problems: list[str] = []
    for entry in entries:
        if entry.row["correct"].strip() not in ("0", "1"):
            problems.append(f"{entry.place}: correct is {entry.row['correct']!r:.40}, not 0 or 1")
        elif not entry.audio.is_file():
            problems.append(f"{entry.place}: no file {entry.audio}")
        groups.setdefault(tuple(entry.row[name].strip() for name in key), []).append(entry)
    if problems:
        raise EnvironmentProblem.about(problems, "rows cannot be used", where=str(table[0]))
    if not groups:
        raise EnvironmentProblem(f"{table[0]}: has no rows")
    alone = [entries[0].place for entries in groups.values() if len({e.row["correct"].strip() for e in entries}) == 1]
    if alone:
        raise EnvironmentProblem(f"{table[0]}: {len(alone)} pairs lack one side, as at {first_few(alone)}")
    return dict(sorted(groups.items()))


def _paired(entries: Sequence[_Entry], name: str) -> Iterator[tuple[str, _Entry, _Entry]]:
    """Each correct row with each incorrect one, and the pair's name."""
    ordered = sorted(entries, key=lambda entry: entry.audio.name)
    right = [entry for entry in ordered if entry.row["correct"].strip() == "1"]
    wrong = [entry for entry in ordered if entry.row["correct"].strip() == "0"]
    pairs = list(itertools.product(right, wrong))
    for number, (one, other) in enumerate(pairs):
        yield name if len(pairs) == 1 else f"{name}-{number}", one, other


def _band(frequency: str) -> str:
    """The band of a frequency, as ZeroSpeech reports it; the text itself if it is no number."""
    if not frequency.isdigit():
        return frequency
    return next((name for most, name in _BANDS if int(frequency) <= most), ">100")
