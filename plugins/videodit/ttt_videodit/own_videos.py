"""The plugin's own videos, in memory: the demo's clip, encoded, and random numbers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ttt.plugins import WindowSource
from ttt_videodit import demo
from ttt_videodit.clip import Split, demo_captions, demo_pictures
from ttt_videodit.codec import DemoCodec
from ttt_videodit.encoders import DemoVideoEncoder, encode_video
from ttt_videodit.geometry import (
    FRAMES_PER_SECOND,
    LATENT_CHANNELS,
    SEGMENT_SEC,
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    Segments,
    pixel_frames,
)
from ttt_videodit.text import DemoTextEncoder
from ttt_videodit.wanted import Wanted

_RANDOM_SEEDS: Final = {"train": 0, "eval": 1}


class MemoryVideo:
    """A video whose latents and texts are in memory."""

    def __init__(
        self,
        name: str,
        captions: tuple[str, ...],
        latents: Mapping[str, Tensor],
        texts: Tensor,
        source: WindowSource,
    ) -> None:
        self.name = self.place = name
        self.field = "data.train_data"
        self.source = source
        self.start_sec = 0.0
        self.captions = captions
        self._latents = latents
        self._texts = texts

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Some rows of `mean` or `std`."""
        return self._latents[name][first:stop]

    def text(self, segment: int) -> Tensor:
        """The embedding of a segment's text."""
        return self._texts[segment]


@functools.cache
def demo_video(split: Split, left: int, segments: Segments, count: int, text_length: int) -> MemoryVideo:
    """The clip from a column on, in so many segments, encoded as `ttt precompute` would."""
    frames = pixel_frames(segments.frames(count))
    starts = [segments.attn_length * TEMPORAL_COMPRESSION * segment for segment in range(count)]
    latents = encode_video(
        demo_pictures(split, left)[:frames], frames=frames, starts=starts, encoder=DemoVideoEncoder(DemoCodec.load())
    )
    written = demo_captions(split, left)
    captions = tuple(written[start // (SEGMENT_SEC * FRAMES_PER_SECOND)] for start in starts)
    name = f"{demo.CLIP.name} from column {left}"
    source = WindowSource(demo.CLIP.name, (demo.CLIP, demo.CAPTIONS, demo.CODEC))
    return MemoryVideo(name, captions, latents, DemoTextEncoder(text_length=text_length)(captions), source)


def random_video(wanted: Wanted, split: str) -> MemoryVideo:
    """A window of noise for a model of random weights."""
    generator = torch.Generator().manual_seed(_RANDOM_SEEDS[split])
    assert wanted.text_dim is not None  # the transformer is CogVideoX 5B's
    shape = (LATENT_CHANNELS, wanted.height // SPATIAL_COMPRESSION, wanted.width // SPATIAL_COMPRESSION)
    mean = torch.randn(wanted.segments.frames(wanted.window), *shape, generator=generator)
    texts = torch.randn(wanted.window, wanted.text_length, wanted.text_dim, generator=generator)
    latents = {"mean": mean, "std": torch.zeros_like(mean)}
    name = "random numbers"
    return MemoryVideo(name, ("",) * wanted.window, latents, texts, WindowSource(name))
