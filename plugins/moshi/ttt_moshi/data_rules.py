"""What `ttt check` finds in Moshi's recordings and transcripts (MSH5xx), without torch or a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from ttt.config import Blame, Code, Finding, Severity
from ttt.config.sources import DATA_KEYS, places_of
from ttt.jsonl import Line, number_in, parse_object, path_in, read_excerpt
from ttt.plugins import rule
from ttt.words import first_few
from ttt_moshi.containers import UnreadableAudioError, require_readable
from ttt_moshi.options import MoshiRun
from ttt_moshi.transcripts import BrokenTranscriptError, Transcript, Unread

_code = partial(Code, of_training=True, home=__name__)
MSH501 = _code("MSH501", "words outside their recording", Severity.WARNING)
MSH502 = _code("MSH502", "text_conditions that nothing reads", Severity.NOTE)
MSH503 = _code("MSH503", "transcripts that cannot be read", Severity.ERROR, blames=Blame.MACHINE)
MSH504 = _code("MSH504", "recordings that were cut, or are not read", Severity.ERROR, blames=Blame.MACHINE)

# A check is instant: what lies beyond is left to the run, which reads all of it before its first step.
_MOST_BYTES: Final = 4 << 20
_MOST_LINES: Final = 200


@dataclass
class _Looked:
    """What the first lines of a source name."""

    unread: Unread = field(default_factory=Unread)
    broken: list[str] = field(default_factory=list)
    """Places of transcripts that cannot be read, with why."""
    sounds: list[str] = field(default_factory=list)
    """Places of sound files that cannot be read, with why."""
    bytes_left: int = _MOST_BYTES
    """Of transcripts."""
    complete: bool = True
    """Whether all were looked at."""


@rule(MSH501, MSH502, MSH503, MSH504, reads=("data",))
def recordings_are_whole(config: MoshiRun) -> Iterator[Finding]:
    """Headers count what is in the files, and transcripts are of their recordings."""
    for key in DATA_KEYS:
        for place, source in places_of(config.data, key).items():
            transcribed = config.data.format_of(source) == "transcribed"
            looked = _look_at(source.path, transcribed=transcribed)
            if looked is not None:
                yield from _findings(looked, place)


def _findings(looked: _Looked, place: str) -> Iterator[Finding]:
    among = "" if looked.complete else " (of the first that were read)"
    stops = "; the run stops before its first step"
    if looked.sounds:
        yield MSH504.at(
            place,
            f"{_counted(looked.sounds, 'recording')}{among} cannot be read: {first_few(looked.sounds, 5)}{stops}",
            "mend them, or leave their lines out",
            value=len(looked.sounds),
        )
    if looked.broken:
        yield MSH503.at(
            place,
            f"{_counted(looked.broken, 'transcript')}{among} cannot be read: {first_few(looked.broken, 5)}{stops}",
            "mend them, or leave their lines out",
            value=len(looked.broken),
        )
    if looked.unread.words:
        yield MSH501.at(
            place,
            f"no window reads {looked.unread.words_told()}{among}; they are left out, as moshi-finetune does",
            "correct their times, which are in seconds, if there are many",
            value=looked.unread.words,
        )
    if looked.unread.conditions:
        yield MSH502.at(
            place,
            f"{looked.unread.conditions_told()}{among}",
            "nothing, unless the model is to be conditioned on texts, which is not supported",
            value=len(looked.unread.conditions),
        )


def _counted(places: list[str], what: str) -> str:
    return f"{len(places)} {what}" + ("" if len(places) == 1 else "s")


# --- files ---


def _look_at(source: str, *, transcribed: bool) -> _Looked | None:
    """The first lines; None if there are none that can be read, which one of the core's rules reports."""
    read = read_excerpt(source, most_lines=_MOST_LINES, most_bytes=_MOST_BYTES)
    if read is None:
        return None
    looked = _Looked(complete=read.complete)
    for line in read.lines:
        _sort_in(looked, line, transcribed)
    return looked


def _sort_in(looked: _Looked, line: Line, transcribed: bool) -> None:
    try:
        entry = parse_object(line.content)
    except ValueError:  # which is told of the line
        return
    path, seconds = path_in(entry, "path"), number_in(entry, "duration")
    if path is None or seconds is None or seconds <= 0:
        return
    audio = line.folder / path
    try:
        require_readable(audio)
        if transcribed:
            _read_transcript(looked, audio.with_suffix(".json"), seconds)
    except UnreadableAudioError as error:
        looked.sounds.append(f"{line.short_place} ({audio.name}: {error})")
    except BrokenTranscriptError as error:
        looked.broken.append(f"{line.short_place} ({error})")
    except (OSError, ValueError):  # missing, or a name that no file can have: told of the line
        return


def _read_transcript(looked: _Looked, file: Path, seconds: float) -> None:
    looked.bytes_left -= file.stat().st_size
    if looked.bytes_left < 0:
        looked.complete = False
        return
    looked.unread.add(Transcript.read(file, seconds), seconds)


DATA_RULES = (recordings_are_whole,)
