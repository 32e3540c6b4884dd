"""What a config asks of the videos that it trains on, and whether the demo has such; read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ttt.reading import MAX_JSON, read_file
from ttt_videodit import demo
from ttt_videodit.geometry import FRAMES_PER_SECOND, SEGMENT_SEC, TEMPORAL_COMPRESSION, Segments, segments_in
from ttt_videodit.options import DEFAULT_PRETRAINED, VideoDiTData, VideoDiTOptions, pixels, text_length

COGVIDEOX_TEXT_DIM: Final = 4096
"""Width of T5-XXL's hidden states."""


@dataclass(frozen=True)
class Wanted:
    """What a config asks of the videos that it trains on."""

    segments: Segments
    """How they are cut."""
    window: int
    """Segments of a window."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    text_length: int
    """L, tokens of a segment's text."""
    text_dim: int | None
    """E, width of a text token, if it can be told without the model."""

    @classmethod
    def of(cls, options: VideoDiTOptions, data: VideoDiTData) -> Wanted:
        """What the sections `backbone` and `data` ask for."""
        height, width = pixels(options, data)
        return cls(
            options.segments,
            segments_in(data.duration_sec),
            height,
            width,
            text_length(options, data),
            _text_dim(options),
        )

    @property
    def segment_sec(self) -> float:
        """Seconds from the start of a segment to that of the next; 3 with the usual `attn_length`."""
        return self.segments.attn_length * TEMPORAL_COMPRESSION / FRAMES_PER_SECOND


def _text_dim(options: VideoDiTOptions) -> int | None:
    if options.preset == "demo":
        return demo.TEXT_DIM
    if options.pretrained in (None, DEFAULT_PRETRAINED):
        return COGVIDEOX_TEXT_DIM
    try:
        config = json.loads(read_file(Path(options.pretrained or "") / "transformer" / "config.json", limit=MAX_JSON))
        return int(config["text_embed_dim"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def demo_segments(segments: Segments, frames: int = demo.FRAMES) -> int:
    """Segments of the demo's clip, or of so many of its frames."""
    latent_frames = (frames - 1) // TEMPORAL_COMPRESSION + 1
    return max(0, (latent_frames - segments.prefix_temporal_length) // segments.attn_length)


def missing_data(options: VideoDiTOptions, data: VideoDiTData) -> tuple[str, str, str] | None:
    """Key, reason and way out if a config names no training data and its preset has none of that kind; else None."""
    if data.train_data is not None or options.random_weights:
        return None
    if options.preset == "5b":
        way_out = "name the index that `ttt precompute` writes"
        return "data.train_data", "the preset 5b has no data of its own", way_out
    wanted, side = Wanted.of(options, data), demo.SIDE
    if (wanted.height, wanted.width) != (side, side):
        key = "height" if wanted.height != side else "width"
        why = f"the demo's clip is {side} × {side} pixels, not {wanted.width} wide and {wanted.height} high"
        return f"data.{key}", why, "leave height and width out, or name data.train_data of that size"
    count = demo_segments(options.segments)
    if count < wanted.window:
        why = f"the demo's clip has {count} segments, but a window of {wanted.window} is asked for"
        seconds = f"write {count * SEGMENT_SEC} or less, or " if count else ""
        return "data.duration_sec", why, f"{seconds}name data.train_data"
    return None
