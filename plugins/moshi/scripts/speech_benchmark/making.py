"""The tasks of the benchmark, each made from its texts: candidates are spoken, the gates choose, files are written."""

from __future__ import annotations

import itertools
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from speech_benchmark import balance, layouts, sentences, speaking, stories, words
from speech_benchmark.book import BookSize, write_book
from speech_benchmark.gating import Ear
from speech_benchmark.reading import PASSAGES, prose, words_of

__all__ = ["FULL", "PASSAGES", "SUBSET", "TASKS", "Benchmark", "Size"]

T = TypeVar("T")
SHORTEST = 4
"""Phonemes of a word: a swap in a shorter one makes a real word too often."""
COUNTED_SENTENCES = 1000
"""The prose in which words are counted for `frequency`: about an hour, read aloud."""


@dataclass(frozen=True)
class Size:
    """How much is made."""

    rate: int
    """Samples a second of all files."""
    voices: int
    """How many say each word and each sentence."""
    words_per_minute: int
    words: Mapping[str, int]
    """Pairs of sWUGGY by split."""
    sentences: Mapping[str, int]
    """Pairs of sBLIMP by split, shared out among all types and subtypes."""
    stories: int
    """Of each of tStory and sStory."""
    longest_beginning: int
    """Letters in the beginning of a story."""
    candidates: int
    """Choices that the gates have for a pair."""
    hours: float
    """Of speech in Libri-Light's layout, all books together."""
    books: int
    chapter_sec: float
    gaps_sec: tuple[float, ...]
    """How long after its end a passage comes again; in turn."""
    passage_sentences: int


FULL = Size(
    rate=16000,
    voices=4,
    words_per_minute=170,
    words={"dev": 100, "test": 100},
    sentences={"dev": 100, "test": 100},
    stories=100,
    longest_beginning=200,
    candidates=4,
    hours=1.0,
    books=4,
    chapter_sec=600,
    gaps_sec=(30, 60, 120, 300, 600),
    passage_sentences=2,
)
SUBSET = Size(
    rate=8000,
    voices=2,
    words_per_minute=260,
    words={"dev": 10, "test": 4},
    sentences={"dev": 4, "test": 2},
    stories=4,
    longest_beginning=54,
    candidates=12,
    hours=24 / 3600,
    books=2,
    chapter_sec=8,
    gaps_sec=(4,),
    passage_sentences=1,
)


@dataclass
class Benchmark:
    """What is being made, and where."""

    out: Path
    size: Size
    seed: int
    say: Callable[[str], None]
    ear: Ear = field(default_factory=Ear)
    _last: dict[tuple[str, speaking.Speaker], Spoken] = field(default_factory=dict)

    @property
    def speakers(self) -> list[speaking.Speaker]:
        """Those who say words and sentences."""
        voices = speaking.VOICES[: self.size.voices]
        return [speaking.Speaker(voice, self.size.words_per_minute, self.size.rate) for voice in voices]

    def spoken(self, text: str, speaker: speaking.Speaker) -> Spoken:
        """A text as a file will hold it, and as the gates hear it. The last few are remembered: a word comes often."""
        if (text, speaker) not in self._last:
            samples = pcm(speaker.say(text))
            heard = self.ear.hear(samples.astype(np.float32) / 32768, self.size.rate)
            self._last = dict([*self._last.items()][-50:]) | {(text, speaker): Spoken(samples, heard)}
        return self._last[text, speaker]

    def choose(self, slots: Sequence[Sequence[Candidate]]) -> list[Candidate]:
        """One candidate for each slot, as balanced as can be found."""
        heard = [[[(a.heard, b.heard) for a, b in c.voices] for c in slot] for slot in slots]
        return [slot[i] for slot, i in zip(slots, balance.choose(heard, seed=self.seed), strict=True)]


@dataclass(frozen=True)
class Spoken:
    """A clip."""

    samples: np.ndarray
    """`[samples]` int16."""
    heard: balance.Heard


@dataclass(frozen=True)
class Candidate:
    """A pair that may be taken."""

    what: Any
    """The texts that it is made of."""
    voices: tuple[tuple[Spoken, Spoken], ...]
    """As each voice says it, the right member first."""


def pcm(sound: np.ndarray) -> np.ndarray:
    """Sound as 16-bit samples."""
    return np.rint(sound * 32768).clip(-32768, 32767).astype(np.int16)


def dealt(items: Iterable[T], hands: int) -> list[list[T]]:
    """Items dealt out like cards."""
    all_items = list(items)
    return [all_items[i::hands] for i in range(hands)]


