"""Whether an answer goes round in circles: loops of words and of sound are told, speech and silence are not."""

from __future__ import annotations

import random

from ttt_moshi.repetition import SpokenWord, by_minute, longest_repeat, loop_warning, repeated, table

RATE = 12.5
TEXT = [
    "the",
    "mill",
    "stood",
    "by",
    "the",
    "river",
    "and",
    "the",
    "miller",
    "told",
    "me",
    "that",
    "in",
    "the",
    "old",
    "days",
    "the",
    "water",
    "came",
    "down",
    "from",
    "the",
    "hills",
    "so",
    "fast",
    "that",
    "nobody",
    "could",
    "cross",
    "it",
    "without",
    "a",
    "rope",
    "and",
    "a",
    "good",
    "deal",
    "of",
    "luck",
    "because",
    "the",
    "stones",
    "were",
    "round",
    "and",
    "wet",
    "and",
    "the",
    "bridge",
    "had",
    "been",
    "taken",
    "by",
    "the",
    "flood",
    "of",
    "the",
    "year",
    "in",
    "which",
    "his",
    "father",
    "was",
    "born",
    "so",
    "they",
    "built",
    "another",
    "one",
    "of",
    "oak",
    "which",
    "is",
    "the",
    "one",
    "you",
    "see",
    "there",
    "with",
    "the",
    "iron",
    "rail",
    "that",
    "my",
    "brother",
    "made",
    "when",
    "he",
    "came",
    "back",
    "from",
    "the",
    "war",
    "and",
    "had",
    "nothing",
    "else",
    "to",
    "do",
    "in",
    "the",
    "winter",
    "but",
    "to",
    "sit",
    "by",
    "the",
    "fire",
    "and",
    "talk",
    "of",
    "the",
    "sea",
]


def spoken(words: list[str], *, every: float, begin: float = 0.0) -> list[SpokenWord]:
    return [SpokenWord(word, begin + number * every, begin + number * every + 0.2) for number, word in enumerate(words)]


def noise(frames: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 100_000 + frame).randrange(2048) for frame in range(frames)]


def test_ordinary_speech_is_no_loop() -> None:
    """Its small words come again and again, and it may quote itself."""
    minutes = by_minute(spoken(TEXT, every=0.5), [False] * 750, noise(750), frame_rate=RATE)
    assert [(m.words, m.loops) for m in minutes] == [(len(TEXT), False)]
    assert 0.5 < minutes[0].distinct_words / minutes[0].words < 0.9
    assert minutes[0].longest_repeat < 4
    assert loop_warning(minutes) is None
    quoted = by_minute(spoken([*TEXT, *TEXT[:20]], every=0.4), [False] * 750, noise(750), frame_rate=RATE)
    assert quoted[0].repeated_words > 0
    assert loop_warning(quoted) is None


def test_a_sentence_again_and_again_is_one_from_its_minute_on() -> None:
    """Also if it takes longer than a minute until it comes again."""
    words = [*spoken(TEXT, every=0.5), *spoken(["I", "see.", "I", "see,"] * 30, every=0.5, begin=60.0)]
    minutes = by_minute(words, [False] * 1500, noise(1500), frame_rate=RATE)
    assert [m.loops for m in minutes] == [False, True]
    assert (minutes[1].distinct_words, minutes[1].longest_repeat) == (2, 118)
    warning = loop_warning(minutes)
    assert warning is not None
    assert "from 1 min 00 s to 2 min 00 s" in warning or "from 1 min 0 s to 2 min 0 s" in warning
    slow = by_minute(spoken(TEXT * 3, every=0.65), [False] * 2400, noise(2400), frame_rate=RATE)
    assert not slow[0].loops
    assert any(m.loops for m in slow)


def test_sound_that_repeats_is_one_even_without_a_word() -> None:
    pattern = noise(25)
    minutes = by_minute([], [True] * 1500, [*noise(750, seed=1), *pattern * 30], frame_rate=RATE)
    assert [(m.loops, m.padding) for m in minutes] == [(False, 1.0), (True, 1.0)]
    assert minutes[1].repeated_sound > 0.9
    assert "of its sound" in (loop_warning(minutes) or "")


def test_silence_and_a_held_tone_are_none() -> None:
    for code in (0, 77):
        minutes = by_minute([], [True] * 800, [code] * 800, frame_rate=RATE)
        assert [m.loops for m in minutes] == [False, False]
        assert [m.seconds for m in minutes] == [60.0, 4.0]
    assert by_minute([], [], [], frame_rate=RATE) == []
    assert loop_warning([]) is None


def test_a_few_words_tell_nothing() -> None:
    """Somebody who says "yes" five times in a minute is not in a loop."""
    minutes = by_minute(spoken(["yes"] * 15, every=3.0), [True] * 750, noise(750), frame_rate=RATE)
    assert not minutes[0].loops


def test_runs_are_counted_as_their_definitions_say() -> None:
    """Against the definitions, on random sequences of few letters."""
    for seed in range(30):
        letters = random.Random(seed).choices("abc", k=24)
        again = repeated(letters, 3)
        starts = [i for i in range(22) if letters[i : i + 3] in [letters[j : j + 3] for j in range(i)]]
        assert again == [any(i <= at < i + 3 for i in starts) for at in range(24)]
        lengths = [
            n
            for n in range(24)
            if any(letters[i : i + n] == letters[j : j + n] for i in range(25 - n) for j in range(i))
        ]
        assert longest_repeat(letters) == max(lengths)
    assert longest_repeat([]) == longest_repeat(["a"]) == 0
    assert repeated(["a"] * 5, 3, distinct=2) == [False] * 5


def test_the_table_has_a_line_for_each_minute() -> None:
    words = spoken(["again"] * 110, every=0.5, begin=60.0)
    lines = table(by_minute(words, [False] * 1500, noise(1500), frame_rate=RATE))
    assert len(lines) == 3
    assert lines[0].split("  ")[-1] == "text padding"
    assert "loop?" in lines[2]
    assert "loop?" not in lines[1]
