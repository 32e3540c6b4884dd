"""The order in which TTT reads the tokens of a video and its texts, forward and backward.

A backbone holds the tokens of a video as `[text 0, text 1, …, frame 0, frame 1, …]`. TTT reads them interleaved:
text 0, the frames of segment 0, text 1, the frames of segment 1, …. The frames that the video has beyond whole segments
belong to the segment that is read first. Backward, the video is reversed token by token; the order of the texts is
reversed too, but each text is read forward.

Source: TTT-Video (arXiv 2504.05298), section 3.2; `SeqModelingBlock` and `TTTBase.interleave` of its code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt.layer import Rotary
from ttt.ops.rotary import rotary_angles
from ttt_videodit.geometry import Segments


@dataclass(frozen=True)
class Layout:
    """The shape of a video in tokens; equal layouts share what is computed from them."""

    segments: Segments
    """How frames are cut into segments."""
    count: int
    """Segments of the video."""
    text_length: int
    """Text tokens of each segment."""
    height: int
    """Tokens from the top of a frame to its bottom."""
    width: int
    """Tokens from its left to its right."""

    @classmethod
    def of(cls, segments: Segments, *, frames: int, texts: int, text_length: int, height: int, width: int) -> Layout:
        """The layout of a video of so many latent frames with so many texts.

        Raises:
            ValueError: the frames are not a whole number of segments, or there is not one text for each.
        """
        count = segments.count(frames)
        if texts != count:
            raise ValueError(f"{frames} latent frames are {count} segments, which need a text each; {texts} were given")
        return cls(segments, count, text_length, height, width)

    @property
    def frames(self) -> int:
        """Latent frames of the video."""
        return self.segments.frames(self.count)

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width

    @property
    def text_tokens(self) -> int:
        """Text tokens of all the segments."""
        return self.count * self.text_length

    @property
    def tokens(self) -> int:
        """T: text and video."""
        return self.text_tokens + self.frames * self.frame_tokens

    @property
    def segment_sizes(self) -> list[int]:
        """Tokens of each segment in reading order, its text included; of either direction."""
        first = self.segments.length * self.frame_tokens
        others = self.segments.attn_length * self.frame_tokens
        return [self.text_length + size for size in (first, *[others] * (self.count - 1))]

    def reading_order(self, device: torch.device) -> ReadingOrder:
        """The order of the forward direction."""
        return _reading_order(self, device, backward=False)

    def backward_order(self, device: torch.device) -> ReadingOrder:
        """The order of the backward direction."""
        return _reading_order(self, device, backward=True)

    def rotary(self, head_width: int, *, theta: float, device: torch.device, dtype: torch.dtype) -> Rotary:
        """Cosine and sine `[T,F/2]` of the tokens in reading order, the same in either direction.

        A video token is rotated by its position among the video tokens in reading order: F/4 channels by its time, 3F/8
        by its height, 3F/8 by its width. A text token is not rotated.

        Args:
            head_width: F, a multiple of 16.
            theta: base of the frequencies.
            device: where.
            dtype: of the result.

        Source: `precompute_freqs_cis_3d` of TTT-Video's `ttt/models/ssm/utils.py`.
        """
        return _rotary(self, head_width, theta, device, dtype)


@dataclass(frozen=True, eq=False)
class ReadingOrder:
    """A permutation of the tokens and its inverse, `[T]` each."""

    order: Tensor
    """The storage place of the i-th token in reading order."""
    inverse: Tensor
    """The place in reading order of the token stored at i."""

    def read(self, tokens: Tensor) -> Tensor:
        """Tokens `[B,T,D]` from storage order to reading order."""
        return tokens.index_select(1, self.order)

    def restore(self, tokens: Tensor) -> Tensor:
        """Tokens `[B,T,D]` from reading order to storage order."""
        return tokens.index_select(1, self.inverse)


@functools.lru_cache(maxsize=16)
def _reading_order(layout: Layout, device: torch.device, *, backward: bool) -> ReadingOrder:
    texts = torch.arange(layout.text_tokens, device=device).view(layout.count, layout.text_length)
    video = torch.arange(layout.text_tokens, layout.tokens, device=device)
    if backward:
        texts, video = texts.flip(0), video.flip(0)
    first = layout.segments.length * layout.frame_tokens
    others = layout.segments.attn_length * layout.frame_tokens
    parts = video.split([first] + [others] * (layout.count - 1))
    order = torch.cat([part for text, frames in zip(texts, parts, strict=True) for part in (text, frames)])
    return ReadingOrder(order, order.argsort())


@functools.lru_cache(maxsize=8)
def _rotary(layout: Layout, head_width: int, theta: float, device: torch.device, dtype: torch.dtype) -> Rotary:
    sides = (layout.frames, layout.height, layout.width)
    widths = (head_width // 4, head_width // 8 * 3, head_width // 8 * 3)
    turned = []
    for axis, (side, width) in enumerate(zip(sides, widths, strict=True)):
        shape = [1, 1, 1, -1]
        shape[axis] = side
        angles = rotary_angles(torch.arange(side, device=device), width, theta=theta, dtype=dtype)
        turned.append([x.view(shape).expand(*sides, -1) for x in angles])
    cos, sin = (torch.cat(parts, dim=-1).flatten(0, 2) for parts in zip(*turned, strict=True))
    text = cos.new_ones(layout.text_tokens, head_width // 2)
    # Video tokens are rotated by their position in reading order, so that both directions share one table.
    order = layout.reading_order(device).order
    return torch.cat((text, cos))[order], torch.cat((torch.zeros_like(text), sin))[order]