def first_of_each(groups: Sequence[Sequence[T]], count: int) -> list[T]:
    """Up to `count` items, taken from all groups in turn."""
    rounds = itertools.zip_longest(*groups)
    return [item for turn in rounds for item in turn if item is not None][:count]


# --- sWUGGY ---


def lexicon() -> dict[str, words.Phones]:
    """How espeak-ng says each word of both lists."""
    known = sorted({*words.WORDS, *words.OTHER_WORDS})
    return {word: speaking.phones_of(word) for word in known}


def frequencies(seed: int) -> Counter[str]:
    """How often each word is in the benchmark's own prose."""
    return Counter(words_of(list(itertools.islice(prose(seed=seed, book="count"), COUNTED_SENTENCES))))


def make_swuggy(benchmark: Benchmark) -> dict[str, Any]:
    """Words and non-words, both spoken from phonemes."""
    known, counts = lexicon(), frequencies(benchmark.seed)
    hands = word_hands(known, counts, benchmark.size, benchmark.seed)
    written = 0
    for split, wanted in benchmark.size.words.items():
        hand = hands[written : written + wanted]
        slots = [[_spoken_word(benchmark, known, non_word) for non_word in non_words] for non_words in hand]
        benchmark.say(f"swuggy {split}: {sum(map(len, slots))} candidates for {wanted} pairs")
        _write_words(benchmark, split, benchmark.choose(slots), known, counts, first_id=written)
        written += wanted
    return {"lexicon": {word: " ".join(phones) for word, phones in known.items()}}


def word_hands(
    known: Mapping[str, words.Phones], counts: Mapping[str, int], size: Size, seed: int
) -> list[list[words.NonWord]]:
    """Candidates for each pair of sWUGGY; words that the prose has and words that it lacks alternate."""
    bigrams = words.Bigrams.of(known)
    shuffled = [word for word in words.WORDS if len(known[word]) >= SHORTEST]
    random.Random(f"{seed} words").shuffle(shuffled)
    made = {w: words.choose_swaps(w, known, bigrams, count=size.candidates, seed=seed) for w in shuffled}
    seen, unseen = ([w for w in shuffled if made[w] and bool(counts.get(w, 0)) == wanted] for wanted in (True, False))
    order = first_of_each([seen, unseen], len(shuffled))
    hands = dealt(order, sum(size.words.values()))
    return [first_of_each([made[word] for word in hand], size.candidates) for hand in hands]


def _spoken_word(benchmark: Benchmark, known: Mapping[str, words.Phones], non_word: words.NonWord) -> Candidate:
    texts = [speaking.spelled(phones) for phones in (known[non_word.word], non_word.phones)]
    return Candidate(non_word, _said(benchmark, *texts))


def _said(benchmark: Benchmark, correct: str, incorrect: str) -> tuple[tuple[Spoken, Spoken], ...]:
    return tuple((benchmark.spoken(correct, s), benchmark.spoken(incorrect, s)) for s in benchmark.speakers)


def _write_words(
    benchmark: Benchmark,
    split: str,
    chosen: Sequence[Candidate],
    known: Mapping[str, words.Phones],
    counts: Mapping[str, int],
    *,
    first_id: int,
) -> None:
    rows = []
    for number, candidate in enumerate(chosen, first_id + 1):
        non_word: words.NonWord = candidate.what
        word = non_word.word
        for phones, correct in ((known[word], 1), (non_word.phones, 0)):
            text = word if correct else "".join(words.plain(phones))
            rows.append(
                {"id": number, "frequency": counts.get(word, 0), "word": text, "phones": " ".join(phones)}
                | {"length": len(phones), "correct": correct}
            )
    _write_zerospeech(benchmark, "swuggy", split, chosen, rows)


