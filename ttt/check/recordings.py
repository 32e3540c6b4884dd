"""The lines of `.jsonl` data, read without decoding a recording: keys, files, durations; or keys and their types."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ttt.jsonl import Excerpt, Line, jsonl_files, number_in, parse_object, path_in, read_excerpt
from ttt.plugins.facts import LineFormat

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_LINES = 2000
_MOST_BYTES = 4 << 20
"""Most lines and bytes that a check reads, to stay instant. A run reads all of them before its first step."""


@dataclass
class Lines:
    """What the lines are. Places are `file:line`, without the file's folder."""

    count: int = 0
    """Lines read."""
    complete: bool = True
    """Whether every line was read."""
    foreign: list[str] = field(default_factory=list)
    """Files that are no lists but something else, such as compressed: what, and the way out."""
    unparsed: list[str] = field(default_factory=list)
    """Lines that are not a JSON object."""
    lacking: list[str] = field(default_factory=list)
    """Lines without their keys: of recordings, a `path`, or a `duration` in seconds."""

    @classmethod
    def of(cls, read: Excerpt) -> Self:
        """The lines that were read, none of them looked at."""
        lines = cls(count=len(read.lines) + len(read.broken_off), complete=read.complete)
        lines.unparsed.extend(f"{file.name}: {why}" for file, why in read.broken_off.items())
        lines.foreign.extend(f"{file.name}: {what}" for file, what in read.foreign.items())
        return lines


@dataclass
class Recordings(Lines):
    """What the lines say of recordings."""

    missing: list[str] = field(default_factory=list)
    """Lines whose file is missing."""
    alone: list[str] = field(default_factory=list)
    """Lines whose file is there, but not the file that must be beside it."""
    places: list[str] = field(default_factory=list)
    """Good lines."""
    seconds: list[float] = field(default_factory=list)
    """Their durations."""

    @classmethod
    def together(cls, parts: Sequence[Recordings]) -> Recordings:
        """What the lines of several sources say."""
        whole = cls(count=sum(part.count for part in parts), complete=all(part.complete for part in parts))
        for part in parts:
            for each in fields(cls):
                if isinstance(getattr(part, each.name), list):
                    getattr(whole, each.name).extend(getattr(part, each.name))
        return whole


def read_recordings(source: str | None, *, beside: str | None = None) -> Recordings | None:
    """Read a `.jsonl` file, or a folder of them; None if there is no such file or folder, or it cannot be read.

    Args:
        source: what the config names.
        beside: suffix of the file that must be beside each recording.
    """
    read = None if source is None else read_excerpt(source, most_lines=_MOST_LINES, most_bytes=_MOST_BYTES)
    if read is None:
        return None
    recordings = Recordings.of(read)
    for line in read.lines:
        _sort_in(recordings, line, beside)
    return recordings


def is_folder_of(source: str, suffixes: Sequence[str]) -> bool:
    """Whether a folder holds files with one of the endings at any depth, and no `.jsonl`, which would name them."""
    try:
        folder = Path(source)
        return (
            folder.is_dir()
            and not jsonl_files(folder)
            and any(file.suffix.lower() in suffixes for file in folder.rglob("*"))
        )
    except (OSError, ValueError):  # a name that no file can have
        return False


def read_lines_of(source: str | None, form: LineFormat) -> Lines | None:
    """Read lines that hold the data themselves; None if the source is no `.jsonl` file, and no folder with one.

    Args:
        source: what the config names.
        form: what the lines must be.
    """
    if source is None or not any(file.suffix.lower() == ".jsonl" for file in jsonl_files(Path(source))):
        return None
    read = read_excerpt(source, most_lines=_MOST_LINES, most_bytes=_MOST_BYTES, limit=form.longest)
    if read is None:
        return None
    lines = Lines.of(read)
    for line in read.lines:
        try:
            entry = parse_object(line.content)
        except ValueError:
            lines.unparsed.append(line.short_place)
            continue
        if not all(key in entry and isinstance(entry[key], kind) for key, kind in form.keys.items()):
            lines.lacking.append(line.short_place)
    return lines


def _sort_in(recordings: Recordings, line: Line, beside: str | None) -> None:
    place = line.short_place
    try:
        entry = parse_object(line.content)
    except ValueError:
        recordings.unparsed.append(place)
        return
    path, seconds = path_in(entry, "path"), number_in(entry, "duration")
    if path is None or seconds is None or seconds <= 0:
        recordings.lacking.append(place)
        return
    file = line.folder / path
    if not os.path.isfile(file):
        recordings.missing.append(place)
    elif beside is not None and not os.path.isfile(file.with_suffix(beside)):
        recordings.alone.append(place)
    else:
        recordings.places.append(place)
        recordings.seconds.append(seconds)
