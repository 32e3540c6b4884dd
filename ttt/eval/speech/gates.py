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
    counts = _counts(clips)
    others = counts.sum(0) - counts + smoothing
    scores = (counts * np.log(others / others.sum(1, keepdims=True))).sum(1)
    return [float(score) for score in (scores / counts.sum(1) if normalise == "mean" else scores)]


def gate_scores(bench: Bench, files: Sequence[Path]) -> dict[str, list[float]]:
    """Every gate's scores of sound files, by the gate's name.

    Args:
        bench: for its reader, and for which of the streams is scored.
        files: of the whole set.
    """
    weights = bench.facts.weights[bench.facts.chosen]
    stream = max(range(len(weights)), key=lambda k: weights[k])
    clips = [bench.clip(file)[stream].numpy() for file in files]
    scores: dict[str, list[float]] = {}
    if isinstance(bench.reader, SoundReader):
        rows = [[gate(sound) for gate in SOUND_GATES.values()] for sound in map(bench.reader.sound, files)]
        scores = {name: [row[place] for row in rows] for place, name in enumerate(SOUND_GATES)}
    codes = {f"codes_{how}": unigram_scores(clips, normalise=how) for how in _NORMALISED}
    return {**scores, **codes}


def _counts(clips: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """How often each clip has each code of the set, `[clips, codes]`."""
    rows = [np.asarray(clip) for clip in clips]
    for i, row in enumerate(rows):
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"clip {i} is {row.dtype}{list(row.shape)}; clips are one stream of integers, [T], T >= 1")
    if not rows:
        return np.zeros((0, 0))
    codes, places = np.unique(np.concatenate(rows), return_inverse=True)
    owner = np.repeat(np.arange(len(rows)), [row.size for row in rows])
    flat = np.bincount(owner * len(codes) + places.reshape(-1), minlength=len(rows) * len(codes))
    return flat.reshape(len(rows), len(codes)).astype(np.float64)


def _flat(sound: ArrayLike) -> NDArray[np.float64]:
    samples = np.asarray(sound, dtype=np.float64)
    if samples.ndim != 1:
        raise ValueError(f"a gate takes a waveform [samples], not {list(samples.shape)}")
    return samples
