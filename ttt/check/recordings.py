"""The lines of `.jsonl` data, read as far as that goes without a decoder: keys, files, durations."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from ttt.reading import read_lines, unreadable

_MOST_LINES = 2000
_MOST_BYTES = 4 << 20
"""A check is instant: what lies beyond is left to the run, which reads it all before its first step."""


@dataclass
class Recordings:
    """What the lines say. Places are `file:line`, with the file's name alone."""

    count: int = 0
    """Lines read."""
    complete: bool = True
    """Whether they are all."""
    unparsed: list[str] = field(default_factory=list)
    """Lines that are no JSON object."""
    lacking: list[str] = field(default_factory=list)
    """Lines without a `path`, or a `duration` in seconds."""
    missing: list[str] = field(default_factory=list)
    """Lines whose file is not there."""
    alone: list[str] = field(default_factory=list)
    """Lines whose file lacks the one that must lie beside it."""
    places: list[str] = field(default_factory=list)
    """Good lines."""
    seconds: list[float] = field(default_factory=list)
    """Their durations."""


def read_recordings(source: str | None, *, beside: str | None = None) -> Recordings | None:
    """Read a `.jsonl` file, or a folder of them; None if there is no such file or folder, or it cannot be read.

    Args:
        source: what the config names.
        beside: suffix of the file that must lie beside each recording.
    """
    try:
        return _read(source, beside) if source is not None else None
    except (OSError, ValueError):  # gone, not readable, or a name that no file can have
        return None


def _read(source: str, beside: str | None) -> Recordings | None:
    path = Path(source)
    if not path.is_dir() and not path.is_file():
        return None
    lines = Recordings()
    budget = _MOST_BYTES
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        size = file.stat().st_size
        try:
            for number, line in read_lines(file, most=budget):
                if lines.count == _MOST_LINES:
                    lines.complete = False
                    return lines
                lines.count += 1
                _sort_in(lines, line, f"{file.name}:{number}", file.parent, beside)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            lines.count += 1
            lines.unparsed.append(f"{file.name}: {unreadable(error)}")
            size = budget + 1  # nothing was read behind it
        lines.complete = lines.complete and size <= budget
        budget = max(budget - size, 0)
    return lines


def _sort_in(lines: Recordings, line: bytes, place: str, folder: Path, beside: str | None) -> None:
    try:
        entry = json.loads(line.decode("utf-8"), parse_int=float)  # some whole numbers are too large to be one later
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        lines.unparsed.append(place)
        return
    path, duration = entry.get("path"), entry.get("duration")
    seconds = float(duration) if isinstance(duration, int | float) and not isinstance(duration, bool) else math.nan
    if not isinstance(path, str) or not path or "\0" in path or not 0 < seconds < math.inf:
        lines.lacking.append(place)
        return
    file = folder / path
    if not os.path.isfile(file):
        lines.missing.append(place)
    elif beside is not None and not os.path.isfile(file.with_suffix(beside)):
        lines.alone.append(place)
    else:
        lines.places.append(place)
        lines.seconds.append(seconds)
