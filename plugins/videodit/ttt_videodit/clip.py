"""The demo's clip as tensors: squares of a time-lapse of towers at night, its last 3 s held out."""

from __future__ import annotations

import functools
import json
from typing import Final, Literal

from torch import Tensor

from ttt_videodit import demo
from ttt_videodit.frames import Picture, read_every_frame, to_tensor

Split = Literal["train", "eval"]

CROPS: Final[dict[Split, tuple[int, ...]]] = {"train": (0, 16, 32, 48, 64), "eval": (0, 64)}
"""Left edges of the squares that each split reads, pixels of the scaled clip."""


@functools.cache
def demo_pictures(split: Split, left: int = 0, width: int = demo.SIDE) -> tuple[Picture, ...]:
    """A square of the clip, 145 frames of `[64,width,3]`, which play in 9 s at 16 a second.

    `train` is frames 20 to 140 and back to 116, the clip's cut. `eval` is the 49 frames after that, which are never
    trained on: forward, back, and forward again.

    Args:
        split: which part of the clip.
        left: left edge of the square.
        width: its width, 64; 128 is the whole clip.
    """
    pictures = [picture[:, left : left + width] for picture in _pictures()]
    if split == "train":
        part = pictures[demo.FIRST_FRAME : demo.HELD_OUT]
        return tuple(part + part[-2 : len(part) - demo.FRAMES - 2 : -1])
    part = pictures[demo.HELD_OUT :]
    return tuple(part + part[-2::-1] + part[1:])


def demo_frames(split: Split, left: int = 0, width: int = demo.SIDE) -> Tensor:
    """The same as a tensor, `[145,3,64,width]` float32 with values −1 … 1."""
    return to_tensor(demo_pictures(split, left, width))


def demo_captions(split: Split, left: int = 0) -> tuple[str, ...]:
    """The caption of each 3 s of a square."""
    demo.require_whole()
    captions: dict[str, dict[str, list[str]]] = json.loads(demo.CAPTIONS.read_text(encoding="utf-8"))
    return tuple(captions[split][str(left)])


@functools.cache
def _pictures() -> tuple[Picture, ...]:
    demo.require_whole()
    return tuple(read_every_frame(demo.CLIP, height=demo.SIDE, width=2 * demo.SIDE))
