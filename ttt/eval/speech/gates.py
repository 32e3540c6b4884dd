"""Honesty gates: what tells a pair apart without any model of language.

A benchmark of pairs is worth something only if length alone, energy alone and the codes' own frequencies score near
50 % on it. Each gate here gives a clip a score, as a model would; the pairs are then counted as a model's are, and
the gates' accuracies stand beside it. A gate well away from 50 %, on either side, can explain a model's accuracy.

Gates on sound take a waveform `[samples]`; the gate on codes takes what a backbone's reader made, `[T]` integers of
one stream. This module imports NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from ttt.plugins.scoring import SoundReader

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from ttt.eval.bench import Bench

_NORMALISED: Final[tuple[Literal["mean", "sum"], ...]] = ("mean", "sum")


def length(sound: ArrayLike) -> float:
    """How long a clip is, in samples."""
    return float(_flat(sound).size)


def rms(sound: ArrayLike) -> float:
    """How loud a clip is: the root of its samples' mean square; 0 for an empty one."""
    samples = _flat(sound)
    return float(np.sqrt(np.mean(np.square(samples)))) if samples.size else 0.0


def energy(sound: ArrayLike) -> float:
    """A clip's total energy: the sum of its samples' squares. A loud clip has more of it, and so has a long one."""
    return float(np.sum(np.square(_flat(sound))))


SOUND_GATES: Final[Mapping[str, Callable[[ArrayLike], float]]] = {"length": length, "rms": rms, "energy": energy}
"""The gates that need the sound alone, by name."""


ALIKE: Final[Mapping[str, float]] = {"rms": 1e-3, "energy": 1e-3}
"""Relative differences of loudness that tell nothing: below a hundredth of a decibel, it is the rounding of samples."""


def unigram_scores(
    clips: Sequence[ArrayLike], *, normalise: Literal["mean", "sum"] = "mean", smoothing: float = 0.5
) -> list[float]:
    """How likely each clip is if its codes are drawn one by one, by how often each code is in the other clips.

    A clip's own codes are left out of the frequencies that it is scored by: else a clip would vouch for itself, and
    long ones most.

    Args:
        clips: the codes of each clip of a set, `[T]` integers of one stream; lengths differ.
        normalise: the mean of the log-probabilities of a clip's codes, or their sum.
        smoothing: what is added to the count of every code that the set has.

    Returns:
        For each clip, in nats.

    Raises:
        ValueError: a clip is empty or is not one stream of integers, or smoothing is not above 0.
    """
    if not smoothing > 0:
        raise ValueError(f"smoothing is {smoothing}; it must be above 0")
    rows = [_codes_of(clip, number) for number, clip in enumerate(clips)]
    if not rows:
        return []
    codes, places = np.unique(np.concatenate(rows), return_inverse=True)
    totals = np.bincount(places.reshape(-1))
    scores: list[float] = []
    for own in np.split(places.reshape(-1), np.cumsum([len(row) for row in rows])[:-1]):
        held, counts = np.unique(own, return_counts=True)
        others = totals.sum() - len(own) + smoothing * len(codes)
        score = float(counts @ np.log((totals[held] - counts + smoothing) / others))
        scores.append(score / len(own) if normalise == "mean" else score)
    return scores


def _codes_of(clip: ArrayLike, number: int) -> NDArray[np.int64]:
    row = np.asarray(clip)
    if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(
            f"clip {number} is {row.dtype}{list(row.shape)}; clips are one stream of integers, [T], T >= 1"
        )
    return row.astype(np.int64)


def codes_of(bench: Bench, file: Path) -> NDArray[np.int64]:
    """A file's codes of the stream that weighs most, `[T]`; kept, so that no file is encoded twice for them."""
    known: dict[Path, NDArray[np.int64]] = bench.kept.setdefault("codes", {})
    if file not in known:
        weights = bench.facts.weights[bench.facts.chosen]
        known[file] = bench.clip(file)[max(range(len(weights)), key=lambda k: weights[k])].numpy().copy()
    return known[file]


def gate_scores(bench: Bench, files: Sequence[Path]) -> dict[str, list[float]]:
    """Every gate's scores of sound files, by the gate's name.

    Args:
        bench: for its reader, and for which of the streams is scored.
        files: of the whole set.
    """
    clips = [codes_of(bench, file) for file in files]
    scores: dict[str, list[float]] = {}
    if isinstance(bench.reader, SoundReader):
        rows = [[gate(sound) for gate in SOUND_GATES.values()] for sound in map(bench.reader.sound, files)]
        scores = {name: [row[place] for row in rows] for place, name in enumerate(SOUND_GATES)}
    codes = {f"codes_{how}": unigram_scores(clips, normalise=how) for how in _NORMALISED}
    return {**scores, **codes}


def _flat(sound: ArrayLike) -> NDArray[np.float64]:
    samples = np.asarray(sound, dtype=np.float64)
    if samples.ndim != 1:
        raise ValueError(f"a gate takes a waveform [samples], not {list(samples.shape)}")
    return samples
