"""A recording's transcript, `alignments: [[word, [start, end], speaker], …]`, and what of it no window reads.

moshi-finetune reads a window's words by where they begin, and drops those that last no time. So a word that begins
outside the recording is in no window. It is counted here, and told, because many of them mean another recording's
transcript, or times in milliseconds. This module imports no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ttt.printable import shortened
from ttt.reading import MAX_JSON, read_text, unreadable
from ttt.words import first_few
from ttt_moshi.interleave import MAIN_SPEAKER, Word, read_words

AFTER: Final = "after the end of the recording"
BEFORE: Final = "before its beginning"
NO_TIME: Final = "without duration"
_FAR_SEC: Final = 10.0
"""Seconds beyond the end of a recording, from which its transcript may be in other units."""


class BrokenTranscriptError(ValueError):
    """A recording's alignments cannot be read."""


@dataclass(frozen=True)
class Transcript:
    """The words of a recording."""

    file: Path
    words: list[Word]
    """Those that windows read, in order of time."""
    left_out: dict[str, list[Word]]
    """The others, by what is wrong with them."""
    speakers: frozenset[str]
    """Of all of them."""
    has_conditions: bool
    """Whether it has `text_conditions`, with which moshi-finetune conditions a model on texts."""

    @classmethod
    def read(cls, file: Path, seconds: float) -> Transcript:
        """Read a transcript.

        Args:
            file: of it.
            seconds: length of its recording.

        Raises:
            BrokenTranscriptError: it is missing or holds something else, or most of its words lie far beyond the end.
        """
        try:
            content = _parsed(read_text(file, limit=MAX_JSON))
            words = read_words(content)
        except FileNotFoundError:
            raise BrokenTranscriptError(
                f'no file {file}; write its words beside the audio as {{"alignments": [["hello", [0.5, 0.9], '
                f'"{MAIN_SPEAKER}"]]}}, or as moshi-finetune\'s annotate.py does'
            ) from None
        except OSError as error:
            raise BrokenTranscriptError(f"{file}: cannot be read: {unreadable(error)}") from None
        except (ValueError, RecursionError) as error:
            raise BrokenTranscriptError(f"{file}: {shortened(str(error), 160)}") from None
        left_out: dict[str, list[Word]] = {}
        for word in words:
            reason = _reason(word, seconds)
            if reason is not None:
                left_out.setdefault(reason, []).append(word)
        _require_seconds(file, left_out.get(AFTER, ()), len(words), seconds)
        return cls(
            file,
            sorted((word for word in words if _reason(word, seconds) is None), key=lambda word: word.start),
            left_out,
            frozenset(word.speaker for word in words),
            bool(content.get("text_conditions")),
        )


def _parsed(text: str) -> Any:
    """The JSON in a transcript.

    Raises:
        ValueError: it holds none, or only its beginning.
    """
    if not text.strip():
        raise ValueError('it is empty; if nobody speaks, write {"alignments": []}')
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = " to its end, as if it was cut" if error.pos >= len(text.rstrip()) else ""
        raise ValueError(f"it is no JSON{cut} ({error}); write it again, or leave the recording out") from None


def _reason(word: Word, seconds: float) -> str | None:
    """Why no window reads a word; None if one does."""
    if word.start >= word.end:
        return NO_TIME
    if word.start < 0:
        return BEFORE
    return AFTER if word.start >= seconds else None


def _require_seconds(file: Path, after: Iterable[Word], count: int, seconds: float) -> None:
    """Refuse a transcript of which more than half lies beyond the end, some of it far: it is not this recording's.

    Raises:
        BrokenTranscriptError: naming the last word.
    """
    beyond = sorted(after, key=lambda word: word.start)
    if 2 * len(beyond) > count and beyond[-1].start > seconds + _FAR_SEC:
        last = beyond[-1]
        raise BrokenTranscriptError(
            f"{file}: {shortened(repr(last.text), 60)} starts at {last.start:g} s, but the audio lasts "
            f"{seconds:.2f} s; {len(beyond)} of {count} words start after its end; times are in seconds"
        )


@dataclass
class Unread:
    """What of several transcripts no window reads."""

    counts: Counter[str] = field(default_factory=Counter)
    """Words, by what is wrong with them."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """For each of these, transcripts and their first such word."""
    conditions: list[str] = field(default_factory=list)
    """Transcripts with `text_conditions`."""

    def add(self, transcript: Transcript, seconds: float) -> None:
        """Count those of one more."""
        name = transcript.file.name
        for reason, words in transcript.left_out.items():
            self.counts[reason] += len(words)
            first = words[0]
            place = f"{name} ({shortened(repr(first.text), 40)} at {first.start:g} s of {seconds:.2f} s)"
            self.places.setdefault(reason, []).append(place)
        if transcript.has_conditions:
            self.conditions.append(name)

    @property
    def words(self) -> int:
        """How many words."""
        return sum(self.counts.values())

    def words_told(self) -> str:
        """How many words no window reads, and where the first are; empty if all are read."""
        return "; ".join(
            f"{count} {'words' if count != 1 else 'word'} {reason}: {first_few(self.places[reason])}"
            for reason, count in sorted(self.counts.items())
        )

    def conditions_told(self) -> str:
        """How many transcripts have text_conditions; empty if none has."""
        count = len(self.conditions)
        if not count:
            return ""
        has = "transcript has" if count == 1 else "transcripts have"
        return f"{count} {has} text_conditions, which are not read: {first_few(self.conditions)}"

    def told(self) -> list[str]:
        """Sentences for a user."""
        words, conditions = self.words_told(), self.conditions_told()
        left_out = f"no window reads {words}; they are left out, as moshi-finetune does"
        return [*([left_out] if words else []), *([conditions] if conditions else [])]
