"""How well a model denoises: what the capability `DiffusionScoring` returns. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SegmentLosses:
    """Losses of B windows at N timesteps each, apart for their S segments."""

    loss: Tensor
    """Mean loss over each segment, `[B,N,S]` float32 or float64. S is the same for every window of a dataset."""
    weights: tuple[float, ...]
    """The share of each segment in its window, S numbers with the sum 1: `Σ weights · loss` is the training loss."""


@dataclass(frozen=True)
class WindowSource:
    """What a window is cut from."""

    name: str
    """The recording, such as the path of a video. Windows of one recording are not independent of each other."""
    files: tuple[Path, ...] = ()
    """Files that decide the content of the window, of which a result keeps the hashes; small ones, if it can be helped,
    as an index that holds checksums."""