def _write_zerospeech(
    benchmark: Benchmark, task: str, split: str, chosen: Sequence[Candidate], rows: Sequence[dict[str, Any]]
) -> None:
    """Write the sounds, and `gold.csv` with its rows in an order by chance. Rows are two for each candidate."""
    folder = layouts.zerospeech_folder(benchmark.out, task, split)
    full = []
    for place, row in enumerate(rows):
        for speaker, both in zip(benchmark.speakers, chosen[place // 2].voices, strict=True):
            name = layouts.zerospeech_name(benchmark.seed, task, row["id"], speaker.voice, row["correct"])
            layouts.write_sound(folder / f"{name}.wav", both[place % 2].samples, benchmark.size.rate)
            full.append({"filename": name, "voice": speaker.voice, **row})
    random.Random(f"{benchmark.seed} {task} {split}").shuffle(full)
    layouts.write_gold(folder, layouts.ZEROSPEECH[task][1], full)


# --- sBLIMP ---


def make_sblimp(benchmark: Benchmark) -> dict[str, Any]:
    """Pairs of sentences."""
    hands = sentence_hands(benchmark.size, benchmark.seed)
    written = 0
    for split, wanted in benchmark.size.sentences.items():
        slots = [
            [Candidate(pair, _said(benchmark, pair.correct, pair.incorrect)) for pair in hand]
            for hand in hands[written : written + wanted]
        ]
        benchmark.say(f"sblimp {split}: {sum(map(len, slots))} candidates for {wanted} pairs")
        chosen = benchmark.choose(slots)
        rows = [
            _sentence_row(number, c.what, right) for number, c in enumerate(chosen, written + 1) for right in (1, 0)
        ]
        _write_zerospeech(benchmark, "sblimp", split, chosen, rows)
        written += wanted
    return {}


def sentence_hands(size: Size, seed: int) -> list[list[sentences.SentencePair]]:
    """Candidates for each pair of sBLIMP. All types come in turn, their mirrored halves one after the other."""
    kinds = list(sentences.sentence_pairs(seed=seed).values())
    turns = [i % len(kinds) for i in range(sum(size.sentences.values()))]
    rest = {i: iter(dealt(kinds[i], count)) for i, count in Counter(turns).items()}
    return [next(rest[i])[: size.candidates] for i in turns]


def _sentence_row(number: int, pair: sentences.SentencePair, correct: int) -> dict[str, Any]:
    text = pair.correct if correct else pair.incorrect
    return {"id": number, "type": pair.type, "subtype": pair.subtype, "transcription": text, "correct": correct}


# --- tStory and sStory ---


def make_stories(benchmark: Benchmark, kind: stories.Kind) -> dict[str, Any]:
    """Stories with their own ending and with another's, each in one voice."""
    hands = story_hands(kind, benchmark.size, benchmark.seed)
    slots = [[_spoken_story(benchmark, story, place) for story in hand] for place, hand in enumerate(hands)]
    benchmark.say(f"{kind}: {sum(map(len, slots))} candidates for {len(slots)} stories")
    told = {}
    for number, candidate in enumerate(benchmark.choose(slots)):
        story: stories.Story = candidate.what
        name = f"{number}_{uuid.uuid5(uuid.NAMESPACE_OID, f'{benchmark.seed} {kind} {story.correct}')}"
        for spoken, ending in zip(candidate.voices[0], ("correct", "incorrect"), strict=True):
            file = benchmark.out / kind / f"{name}_{ending}.wav"
            layouts.write_sound(file, spoken.samples, benchmark.size.rate)
        told[name] = {
            "topic": story.topic,
            "wrong_topic": story.wrong_topic,
            "correct": story.correct,
            "incorrect": story.incorrect,
        }
    return {"stories": told}


def story_hands(kind: stories.Kind, size: Size, seed: int) -> list[list[stories.Story]]:
    """Candidates for each story."""
    told = stories.stories(kind, seed=seed)
    short = [endings for endings in told if len(endings[0].beginning) <= size.longest_beginning]
    return [first_of_each(hand, size.candidates) for hand in dealt(short, size.stories)]


def _spoken_story(benchmark: Benchmark, story: stories.Story, place: int) -> Candidate:
    speaker = benchmark.speakers[place % benchmark.size.voices]
    return Candidate(story, ((benchmark.spoken(story.correct, speaker), benchmark.spoken(story.incorrect, speaker)),))


# --- Libri-Light ---


def make_librilight(benchmark: Benchmark) -> dict[str, Any]:
    """Books read aloud, with passages that come again."""
    size = benchmark.size
    book_size = BookSize(3600 * size.hours / size.books, size.chapter_sec, size.gaps_sec, size.passage_sentences)
    repeats = []
    for number in range(size.books):
        voice = speaking.VOICES[number % min(len(speaking.VOICES), size.books)]
        speaker = speaking.Speaker(voice, size.words_per_minute, size.rate)
        repeats += write_book(benchmark.out / "librilight", number, speaker, book_size, seed=benchmark.seed)
        benchmark.say(f"librilight: book {number + 1} of {size.books}")
    return {"repeats": repeats}


TASKS: Mapping[str, Callable[[Benchmark], dict[str, Any]]] = {
    "swuggy": make_swuggy,
    "sblimp": make_sblimp,
    "tstory": lambda benchmark: make_stories(benchmark, "tstory"),
    "sstory": lambda benchmark: make_stories(benchmark, "sstory"),
    "librilight": make_librilight,
}
"""By task: what makes it below `out`, and returns what the manifest says of it."""
