"""A book read aloud in Libri-Light's layout: chapters, what Libri-Light says of them, and passages that come again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speech_benchmark import layouts
from speech_benchmark.reading import PASSAGES, Sentence, passage, prose
from speech_benchmark.speaking import LOUDNESS_DB, Speaker

FRAME_SEC = 0.08
"""Sentences begin on a multiple of this, a frame of 12.5 Hz codecs, so that a passage has the same codes again."""
PAUSE_SEC = 0.24
FIRST_SPEAKER = 90001
"""Above all of LibriVox's numbers, so that no synthetic speaker passes for one of them."""
_ROUNDING_DB = 20 * math.log10(1 / 32768 / math.sqrt(12))


@dataclass(frozen=True)
class BookSize:
    """How long a book is."""

    seconds: float
    chapter_sec: float
    gaps_sec: Sequence[float]
    """Between the end of a passage and its second hearing, in turn."""
    passage_sentences: int


@dataclass
class _Chapter:
    pieces: list[np.ndarray] = field(default_factory=list)
    samples: int = 0
    voice_activity: list[list[float]] = field(default_factory=list)


@dataclass
class _Hearing:
    title: str
    sentences: Sequence[Sentence]
    gap_sec: float
    first: dict[str, Any]
    end: float
    """Of the first hearing, in seconds from the book's beginning."""


class Book:
    """A book as far as it is read."""

    def __init__(self, number: int, speaker: Speaker, size: BookSize, *, seed: int) -> None:
        self.speaker, self.size = speaker, size
        self.name = f"synthetic_prose_{number + 1:02d}"
        self.chapters = [_Chapter()]
        self.repeats: list[dict[str, Any]] = []
        self.samples = 0
        self.prose = prose(seed=seed, book=self.name)
        self.passages = self._passages(number)
        self.gaps = itertools.cycle(size.gaps_sec)

    @property
    def now(self) -> float:
        """Seconds read."""
        return self.samples / self.speaker.rate

    def read(self) -> None:
        """Read to the end."""
        pending: _Hearing | None = None
        gap = next(self.gaps)
        while pending is not None or self.now < self.size.seconds:
            if pending is None and self.now + 1.5 * gap < self.size.seconds:
                title, sentences = next(self.passages)
                pending = _Hearing(title, sentences, gap, self._read(sentences), self.now)
            elif pending is not None and self.now >= pending.end + pending.gap_sec:
                self._note(pending, self._read(pending.sentences))
                pending, gap = None, next(self.gaps)
                self._read([next(self.prose)])
            else:
                self._read([next(self.prose)])

    def _passages(self, number: int) -> Iterator[tuple[str, Sequence[Sentence]]]:
        """The works' passages, then some made from templates: none comes in two pairs of a book."""
        titles, count = list(PASSAGES), self.size.passage_sentences
        for title in titles[number % len(titles) :] + titles[: number % len(titles)]:
            yield title, passage(title)[:count]
        for place in itertools.count(1):
            yield f"own text {place}", list(itertools.islice(self.prose, count))

    def _read(self, sentences: Sequence[Sentence]) -> dict[str, Any]:
        """Read sentences, all in one chapter; where they are."""
        if self.chapters[-1].samples >= self.size.chapter_sec * self.speaker.rate:
            self.chapters.append(_Chapter())
        chapter = self.chapters[-1]
        spans = [self._say(sentence.text, chapter) for sentence in sentences]
        return {"chapter": chapter_name(len(self.chapters)), "start": spans[0][0], "end": spans[-1][1]}

    def _say(self, text: str, chapter: _Chapter) -> list[float]:
        rate = self.speaker.rate
        sound = np.rint(self.speaker.say(text) * 32768).astype(np.int16)
        frame = round(FRAME_SEC * rate)
        whole = -(-(len(sound) + round(PAUSE_SEC * rate)) // frame) * frame
        span = [round(at / rate, 3) for at in (chapter.samples, chapter.samples + len(sound))]
        chapter.pieces.append(np.pad(sound, (0, whole - len(sound))))
        chapter.voice_activity.append(span)
        chapter.samples += whole
        self.samples += whole
        return span

    def _note(self, hearing: _Hearing, second: dict[str, Any]) -> None:
        gap = round(self._at(second) - hearing.end, 3)
        self.repeats.append({"passage": hearing.title, "gap_sec": gap, "first": hearing.first, "second": second})

    def _at(self, place: dict[str, Any]) -> float:
        before = sum(chapter.samples for chapter in self.chapters[:-1]) / self.speaker.rate
        return before + float(place["start"])


def chapter_name(number: int) -> str:
    """A chapter's file without its ending; the same in every book, as in Libri-Light names repeat between folders."""
    return f"chapter_{number:02d}"


def write_book(root: Path, number: int, speaker: Speaker, size: BookSize, *, seed: int) -> list[dict[str, Any]]:
    """Read a book and write it below `root`.

    Returns:
        Its repeats: book, passage, where it is heard first and again (chapter, seconds in it), and the gap in seconds.
    """
    book = Book(number, speaker, size, seed=seed)
    book.read()
    person = str(FIRST_SPEAKER + number)
    folder = root / person / book.name
    for count, chapter in enumerate(book.chapters, 1):
        file = folder / f"{chapter_name(count)}.flac"
        layouts.write_sound(file, np.concatenate(chapter.pieces), speaker.rate)
        layouts.write_json(file.with_suffix(".json"), _metadata(book, person, number, chapter))
    return [{"book": f"{person}/{book.name}", **repeat} for repeat in book.repeats]


def _metadata(book: Book, person: str, number: int, chapter: _Chapter) -> dict[str, Any]:
    """What Libri-Light says of a file. The noise is that of rounding to 16 bits."""
    meta = {
        "id": f"synthetic-{number + 1}",
        "title": f"Synthetic Prose {number + 1}",
        "description": f"Made from templates; said by espeak-ng, voice {book.speaker.voice}. Synthetic speech.",
        "language": "English",
        "num_sections": str(len(book.chapters)),
        "totaltimesecs": round(book.now),
        "genre": ["Literary Fiction"],
        "Dramatic Readings": False,
        "meta_genre": "Literature",
    }
    snr = round(LOUDNESS_DB - _ROUNDING_DB, 3)
    return {"speaker": person, "book_meta": meta, "snr": snr, "voice_activity": chapter.voice_activity}
