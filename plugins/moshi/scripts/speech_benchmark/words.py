"""Common words, and non-words made from them by phoneme swaps that match the words' own bigrams.

Phonemes are espeak-ng's own names for American English (`espeak-ng -x --sep=_`), stress marks included: `w 'I n d oU`.
"""

from __future__ import annotations

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


def is_vowel(phone: str) -> bool:
    """Whether a phoneme is the heart of a syllable."""
    return unstressed(phone)[0] in _VOWEL_LETTERS


def unstressed(phone: str) -> str:
    """A phoneme without the mark of stress before it."""
    return phone.lstrip(_STRESS)


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

    def score(self, phones: Sequence[str], without: Sequence[str] = ()) -> float:
        """The mean log-probability of the bigrams, in nats; those of `without` do not count as seen."""
        removed = Counter(bigrams_of(without)) if without else Counter()
        removed_firsts = Counter(first for first, _ in removed.elements())
        found = bigrams_of(phones)
        return sum(
            math.log(
                (self.pairs.get(pair, 0) - removed[pair] + 0.5)
                / (self.firsts.get(pair[0], 0) - removed_firsts[pair[0]] + 0.5 * (len(self.phones) + 1))
            )
            for pair in found
        ) / len(found)

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
    own = bigrams.score(phones, without=phones)
    for candidate in _replaced(phones, bigrams.phones, 2 if len(phones) >= 7 else 1):
        if plain(candidate) in taken or not bigrams.attested(candidate):
            continue
        difference = bigrams.score(candidate, without=phones) - own
        if abs(difference) <= TOLERANCE:
            yield NonWord(word, candidate, difference)


def _replaced(phones: Phones, alphabet: Sequence[str], times: int) -> Iterator[Phones]:
    for place, phone in enumerate(phones):
        for other in alphabet:
            if other == unstressed(phone) or is_vowel(other) != is_vowel(phone):
                continue
            changed = (*phones[:place], stress(phone) + other, *phones[place + 1 :])
            if times == 1:
                yield changed
            else:
                rest = _replaced(changed[place + 1 :], alphabet, times - 1)
                yield from ((*changed[: place + 1], *tail) for tail in rest)


def choose_swaps(word: str, lexicon: Mapping[str, Phones], bigrams: Bigrams, *, count: int, seed: int) -> list[NonWord]:
    """Up to `count` non-words of a word, by chance, as many above the word's likelihood as below it where possible."""
    found = sorted(swaps(word, lexicon, bigrams), key=lambda non: non.phones)
    random.Random(f"{seed} {word}").shuffle(found)
    above, below = ([n for n in found if (n.difference > 0) == more] for more in (True, False))
    half = min(len(above), len(below), count // 2) or count
    return sorted((above[:half] + below[:half])[:count], key=lambda non: non.phones)
