"""Choosing among candidates until no gate of `ttt.eval.speech.gates` tells the right members of pairs from the wrong.

A set is made of slots, one for each pair of the benchmark. A slot has choices, such as the non-words of a word; a
choice is spoken by every voice.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ttt.eval.speech import gates

UNIGRAMS = ("unigrams, mean", "unigrams, sum")
GATES = (*gates.SOUND_GATES, *UNIGRAMS)


@dataclass(frozen=True)
class Heard:
    """What the gates know of a clip."""

    sound_scores: Mapping[str, float]
    """Length, loudness and energy, by the gate's name."""
    codes: np.ndarray
    """Of the codec's first codebook, `[T]` integers."""


Voices = Sequence[tuple[Heard, Heard]]
"""One pair, the right member first, as each voice says it."""


@dataclass(frozen=True)
class Accuracy:
    """How often a gate prefers the right member, in the mean over pairs; a pair is first averaged over its voices."""

    mean: float
    stderr: float
    """Over pairs, so that the voices of a pair do not count as independent."""
    pairs: int

    @property
    def honest(self) -> bool:
        """Whether it is 50 % within two standard errors."""
        return abs(self.mean - 0.5) <= 2 * self.stderr + 1e-12


def accuracies(pairs: Sequence[Voices]) -> dict[str, Accuracy]:
    """Each gate's accuracy on a set."""
    return {gate: _accuracy(units) for gate, units in _units(pairs).items()}


def _accuracy(units: np.ndarray) -> Accuracy:
    stderr = float(units.std(ddof=1)) / math.sqrt(len(units)) if len(units) > 1 else math.nan
    return Accuracy(float(units.mean()), stderr, len(units))


def _units(pairs: Sequence[Voices]) -> dict[str, np.ndarray]:
    """By gate, the score of each pair: 1 where the right member is preferred, ½ for a tie, averaged over voices."""
    flat = [clip for voices in pairs for pair in voices for clip in pair]
    codes = [clip.codes for clip in flat]
    scores = {gate: [clip.sound_scores[gate] for clip in flat] for gate in gates.SOUND_GATES}
    scores[UNIGRAMS[0]] = gates.unigram_scores(codes, normalise="mean")
    scores[UNIGRAMS[1]] = gates.unigram_scores(codes, normalise="sum")
    ends = np.cumsum([len(voices) for voices in pairs])
    return {gate: _by_pair(np.asarray(values).reshape(-1, 2), ends) for gate, values in scores.items()}


def _by_pair(scores: np.ndarray, ends: np.ndarray) -> np.ndarray:
    won = (np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2
    return np.array([part.mean() for part in np.split(won, ends[:-1])])


def choose(slots: Sequence[Sequence[Voices]], *, seed: int, starts: int = 12, sweeps: int = 4) -> list[int]:
    """Which choice each slot takes, so that every gate is as near to 50 % as can be found.

    From a random start one slot after another takes the choice that brings the gates nearest to 50 %. It ends once
    every gate is at 50 %, in a large set within a quarter of a pair; else the best of all starts is taken.
    """
    chance = random.Random(f"{seed} balance")
    found = []
    for _ in range(starts):
        chosen = [chance.randrange(len(slot)) for slot in slots]
        off = _descend(slots, chosen, sweeps)
        found.append((off, chosen))
        if off <= 1e-9:
            break
    return min(found)[1]


def _descend(slots: Sequence[Sequence[Voices]], chosen: list[int], sweeps: int) -> float:
    off = _off(slots, chosen)
    for _ in range(sweeps):
        before = off
        for place, slot in enumerate(slots):
            tried = [(_off(slots, [*chosen[:place], i, *chosen[place + 1 :]]), i) for i in range(len(slot))]
            off, chosen[place] = min(tried)
            if off <= 1e-9:
                return off
        if off >= before:
            break
    return off


def _off(slots: Sequence[Sequence[Voices]], chosen: Sequence[int]) -> float:
    """The squared distances of the gates from 50 %, summed; a quarter of a pair is nothing in a large set."""
    units = _units([slot[i] for slot, i in zip(slots, chosen, strict=True)])
    slack = 0.25 / len(slots) if len(slots) > 20 else 0.0
    return sum(max(0.0, abs(float(values.mean()) - 0.5) - slack) ** 2 for values in units.values())
