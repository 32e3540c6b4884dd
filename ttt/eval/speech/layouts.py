"""The published layouts of benchmarks of pairs. A pair is found by its key, never by the order of rows or files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ttt.errors import EnvironmentProblem
from ttt.eval.sources import is_there, require_folder
from ttt.eval.speech.gold import Entry, read_entries, refused
from ttt.reading import other_kind

SPLITS = ("dev", "test")
_STORY = re.compile(r"(?P<key>\d+_(?P<story>.+))_(?P<member>correct|incorrect)", re.DOTALL)
_LEXICAL = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
_SYNTACTIC = ("filename", "id", "voice", "type", "subtype", "transcription", "correct")
_BANDS = ((4, "1-4"), (19, "5-19"), (99, "20-99"))
"""Bands of a word's frequency, as ZeroSpeech's package computes them (its labels say `1-5` and so on): the largest
frequency of each, and its name."""
OUT_OF_VOCABULARY = "oov"
_LONGEST_NUMBER = 18  # digits


@dataclass(frozen=True)
class Pair:
    """Two recordings of which one is correct."""

    id: str
    unit: str
    cluster: str
    correct: Path
    incorrect: Path
    tags: Mapping[str, str] = field(default_factory=dict)


def lexical_pairs(data: Path, split: str, gold: str | None) -> Iterator[Pair]:
    """The pairs of sWUGGY: every word with every non-word of its id and voice.

    Raises:
        EnvironmentProblem: the folder, the table or recordings are missing or broken; the message names file and row.
    """
    for (number, voice), entries in _grouped(data, "lexical", split, gold, _LEXICAL, ("id", "voice")).items():
        for name, right, wrong in _paired(entries, (number, voice)):
            band = frequency_band(right.row["frequency"])
            vocabulary = OUT_OF_VOCABULARY if band == OUT_OF_VOCABULARY else "in"
            tags = {"vocabulary": vocabulary, "frequency": band, "length": right.row["length"]}
            unit = _name((number,))
            yield Pair(name, unit, unit, right.audio, wrong.audio, tags)


def syntactic_pairs(data: Path, split: str, gold: str | None) -> Iterator[Pair]:
    """The pairs of sBLIMP: two sentences of one type, subtype, id and voice.

    Raises:
        EnvironmentProblem: as for `lexical_pairs`.
    """
    key = ("type", "subtype", "id", "voice")
    for values, entries in _grouped(data, "syntactic", split, gold, _SYNTACTIC, key).items():
        for name, right, wrong in _paired(entries, values):
            unit = _name(values[:-1])
            yield Pair(name, unit, unit, right.audio, wrong.audio, {"type": values[0], "subtype": values[1]})


def story_pairs(data: Path) -> Iterator[Pair]:
    """The pairs of a spoken StoryCloze set: `N_uuid_correct.wav` and `N_uuid_incorrect.wav`.

    Raises:
        EnvironmentProblem: the folder is missing, holds no such files, or one of a pair is missing.
    """
    require_folder(data)
    found = _stories(data)
    if not found:
        inside = [folder.name for folder in sorted(data.iterdir()) if folder.is_dir() and _stories(folder)]
        raise EnvironmentProblem(
            f"{data}: holds no stories, that is, no N_uuid_correct.wav and N_uuid_incorrect.wav",
            fix=f"write data: {data / inside[0]}" if inside else "name the folder that holds them",
        )
    alone = [
        f"{data / file.name}: the other ending of this story is missing"
        for members in found.values()
        for file in members.values()
        if len(members) == 1
    ]
    if alone:
        raise refused(data, alone, "recordings lack the other ending of their story", "add it, or take the story out")
    for key, members in sorted(found.items()):
        yield Pair(key, key, key.partition("_")[2], members["correct"], members["incorrect"])


def _stories(data: Path) -> dict[str, dict[str, Path]]:
    """The recordings of each story, by which ending they have."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(data.glob("*.wav")):
        match = _STORY.fullmatch(file.stem)
        if match is not None and other_kind(file) is None:
            found.setdefault(match["key"], {})[match["member"]] = file
    return found


def _table(data: Path, part: str, split: str, gold: str | None) -> tuple[Path, Path]:
    """The gold.csv of a split, and the folder of its recordings.

    Raises:
        EnvironmentProblem: there is none.
    """
    require_folder(data)
    if data.name in SPLITS and data.name != split:
        raise EnvironmentProblem(f"{data}: is the split {data.name}, and the task measures {split}", fix=_way(split))
    folders = [folder for folder in (data / part / split, data / split, data) if other_kind(folder) == "a folder"]
    if gold is not None:
        return Path(gold), next((folder for folder in folders if any(folder.glob("*.wav"))), folders[0])
    for folder in folders:
        if is_there(folder / "gold.csv"):
            return folder / "gold.csv", folder
    raise EnvironmentProblem(
        f"{data}: has no gold.csv in {part}/{split}, in {split} or itself",
        fix="name the folder of the published set, or the table with gold: FILE",
    )


def _way(split: str) -> str:
    other = next(each for each in SPLITS if each != split)
    return f"write split: {other}, or name the folder of {split}"


def _grouped(
    data: Path, part: str, split: str, gold: str | None, columns: Sequence[str], key: Sequence[str]
) -> dict[tuple[str, ...], list[Entry]]:
    """The rows of a table by their key, in its order.

    Raises:
        EnvironmentProblem: the table or rows of it cannot be used, or a pair lacks one side.
    """
    table, folder = _table(data, part, split, gold)
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in read_entries(table, folder, columns, key):
        groups.setdefault(tuple(entry.row[name] for name in key), []).append(entry)
    alone = [
        f"{entries[0].place}: no row with correct {0 if entries[0].correct else 1} has the same {', '.join(key)}"
        for entries in groups.values()
        if len({entry.correct for entry in entries}) == 1
    ]
    if alone:
        raise refused(table, alone, "pairs lack one side", "add the other row, or take this one out")
    return dict(sorted(groups.items()))


def _paired(entries: Sequence[Entry], key: Sequence[str]) -> Iterator[tuple[str, Entry, Entry]]:
    """Each correct row with each incorrect one, and the pair's name."""
    ordered = sorted(entries, key=lambda entry: str(entry.audio))
    right = [entry for entry in ordered if entry.correct]
    wrong = [entry for entry in ordered if not entry.correct]
    pairs = list(itertools.product(right, wrong))
    for number, (one, other) in enumerate(pairs):
        yield _name(key if len(pairs) == 1 else (*key, str(number))), one, other


def _name(parts: Sequence[str]) -> str:
    """One name of several parts. Different parts never make the same name."""
    return "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)


def frequency_band(frequency: str) -> str:
    """The band of a word's frequency, as ZeroSpeech reports it; the text itself if it is no number."""
    whole = frequency.strip().lower().removesuffix(".0")
    if not (whole.isascii() and whole.isdigit() and len(whole) <= _LONGEST_NUMBER):
        return whole
    if int(whole) == 0:
        return OUT_OF_VOCABULARY
    return next((name for most, name in _BANDS if int(whole) <= most), ">=100")
