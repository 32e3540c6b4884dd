"""The layouts in which the benchmarks are published, written and read.

swuggy/lexical/{dev,test}/*.wav        gold.csv beside them (ZeroSpeech 2021)
sblimp/syntactic/{dev,test}/*.wav      gold.csv beside them (ZeroSpeech 2021)
tstory/, sstory/                       N_uuid_correct.wav and N_uuid_incorrect.wav (SpokenStoryCloze)
librilight/SPEAKER/BOOK/*.flac         a .json beside each (Libri-Light)
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

LEXICAL = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
SYNTACTIC = ("filename", "id", "voice", "type", "subtype", "transcription", "correct")
SPLITS = ("dev", "test")
ZEROSPEECH = {"swuggy": ("lexical", LEXICAL), "sblimp": ("syntactic", SYNTACTIC)}
"""By task: its folder, and the columns of its `gold.csv`."""
STORIES = ("tstory", "sstory")


@dataclass(frozen=True)
class Pair:
    """Two files, one right and one wrong, of the same voice."""

    unit: str
    """What the voices of a pair share: its id, or the story."""
    voice: str
    correct: Path
    incorrect: Path


def zerospeech_folder(root: Path, task: str, split: str) -> Path:
    """Where a split of a ZeroSpeech task is."""
    return root / task / ZEROSPEECH[task][0] / split


def zerospeech_name(*parts: object) -> str:
    """A file's name without its ending. As in the published sets, it says nothing about what is spoken."""
    digits = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
    return digits[:11].translate(str.maketrans("0123456789", "ghijklmnop"))


def write_gold(folder: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a `gold.csv`."""
    with (folder / "gold.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_sound(file: Path, samples: np.ndarray, rate: int) -> None:
    """Write 16-bit samples `[samples]` as the file's ending says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, samples, rate, subtype="PCM_16")


def write_json(file: Path, content: Any) -> None:
    """Write JSON that people can read."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def pairs_of(root: Path) -> Iterator[tuple[str, list[Pair]]]:
    """The pairs of each set below a folder, by names such as `swuggy dev` and `tstory`."""
    for task in ZEROSPEECH:
        for split in SPLITS:
            folder = zerospeech_folder(root, task, split)
            if (folder / "gold.csv").is_file():
                yield f"{task} {split}", _gold_pairs(folder)
    for task in STORIES:
        if (root / task).is_dir():
            yield task, _story_pairs(root / task)


def _gold_pairs(folder: Path) -> list[Pair]:
    members: dict[tuple[str, str], dict[str, Path]] = {}
    with (folder / "gold.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"filename", "id", "voice", "correct"} - set(reader.fieldnames or ()):
            raise SystemExit(f"{folder / 'gold.csv'}: has no column {', '.join(sorted(missing))}")
        for row in reader:
            unit = "/".join(filter(None, (row.get("type"), row.get("subtype"), row["id"])))
            members.setdefault((unit, row["voice"]), {})[row["correct"]] = folder / f"{row['filename']}.wav"
    for (unit, voice), both in members.items():
        if set(both) != {"0", "1"}:
            raise SystemExit(
                f"{folder / 'gold.csv'}: id {unit} in voice {voice} is no pair of a right and a wrong file"
            )
    return [Pair(unit, voice, both["1"], both["0"]) for (unit, voice), both in sorted(members.items())]


def _story_pairs(folder: Path) -> list[Pair]:
    ends = "_correct.wav"
    stems = sorted(file.name.removesuffix(ends) for file in folder.glob(f"*{ends}"))
    return [Pair(stem, "", folder / f"{stem}{ends}", folder / f"{stem}_incorrect.wav") for stem in stems]
