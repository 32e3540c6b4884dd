"""Common words, and non-words made from them by phoneme swaps that match the words' own bigrams.

Phonemes are espeak-ng's own names for American English (`espeak-ng -x --sep=_`), stress marks included: `w 'I n d oU`.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Phones = tuple[str, ...]


def _words(name: str) -> tuple[str, ...]:
    return tuple(Path(__file__).with_name(name).read_text(encoding="utf-8").split())


WORDS = _words("common_words.txt")
"""An own list of common English words of two and more syllables: of these, few are a phoneme away from another."""

OTHER_WORDS = _words("other_words.txt")
"""More real words, which a swap must not make by accident. No pair is made of them."""

_VOWEL_LETTERS = frozenset("aeiouAEIOUV03@")
_STRESS = "',%="
BOUNDARY = "#"
TOLERANCE = 0.35
"""By how many nats a bigram of a non-word may be more or less likely than its word's, in the mean over bigrams."""


@functools.cache
def is_vowel(phone: str) -> bool:
    """Whether a phoneme is the heart of a syllable."""
    return unstressed(phone)[0] in _VOWEL_LETTERS


@functools.cache
def unstressed(phone: str) -> str:
    """A phoneme without the mark of stress before it."""
    return phone.lstrip(_STRESS)


@functools.cache
def stress(phone: str) -> str:
    """The mark of stress before a phoneme, or nothing."""
    return phone[: len(phone) - len(unstressed(phone))]


def plain(phones: Sequence[str]) -> Phones:
    """Phonemes without stress: what homophones are compared by."""
    return tuple(unstressed(phone) for phone in phones)


def bigrams_of(phones: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbours in a word, its two boundaries included."""
    bounded = (BOUNDARY, *plain(phones), BOUNDARY)
    return list(itertools.pairwise(bounded))


@dataclass(frozen=True)
class Bigrams:
    """How often phonemes are neighbours in a list of words."""

    pairs: Mapping[tuple[str, str], int]
    firsts: Mapping[str, int]
    phones: tuple[str, ...]
    """All there are, without stress, sorted."""

    @classmethod
    def of(cls, lexicon: Mapping[str, Phones]) -> Bigrams:
        """Count those of all words."""
        pairs = Counter(pair for phones in lexicon.values() for pair in bigrams_of(phones))
        firsts: Counter[str] = Counter()
        for (first, _), count in pairs.items():
            firsts[first] += count
        return cls(pairs, firsts, tuple(sorted({p for pair in pairs for p in pair} - {BOUNDARY})))

    def without(self, phones: Sequence[str]) -> Bigrams:
        """The counts with one word less; what there is to choose from stays."""
        pairs, firsts = Counter(self.pairs), Counter(self.firsts)
        pairs.subtract(bigrams_of(phones))
        firsts.subtract(first for first, _ in bigrams_of(phones))
        return Bigrams(pairs, firsts, self.phones)

    def score(self, phones: Sequence[str]) -> float:
        """The mean log-probability of the bigrams, in nats, half a count added to each."""
        added = 0.5 * (len(self.phones) + 1)
        found = bigrams_of(phones)
        logs = [math.log((self.pairs.get(p, 0) + 0.5) / (self.firsts.get(p[0], 0) + added)) for p in found]
        return sum(logs) / len(found)

    def attested(self, phones: Sequence[str]) -> bool:
        """Whether some word has each of these neighbours."""
        return all(self.pairs.get(pair, 0) > 0 for pair in bigrams_of(phones))


@dataclass(frozen=True)
class NonWord:
    """A word with phonemes swapped."""

    word: str
    phones: Phones
    difference: float
    """Its mean log-probability by bigrams less its word's, the word's own left out of the counts. In nats."""


def swaps(word: str, lexicon: Mapping[str, Phones], bigrams: Bigrams) -> Iterator[NonWord]:
    """Non-words of a word: one phoneme, or two, each replaced by another of its kind, stress kept.

    All their bigrams are those of real words; they are as likely as the word's, to within `TOLERANCE`; none sounds as
    a word of the lexicon does. Words of seven phonemes and more have two replaced, or they would still be understood.
    """
    phones = lexicon[word]
    taken = {plain(known) for known in lexicon.values()}
    others = bigrams.without(phones)
    own = others.score(phones)
    for candidate in replaced(phones, bigrams, 2 if len(phones) >= 7 else 1):
        difference = others.score(candidate) - own
        if plain(candidate) not in taken and abs(difference) <= TOLERANCE:
            yield NonWord(word, candidate, difference)


def replaced(phones: Sequence[str], bigrams: Bigrams, times: int, before: str = BOUNDARY) -> Iterator[Phones]:
    """All ways to replace exactly `times` phonemes by others of their kind so that every bigram is attested.

    Args:
        phones: what stands after `before`.
        bigrams: those of real words.
        times: how many are replaced.
        before: the phoneme before them, without stress.
    """
    if times > len(phones) or not phones:
        if not phones and not times and bigrams.pairs.get((before, BOUNDARY), 0) > 0:
            yield ()
        return
    first, rest = phones[0], phones[1:]
    own = unstressed(first)
    kin = [p for p in bigrams.phones if p != own and is_vowel(p) == is_vowel(own)] if times else []
    for phone in (own, *kin):
        if bigrams.pairs.get((before, phone), 0) > 0:
            tails = replaced(rest, bigrams, times - (phone != own), phone)
            yield from ((stress(first) + phone, *tail) for tail in tails)


def choose_swaps(word: str, lexicon: Mapping[str, Phones], bigrams: Bigrams, *, count: int, seed: int) -> list[NonWord]:
    """Up to `count` non-words of a word, by chance, as many above the word's likelihood as below it where possible."""
    found = sorted(swaps(word, lexicon, bigrams), key=lambda non: non.phones)
    random.Random(f"{seed} {word}").shuffle(found)
    above, below = ([n for n in found if (n.difference > 0) == more] for more in (True, False))
    half = min(len(above), len(below), count // 2) or count
    return sorted((above[:half] + below[:half])[:count], key=lambda non: non.phones)
