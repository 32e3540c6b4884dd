"""Whether what Moshi says goes round in circles, minute by minute. Moshi is known to do so after some minutes.

All is computed from the text stream and from the first, semantic codebook of Moshi's voice. Imports no torch.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ttt.words import duration_in_words

RUN_WORDS: Final = 8
"""Words in a row that were said before count as repeated; people hardly ever repeat so many by chance."""
RUN_FRAMES: Final = 12
"""Frames in a row whose semantic codes were there before count as repeated: about a second."""
_FEWEST_CODES: Final = 4
"""Different codes in such a run; silence and a held tone have fewer."""
_FEWEST_WORDS: Final = 2 * RUN_WORDS
"""Words of a minute below which its repetition says nothing."""
_LOOP: Final = 0.5
"""Share of a minute that is repeated, from which it looks like a loop."""
_PUNCTUATION: Final = ".,;:!?\"'()[]…-–—"


@dataclass(frozen=True)
class SpokenWord:
    """A word that Moshi said."""

    word: str
    start: float
    """Seconds from the beginning."""
    end: float
    """Seconds, after the frame of its last token."""


@dataclass(frozen=True)
class Minute:
    """How much of a minute is new."""

    start: float
    """Seconds from the beginning."""
    seconds: float
    """Its length: 60, but for the last."""
    words: int
    """Words that begin in it."""
    distinct_words: int
    """Different words among them, without case and punctuation."""
    longest_repeat: int
    """Words of the longest sequence that is in it twice; the two may overlap."""
    repeated_words: float
    """Share of its words in runs of `RUN_WORDS` that were said before, in it or earlier."""
    repeated_sound: float
    """Share of its frames in runs of `RUN_FRAMES` semantic codes that were there before, in it or earlier."""
    padding: float
    """Share of its frames in which no text was said."""

    @property
    def loops(self) -> bool:
        """Whether it looks like a loop."""
        return (self.words >= _FEWEST_WORDS and self.repeated_words > _LOOP) or self.repeated_sound > _LOOP


def by_minute(
    words: Sequence[SpokenWord], padding: Sequence[bool], semantic: Sequence[int], *, frame_rate: float
) -> list[Minute]:
    """Measure each minute of what was said.

    Args:
        words: in order of time.
        padding: of each frame, whether its text token is padding.
        semantic: of each frame, the code of the first codebook.
        frame_rate: frames a second.
    """
    plain = [word.word.lower().strip(_PUNCTUATION) for word in words]
    again = repeated(plain, RUN_WORDS)
    sound_again = repeated(semantic, RUN_FRAMES, distinct=_FEWEST_CODES)
    starts = [word.start for word in words]
    length, found = round(60 * frame_rate), []
    for first in range(0, len(padding), length):
        frames = slice(first, min(first + length, len(padding)))
        start, end = first / frame_rate, (first + length) / frame_rate
        said = slice(bisect.bisect_left(starts, start), bisect.bisect_left(starts, end))
        found.append(
            Minute(
                start=start,
                seconds=(frames.stop - first) / frame_rate,
                words=len(plain[said]),
                distinct_words=len(set(plain[said])),
                longest_repeat=longest_repeat(plain[said]),
                repeated_words=_share(again[said]),
                repeated_sound=_share(sound_again[frames]),
                padding=_share(padding[frames]),
            )
        )
    return found


def repeated(things: Sequence[object], run: int, *, distinct: int = 1) -> list[bool]:
    """Of each thing, whether it lies in a run of so many in a row that were there before.

    Args:
        things: in order.
        run: length of a run.
        distinct: different things that a run must have to count.
    """
    seen: set[int] = set()
    found = [False] * len(things)
    for start in range(len(things) - run + 1):
        part = tuple(things[start : start + run])
        if len(set(part)) < min(distinct, run):
            continue
        mark = hash(part)
        if mark in seen:
            found[start : start + run] = [True] * run
        seen.add(mark)
    return found


def longest_repeat(things: Sequence[object]) -> int:
    """Length of the longest sequence that is there twice; the two may overlap."""
    shortest, longest = 0, max(0, len(things) - 1)
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if _has_twice(things, middle):
            shortest = middle
        else:
            longest = middle - 1
    return shortest


def _has_twice(things: Sequence[object], length: int) -> bool:
    seen: set[tuple[object, ...]] = set()
    for start in range(len(things) - length + 1):
        part = tuple(things[start : start + length])
        if part in seen:
            return True
        seen.add(part)
    return False


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def loop_warning(minutes: Sequence[Minute]) -> str | None:
    """A sentence if some minutes look like a loop; None if none does."""
    looping = [number for number, minute in enumerate(minutes) if minute.loops]
    if not looping:
        return None
    worst = max((minutes[number] for number in looping), key=lambda m: max(m.repeated_words, m.repeated_sound))
    what = (
        f"{worst.repeated_words:.0%} of its words"
        if worst.repeated_words >= worst.repeated_sound
        else f"{worst.repeated_sound:.0%} of its sound"
    )
    return (
        f"it looks like a loop {', '.join(_spans(looping, minutes))}: at worst Moshi had said {what} before, in a row; "
        f"shorter recordings, another --seed or a higher --temperature may help"
    )


def _spans(numbers: Sequence[int], minutes: Sequence[Minute]) -> Iterator[str]:
    """Minutes that follow one another, as "from 3 min 0 s to 7 min 0 s"."""
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        last = minutes[run[-1]]
        begin = duration_in_words(minutes[run[0]].start)
        yield f"from {begin} to {duration_in_words(last.start + last.seconds)}"


def table(minutes: Sequence[Minute]) -> list[str]:
    """The minutes as lines of a table."""
    head = ("from", "words", "distinct", "longest repeat", "words repeated", "sound repeated", "text padding")
    rows = [
        (
            duration_in_words(minute.start),
            str(minute.words),
            f"{minute.distinct_words / minute.words:.0%}" if minute.words else "-",
            f"{minute.longest_repeat} words" if minute.longest_repeat != 1 else "1 word",
            f"{minute.repeated_words:.0%}",
            f"{minute.repeated_sound:.0%}",
            f"{minute.padding:.0%}" + ("  loop?" if minute.loops else ""),
        )
        for minute in minutes
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number < len(widths) - 1 else cell
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
