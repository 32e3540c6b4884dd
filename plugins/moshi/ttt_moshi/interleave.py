"""Moshi's text stream: one token for each frame of audio, as moshi-finetune lays it out. Imports no torch.

A word's tokens are in consecutive frames, starting with the frame in which the word begins. All other frames hold
padding. The last padding before a word is the end-of-padding token, with which Moshi announces that it will speak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from ttt.printable import shortened
from ttt.reading import wrong_with

MAIN_SPEAKER: Final = "SPEAKER_MAIN"
"""The label of Moshi's own words; words of other speakers are left out."""


@dataclass(frozen=True)
class Word:
    """A word with its times and its speaker."""

    text: str
    start: float
    """Seconds from the beginning of the recording."""
    end: float
    """Seconds; not after `start` if the transcript has no duration for it."""
    speaker: str


def frames_in(duration_sec: float, frame_rate: float) -> int:
    """Frames that cover a duration: `ceil(duration_sec * frame_rate)`, less rounding: 0.56 s at 12.5 are 7, not 8."""
    return math.ceil(round(duration_sec * frame_rate, 6))


def read_alignments(content: Any) -> list[Word]:
    """Words of a parsed alignment file, `{"alignments": [[word, [start, end], speaker], …]}`, in order of time.

    Words without duration are left out, as in moshi-finetune.

    Raises:
        ValueError: it holds something else; the message names the item, counted from 1.
    """
    return sorted((word for word in read_words(content) if word.start < word.end), key=lambda word: word.start)


def read_words(content: Any) -> list[Word]:
    """All words of a parsed alignment file, in its order.

    Raises:
        ValueError: it holds something else; the message names the item, counted from 1.
    """
    if not isinstance(content, dict) or not isinstance(content.get("alignments"), list):
        raise ValueError('it is not an object with a list "alignments"')
    return [_read_word(item, number) for number, item in enumerate(content["alignments"], start=1)]


def _read_word(item: Any, number: int) -> Word:
    match item:
        case [str(text), [int() | float() as start, int() | float() as end], str(speaker)]:
            times_are_numbers = not isinstance(start, bool) and not isinstance(end, bool)
            wrong = wrong_with(text) if text.strip() else None  # a transcript may have an empty word for a pause
            if wrong is not None:
                raise ValueError(f"the word of alignment {number} {wrong}")
            if times_are_numbers and abs(start) < 1e9 and abs(end) < 1e9:  # neither NaN nor too large for a float
                return Word(text, float(start), float(end), speaker)
    shown = shortened(repr(item), 60)
    raise ValueError(f"alignment {number} is {shown}, not [word, [start, end], speaker] with times in seconds")


def words_between(words: Iterable[Word], start: float, end: float) -> list[Word]:
    """Moshi's own words that begin in `start` <= t < `end`, with times counted from `start`."""
    return [
        Word(word.text, word.start - start, word.end - start, word.speaker)
        for word in words
        if word.speaker == MAIN_SPEAKER and start <= word.start < end
    ]


def text_stream(
    words: Iterable[Word],
    encode: Callable[[str], list[int]],
    *,
    frames: int,
    frame_rate: float,
    padding_id: int,
    end_of_padding_id: int,
) -> list[int]:
    """Text tokens of `frames` frames.

    If a word begins before all tokens of the previous one are written, the previous one is cut off, so that text stays
    in time with the sound. If several words begin in the same frame, only the last is written. Tokens that would be
    read as padding are dropped (the unknown token of kyutai's tokenizers has the id of the end of padding).

    Args:
        words: in order of time, from the beginning of the first frame.
        encode: a word's tokens, as SentencePiece's `encode`.
        frames: T.
        frame_rate: frames a second.
        padding_id: Moshi's `text_padding_token_id`.
        end_of_padding_id: Moshi's `end_of_text_padding_id`.
    """
    marks = (padding_id, end_of_padding_id)
    spelt = [
        (math.floor(word.start * frame_rate), [token for token in encode(word.text.strip()) if token not in marks])
        for word in words
    ]
    spelt = [(first, tokens) for first, tokens in spelt if tokens and 0 <= first < frames]
    stream = [padding_id] * frames
    for (first, tokens), (end, _) in pairwise([*spelt, (frames, [])]):
        if first == end:
            continue
        if first > 0 and stream[first - 1] == padding_id:
            stream[first - 1] = end_of_padding_id
        written = tokens[: end - first]
        stream[first : first + len(written)] = written
    return stream
