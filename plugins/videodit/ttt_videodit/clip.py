"""The demo's clip as tensors: two halves of a time-lapse of towers at night, one to train on and one held out."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Literal

from torch import Tensor

from ttt_videodit import demo
from ttt_videodit.frames import Picture, read_every_frame, to_tensor

Half = Literal["train", "eval"]


@functools.cache
def demo_pictures(half: Half) -> tuple[Picture, ...]:
    """The frames of a half, 145 of `[64,64,3]`: the left one trains, the right one is held out.

    They are the clip's own frames one after another, so that at 16 a second they play in 9 s.
    """
    left = 0 if half == "train" else demo.SIDE
    return tuple(picture[:, left : left + demo.SIDE] for picture in _pictures())


def demo_frames(half: Half) -> Tensor:
    """The same as a tensor, `[145,3,64,64]` float32 with values −1 … 1."""
    return to_tensor(demo_pictures(half))


def demo_captions(half: Half) -> tuple[str, ...]:
    """What is to be seen in each segment of a half."""
    captions: dict[str, list[str]] = json.loads(demo.CAPTIONS.read_text(encoding="utf-8"))
    return tuple(captions[half])


@functools.cache
def _pictures() -> tuple[Picture, ...]:
    pictures = read_every_frame(demo.CLIP, height=demo.SIDE, width=2 * demo.SIDE)
    return tuple(itertools.islice(pictures, demo.FIRST_FRAME, demo.FIRST_FRAME + demo.FRAMES))
