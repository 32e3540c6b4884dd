"""Prose to read aloud, for as long as is wanted: own sentences from templates, with passages that come again.

The passages are beginnings of works whose authors died before 1900, in the public domain everywhere. Everything
between them is made from the templates here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PASSAGES: dict[str, tuple[str, ...]] = {
    "Jane Austen, Pride and Prejudice (1813)": (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want "
        "of a wife.",
        "However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
        "truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful "
        "property of some one or other of their daughters.",
    ),
    "Charles Dickens, A Tale of Two Cities (1859)": (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
        "It was the season of Light, it was the season of Darkness, it was the spring of hope, it was the winter of "
        "despair.",
    ),
    "Herman Melville, Moby-Dick (1851)": (
        "Call me Ishmael.",
        "Some years ago, never mind how long precisely, having little or no money in my purse, and nothing particular "
        "to interest me on shore, I thought I would sail about a little and see the watery part of the world.",
    ),
    "Lewis Carroll, Alice's Adventures in Wonderland (1865)": (
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.",
        "Once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations "
        "in it.",
    ),
    "William Shakespeare, Sonnet 18 (1609)": (
        "Shall I compare thee to a summer's day? Thou art more lovely and more temperate.",
        "Rough winds do shake the darling buds of May, and summer's lease hath all too short a date.",
    ),
    "Abraham Lincoln, Gettysburg Address (1863)": (
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
        "Liberty, and dedicated to the proposition that all men are created equal.",
        "Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so "
        "dedicated, can long endure.",
    ),
}

_WHO = (
    *("the farmer", "the old captain", "a young doctor", "my grandmother", "the teacher", "our neighbor", "the baker"),
    *("a tired traveler", "the painter", "her younger brother", "the soldier", "a quiet stranger", "the miller"),
    *("the waiter", "my uncle", "the gardener", "a clever student", "the lawyer", "his cousin", "the queen"),
)
_DID = (
    *("walked slowly", "looked back", "sat down", "waited for an hour", "began to sing", "stopped to listen"),
    *("found a silver coin", "lost a letter", "opened the window", "carried a heavy basket", "lit a candle"),
    *("wrote a long letter", "told the same story", "bought a yellow umbrella", "mended the wooden gate"),
    *("counted the apples", "forgot the answer", "asked for water", "fed the animals", "painted the kitchen door"),
)
_WHERE = (
    *("in the garden", "near the river", "by the harbor", "at the market", "on the mountain", "behind the hotel"),
    *("under the bridge", "in the middle of the village", "beside the station", "across the valley"),
    *("at the corner of the table", "in the forest", "outside the hospital", "on the island", "in the palace"),
)
_WHEN = (
    *("in the morning", "before breakfast", "after dinner", "on saturday", "late in the evening", "in winter"),
    *("that summer", "during the storm", "long ago", "every afternoon", "at midnight", "the following day"),
)
_WHY = (
    *("because the weather was lovely", "although nobody had asked", "until the lamp went out", "for no good reason"),
    *("because the children were hungry", "as if nothing had happened", "while the others were sleeping"),
    *("since there was not a minute to lose", "though the road was dangerous", "when the music was over"),
)
_ALSO = (
    *("There was a smell of coffee and leather.", "It was a question without an answer.", "The sky was purple."),
    *("Somewhere a dog was barking.", "The water was colder than it had ever been.", "A letter lay on the carpet."),
    *("Nothing in the room had changed.", "The clock struck eleven.", "Snow was beginning to fall."),
    *("It seemed a hundred years ago.", "The lemon tree was in flower.", "No one said another word."),
)


@dataclass(frozen=True)
class Sentence:
    """One to read."""

    text: str
    passage: str | None = None
    """The passage that it is of; None if it is made from templates."""


def prose(*, seed: int, book: str) -> Iterator[Sentence]:
    """A book's sentences without end, none of them a passage's."""
    chance = random.Random(f"{seed} prose {book}")
    while True:
        yield Sentence(_sentence(chance))


def _sentence(chance: random.Random) -> str:
    who, other, did, later = chance.choice(_WHO), chance.choice(_WHO), *chance.sample(_DID, 2)
    where, when, why = chance.choice(_WHERE), chance.choice(_WHEN), chance.choice(_WHY)
    shapes: Sequence[str] = (
        f"{when}, {who} {did} {where}.",
        f"{who} {did} {where}, and {other} {later}.",
        f"{who} {did} {why}.",
        f"{where}, {who} {did}, {why}.",
        f"{when}, {other} {did} and then {later} {where}.",
        chance.choice(_ALSO),
    )
    text = chance.choice(shapes)
    return text[0].upper() + text[1:]


def passage(title: str) -> list[Sentence]:
    """A passage's sentences."""
    return [Sentence(text, title) for text in PASSAGES[title]]


def words_of(sentences: Sequence[Sentence]) -> list[str]:
    """The words, in small letters and without punctuation."""
    return [word.strip(".,?;:!'").lower() for sentence in sentences for word in sentence.text.split()]
