"""Where the streams of the demo's codec stand, in kyutai's manner: `with codec.streaming(batch_size): …`.

Encoding continues the samples before a piece, so it is exact. Decoding finds the phases of one frame after another: the
sound that has been given out stays as it is, and the new frame is fitted to it where their windows overlap (RTISI:
Beauregard, Zhu and Wyse 2005). So there is no seam, and pieces of any length give the same sound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from moshi.modules.streaming import State
from torch import Tensor

_MOMENTUM = 0.99
_NOISE = 1e-7
"""Of the first guess, whose phases would all be zero after silence: far below 16 bits."""


@dataclass
class CodecState(State):
    """Streams of the codec: one row for each. A row that `exec_mask` pauses does not change; `reset` empties rows."""

    heard: Tensor
    """The samples before the next ones to encode, `[B, 1, overlap]`."""
    said: Tensor
    """The last decoded samples, `[B, overlap]`."""
    expected: Tensor
    """How the decoded sound would go on if its last spectrum lasted, `[B, overlap]`."""

    @classmethod
    def fresh(cls, batch_size: int, *, overlap: int, device: torch.device) -> CodecState:
        """Streams that start after silence."""
        silence = torch.zeros(batch_size, overlap, device=device)
        return cls(batch_size, device, silence[:, None].clone(), silence.clone(), silence.clone())

    def hear(self, wav: Tensor) -> None:
        """Keep the end of what was encoded, sound `[B, 1, samples]`."""
        self._take("heard", torch.cat([self.heard, wav], 2)[:, :, wav.shape[2] :])

    def say(self, sound: Tensor, expected: Tensor) -> None:
        """Keep the end of what was decoded, sound `[B, samples]`, and how it would go on, `[B, overlap]`."""
        self._take("said", torch.cat([self.said, sound], 1)[:, sound.shape[1] :])
        self._take("expected", expected)

    def reset(self, reset_mask: Tensor) -> None:
        """Start the streams for which `reset_mask [B]` is true after silence."""
        super().reset(reset_mask)
        for kept in (self.heard, self.said, self.expected):
            kept[reset_mask] = 0

    def _take(self, name: str, new: Tensor) -> None:
        kept: Tensor = getattr(self, name)
        rows = self.exec_mask.view(-1, *(1 for _ in new.shape[1:]))
        kept.copy_(torch.where(rows, new, kept))


def next_sound(
    magnitude: Tensor, said: Tensor, expected: Tensor, *, window: Tensor, hop: int, fft_size: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """Find the sound of a frame's spectra that continues the sound before it.

    The window of a spectrum ends with its hop, so the first windows reach into the sound before. Behind the frame its
    last spectrum is repeated, so that the end does not fade.

    Args:
        magnitude: `[B, S, bins]`.
        said: the sound before, `[B, overlap]`, overlap = window size - hop.
        expected: a first guess at the frame's beginning, `[B, overlap]`.
        window: of a spectrum; four hops or more.
        hop: samples between spectra.
        fft_size: length of the transform.
        iterations: of Griffin and Lim, with momentum.

    Returns:
        The frame's samples `[B, S * hop]`, and how they would go on `[B, overlap]`.
    """
    size, spectra = len(window), magnitude.shape[1]
    overlap = size - hop
    held = overlap // hop
    target = torch.cat([magnitude, magnitude[:, -1:].expand(-1, held, -1)], 1) * window.sum()
    length = overlap + (spectra + held) * hop
    weights = _overlapped(window.square().expand(1, spectra + held, -1), length, hop).clamp_min(1e-8)
    phase = _first_phases(said, expected, spectra + held, window=window, hop=hop, fft_size=fft_size)
    previous = torch.zeros_like(phase)
    for step in range(iterations + 1):
        pieces = torch.fft.irfft(target * phase, fft_size)[..., :size] * window
        sound = _overlapped(pieces, length, hop) / weights
        sound = torch.cat([said, sound[:, overlap:]], 1)
        if step < iterations:
            consistent = torch.fft.rfft(sound.unfold(-1, size, hop) * window, fft_size)
            ahead = consistent + _MOMENTUM * (consistent - previous)
            previous = consistent
            phase = ahead / ahead.abs().clamp_min(1e-12)
    end = overlap + spectra * hop
    return sound[:, overlap:end], sound[:, end:]


def _first_phases(said: Tensor, expected: Tensor, spectra: int, *, window: Tensor, hop: int, fft_size: int) -> Tensor:
    """Phases `[B, S, bins]`: of what is there, then each turned on by its bin's frequency."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(said.shape[1] + expected.shape[1], generator=generator).to(said)
    there = torch.cat([said, expected], 1) + _NOISE * noise
    known = torch.fft.rfft(there.unfold(-1, len(window), hop) * window, fft_size)
    known = (known / known.abs().clamp_min(1e-30))[:, :spectra]
    missing = spectra - known.shape[1]
    turns = torch.arange(1, missing + 1, device=said.device)[:, None] * torch.arange(
        known.shape[-1], device=said.device
    )
    angles = turns.to(said.dtype) * (2 * math.pi * hop / fft_size)
    return torch.cat([known, known[:, -1:] * torch.polar(torch.ones_like(angles), angles)], 1)


def _overlapped(pieces: Tensor, length: int, hop: int) -> Tensor:
    """The sum of pieces `[B, S, size]`, each a hop after the other, `[B, length]`."""
    folded = torch.nn.functional.fold(
        pieces.transpose(1, 2), (1, length), kernel_size=(1, pieces.shape[-1]), stride=(1, hop)
    )
    return folded[:, 0, 0]
