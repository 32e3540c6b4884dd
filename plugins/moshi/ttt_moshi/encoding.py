"""Sound to codes, piece after piece: the codes of the whole, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from moshi.models import MimiModel
from moshi.utils.compile import no_cuda_graph
from torch import Tensor
from torch.nn import functional as F

from ttt_moshi.codec import DemoCodec
from ttt_moshi.options import LONG_WINDOW, PIECE
from ttt_moshi.streaming import exact_streaming

Encode = Callable[[Tensor], Tensor]
"""Encodes the next frames of sound `[B, 1, samples]`, whole frames except at the end, to codes `[B, K, t]`."""


class Encoding(Protocol):
    """What encodes sound: the part of a codec's interface that is used here."""

    @property
    def frame_size(self) -> int:
        """Samples of a frame."""
        ...

    def encode(self, wav: Tensor, /) -> Tensor:
        """Codes `[B, K, T]` of sound `[B, 1, samples]`."""
        ...


def piecewise(codec: Any, rows: int) -> Encode:
    """A function that encodes so many rows of sound, in pieces of up to 256 frames."""
    return (_by_mimi if isinstance(codec, MimiModel) else _by_the_demo)(codec, rows)


@torch.no_grad()
def encode_window(codec: Encoding, sound: Tensor) -> Tensor:
    """The codes `[B, K, T]` of a window of sound `[B, 1, samples]`; one of more than 240 s is read in pieces."""
    if sound.shape[2] <= LONG_WINDOW * codec.frame_size:
        return codec.encode(sound)
    encode = piecewise(codec, sound.shape[0])
    whole = F.pad(sound, (0, -sound.shape[2] % codec.frame_size))
    return torch.cat([encode(piece) for piece in whole.split(PIECE * codec.frame_size, 2)], 2)


def _by_the_demo(codec: DemoCodec, rows: int) -> Encode:
    """With the samples before a piece, which its first frame depends on."""
    before = codec.window.new_zeros(rows, 1, codec.overlap)

    def encode(sound: Tensor) -> Tensor:
        nonlocal before
        codes = codec.encode(sound, before=before)
        before = torch.cat([before, sound], 2)[:, :, sound.shape[2] :]
        return codes

    return encode


def _by_mimi(codec: MimiModel, rows: int) -> Encode:
    """Through Mimi's streaming state, which is with the function: Mimi itself streams only while it encodes a piece."""
    steps = round(PIECE * codec.encoder_frame_rate / codec.frame_rate)
    with exact_streaming(codec, rows, longest=steps):
        states = codec.get_streaming_state()

    def encode(sound: Tensor) -> Tensor:
        codec.set_streaming_state(states)
        try:
            with torch.no_grad(), no_cuda_graph():  # a graph would fit pieces of one length only
                return codec.encode(sound)
        finally:
            codec.set_streaming_state(dict.fromkeys(states))

    return encode
