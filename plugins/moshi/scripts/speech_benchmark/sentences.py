"""Pairs of sentences from own templates: one right, one wrong, of the same number of words.

Each kind of mistake has two mirrored halves, as singular and plural subjects: a mistake that lengthens a sentence in
one half shortens it in the other, so that length and single words do not tell right from wrong.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NOUNS = (
    *(("dog", "dogs"), ("teacher", "teachers"), ("farmer", "farmers"), ("doctor", "doctors"), ("sister", "sisters")),
    *(("neighbor", "neighbors"), ("kitten", "kittens"), ("student", "students"), ("driver", "drivers")),
    *(("singer", "singers"), ("captain", "captains"), ("painter", "painters")),
)
THINGS = (
    *(("book", "books"), ("cup", "cups"), ("chair", "chairs"), ("letter", "letters"), ("picture", "pictures")),
    *(("apple", "apples"), ("window", "windows"), ("basket", "baskets"), ("ticket", "tickets"), ("pencil", "pencils")),
)
VERBS = (
    *(("runs", "run"), ("sings", "sing"), ("works", "work"), ("sleeps", "sleep"), ("waits", "wait")),
    *(("smiles", "smile"), ("reads", "read"), ("listens", "listen")),
)
ADVERBS = ("here", "today", "alone", "outside", "every day", "in the garden")
MEN = ("John", "Peter", "David", "the boy", "my father", "her brother", "the king", "my uncle")
WOMEN = ("Mary", "Anna", "Susan", "the girl", "my mother", "his sister", "the queen", "my aunt")
REFLEXIVE = ("saw", "hurt", "helped", "trusted", "washed", "dressed", "blamed", "taught")
ADJECTIVES = ("big", "old", "happy", "quiet", "young", "tired", "hungry", "friendly")
BUYERS = ("Mary", "John", "my sister", "the farmer", "a student", "the captain")
TAKING = ("bought", "found", "lost", "wanted", "painted", "sold")
ONE = ("this", "that", "each")
MANY = ("these", "those", "many")
NEVER = (
    *("ever been here", "ever seen snow", "ever lost a game", "ever met a king", "ever slept outside", "ever been ill"),
    *("ever told a lie", "ever read the book", "ever found gold", "ever asked why", "ever come home late", "ever sung"),
    *("ever baked bread", "ever seen a tiger", "ever left the island", "ever been so happy", "ever missed the train"),
    *("ever planted a tree", "ever written a song", "ever broken a cup", "ever kept a secret", "ever been to sea"),
)
PRONOUNS = (("nobody", "everybody"), ("no one", "everyone"))
QUANTIFIED = tuple((f"no {noun}", f"each {noun}") for noun in ("student", "farmer", "teacher", "driver", "painter"))
"""What a word such as `ever` needs before it, and what it cannot follow."""


@dataclass(frozen=True)
class SentencePair:
    """A right sentence and a wrong one."""

    type: str
    """The kind of mistake."""
    subtype: str
    """Which of its mirrored halves."""
    correct: str
    incorrect: str


def _agreement(plural: bool) -> Iterator[tuple[str, str]]:
    for noun, verb, adverb in itertools.product(NOUNS, VERBS, ADVERBS):
        right, wrong = (verb[1], verb[0]) if plural else verb
        yield f"the {noun[plural]} {right} {adverb}", f"the {noun[plural]} {wrong} {adverb}"


def _determiner(plural: bool) -> Iterator[tuple[str, str]]:
    for who, verb, thing, (one, many) in itertools.product(BUYERS, TAKING, THINGS, zip(ONE, MANY, strict=True)):
        determiner = many if plural else one
        yield f"{who} {verb} {determiner} {thing[plural]}", f"{who} {verb} {determiner} {thing[not plural]}"


def _anaphor(women: bool) -> Iterator[tuple[str, str]]:
    own, others = ("herself", "himself") if women else ("himself", "herself")
    for who, verb in itertools.product(WOMEN if women else MEN, REFLEXIVE):
        yield f"{who} {verb} {own}", f"{who} {verb} {others}"


def _order(after_noun: bool) -> Iterator[tuple[str, str]]:
    for noun, adjective, verb in itertools.product(NOUNS, ADJECTIVES, VERBS):
        wrong = f"the {noun[0]} {adjective} {verb[0]}" if after_noun else f"{adjective} the {noun[0]} {verb[0]}"
        yield f"the {adjective} {noun[0]} {verb[0]}", wrong


def _polarity(quantified: bool) -> Iterator[tuple[str, str]]:
    for (no, every), rest in itertools.product(QUANTIFIED if quantified else PRONOUNS, NEVER):
        yield f"{no} has {rest}", f"{every} has {rest}"


_Maker = Callable[[bool], Iterator[tuple[str, str]]]
TEMPLATES: dict[str, tuple[_Maker, tuple[str, str]]] = {
    "subject_verb_agreement": (_agreement, ("singular_subject", "plural_subject")),
    "determiner_noun_agreement": (_determiner, ("singular_determiner", "plural_determiner")),
    "anaphor_agreement": (_anaphor, ("masculine", "feminine")),
    "word_order": (_order, ("adjective_before_determiner", "adjective_after_noun")),
    "negative_polarity": (_polarity, ("pronoun", "quantified_noun")),
}
"""By type: what makes its pairs, and the names of its two halves."""


def sentence_pairs(*, seed: int) -> dict[tuple[str, str], list[SentencePair]]:
    """All pairs by type and subtype, each list in an order by chance."""
    made: dict[tuple[str, str], list[SentencePair]] = {}
    for kind, (maker, halves) in TEMPLATES.items():
        for second, half in enumerate(halves):
            pairs = [SentencePair(kind, half, right, wrong) for right, wrong in maker(bool(second))]
            random.Random(f"{seed} {kind} {half}").shuffle(pairs)
            made[kind, half] = pairs
    return made
