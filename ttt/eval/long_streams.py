"""The losses of a stream of any length by position, by kind of stream: `acoustic` of `acoustic 1`, `acoustic 2`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ttt.errors import EnvironmentProblem
from ttt.eval.bench import Bench
from ttt.plugins.scoring import Scores

_FIRST = 1 << 14
"""Positions that there is room for at first."""
_PIECE = 256
"""Positions that are read at once of a clip that is in memory."""


class PositionLosses:
    """Losses of one stream by position. It keeps 8 bytes a position and kind, and sums of each single stream.

    Args:
        streams: names of the K streams.
        late_from: positions from here on are summed apart as well; None if none are.
    """

    def __init__(self, streams: Sequence[str], *, late_from: int | None) -> None:
        self.positions = 0
        """How many have been added."""
        self._late_from = late_from
        kinds = [kind_of(name) for name in streams]
        self._kinds = {kind: [k for k, each in enumerate(kinds) if each == kind] for kind in dict.fromkeys(kinds)}
        # one array that grows: many small ones between large passing ones would break up the process's memory
        self._losses = np.empty((len(self._kinds), _FIRST), dtype=np.float32)
        self._sums = torch.zeros(2, len(streams), dtype=torch.float64)
        self._counts = torch.zeros(2, len(streams), dtype=torch.float64)

    def add(self, scores: Scores) -> None:
        """Add the scores `[1,K,t]` of the next positions."""
        length = scores.nll.shape[-1]
        if not length:
            return
        mask = scores.mask[0].cpu()
        nll = torch.where(mask, scores.nll[0].cpu().double(), 0.0)
        if not bool(nll.isfinite().all()):
            raise ValueError(
                f"the loss is not finite at position {self.positions + int((~nll.isfinite()).any(0).long().argmax())}"
            )
        self._make_room(self.positions + length)
        for place, rows in enumerate(self._kinds.values()):
            counts = mask[rows].sum(0)
            mean = torch.where(counts > 0, nll[rows].sum(0) / counts.clamp_min(1), torch.nan)
            self._losses[place, self.positions : self.positions + length] = mean.numpy()
        late = 0 if self._late_from is None else max(0, min(length, self._late_from - self.positions))
        for part, start in enumerate((0, late)):
            if part and self._late_from is None:
                continue
            self._sums[part] += nll[:, start:].sum(-1)
            self._counts[part] += mask[:, start:].sum(-1)
        self.positions += length

    def _make_room(self, positions: int) -> None:
        """Let there be room for so many positions."""
        if positions > self._losses.shape[1]:
            wider = np.empty((len(self._kinds), 2 * positions), dtype=np.float32)
            wider[:, : self.positions] = self._losses[:, : self.positions]
            self._losses = wider

    def weighted(self, weights: Sequence[float], *, late: bool = False) -> float | None:
        """The mean loss by weights of the streams; None if nothing is predicted there.

        Args:
            weights: of the K streams.
            late: only from `late_from` on.
        """
        part = int(late)
        by_stream = torch.tensor(weights, dtype=torch.float64)
        count = float(by_stream @ self._counts[part])
        return float(by_stream @ self._sums[part]) / count if count else None

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The mean loss of each kind's streams at each position, float32; without kinds that are never predicted."""
        found = {kind: self._losses[place, : self.positions].copy() for place, kind in enumerate(self._kinds)}
        return {kind: losses for kind, losses in found.items() if not np.isnan(losses).all()}


def kind_of(stream: str) -> str:
    """What several streams of a kind share: `acoustic` of `acoustic 3`."""
    return re.sub(r"[ _-]*\d+$", "", stream)


def losses_by_position(bench: Bench, files: Sequence[Path], *, most: int) -> PositionLosses:
    """Read files one after another as one stream, and keep the loss at each position.

    Args:
        bench: the model under an arm.
        files: in order; each is encoded by itself.
        most: after how many positions to stop.

    Raises:
        EnvironmentProblem: a file cannot be read.
        ValueError: a loss is not finite.
    """
    found = PositionLosses(bench.facts.streams, late_from=bench.facts.attention_span)
    with bench.stream() as stream:
        for piece in pieces(bench, files, most):
            found.add(stream.read(piece[None].to(bench.device)))
        found.add(stream.finish())
    if not found.positions:
        raise EnvironmentProblem(f"{files[0]}: holds nothing to read")
    return found


def pieces(bench: Bench, files: Sequence[Path], most: int) -> Iterator[Tensor]:
    """The clips of files one after another in pieces `[S,t]`, `most` positions in all; each is encoded by itself."""
    left = most
    for file in files:
        for piece in bench.reader.stream(file):
            if left <= 0:
                return
            bench.tell(f"{bench.arm}: {file.parent.name}/{file.name}, {most - left:,} positions of {most:,} at most")
            yield piece[:, :left]
            left -= piece.shape[-1]


def losses_at_end(bench: Bench, clip: Tensor, length: int) -> dict[str, float]:
    """The mean loss of the last positions of a clip that is read as one stream, by each way to weigh its streams.

    Args:
        bench: the model under an arm.
        clip: `[S,T]`.
        length: how many positions at its end count.
    """
    facts = bench.facts
    found = PositionLosses(facts.streams, late_from=clip.shape[-1] - length)
    with bench.stream() as stream:
        for piece in clip.split(_PIECE, 1):
            found.add(stream.read(piece[None].to(bench.device)))
        found.add(stream.finish())
    means = {name: found.weighted(weights, late=True) for name, weights in facts.weights.items()}
    return {name: mean for name, mean in means.items() if mean is not None}
