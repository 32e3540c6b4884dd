"""What may be asked of `ttt sample`, checked without torch: before any model is built."""

from __future__ import annotations

import math
from pathlib import Path

from ttt.errors import UsageError
from ttt.plugins import SamplePlan, SampleRequest
from ttt.reading import wrong_with
from ttt_videodit.geometry import SEGMENT_SEC
from ttt_videodit.options import VideoDiTOptions
from ttt_videodit.pretrained import TEXT_PARTS, VAE, source_of

MAX_STEPS = 1000
"""Timesteps of the diffusion; a sampler cannot make more steps than there are."""


def plan_sample(*, seconds: float, out: Path) -> SamplePlan:
    """How many prompts a video of so many seconds takes, one for each segment of 3 s, and the files that it leaves.

    Raises:
        UsageError: the length is not a whole number of segments, or the file is not an mp4.
    """
    if not math.isfinite(seconds) or seconds <= 0 or seconds % SEGMENT_SEC:
        ways = str(SEGMENT_SEC)
        if math.isfinite(seconds) and seconds > SEGMENT_SEC:
            below = SEGMENT_SEC * int(seconds // SEGMENT_SEC)
            ways = f"{below} or {below + SEGMENT_SEC}"
        raise UsageError(
            f"--seconds {seconds:g}: a video is a whole number of segments of {SEGMENT_SEC} s; write {ways}"
        )
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"--out {out}: a video is written as an mp4; write {out.with_suffix('.mp4')}")
    return SamplePlan(prompts=round(seconds / SEGMENT_SEC), files=(out, contact_sheet_of(out)), scenes=True)


def contact_sheet_of(video: Path) -> Path:
    """The contact sheet of a video, which is beside it."""
    return video.with_suffix(".png")


def check_request(request: SampleRequest, options: VideoDiTOptions) -> None:
    """Refuse a request that cannot be honoured.

    Raises:
        UsageError: a prompt is missing or empty, or a number is out of its range; the message names which.
        EnvironmentProblem: a local folder of weights lacks the VAE or the text encoder.
    """
    needed = plan_sample(seconds=request.seconds, out=request.out).prompts
    length = f"{request.seconds:g} s are {needed} {'segment' if needed == 1 else 'segments'} of {SEGMENT_SEC} s"
    if len(request.prompts) != needed:
        raise UsageError(f"{length}, each with a prompt of its own, but {len(request.prompts)} were given")
    for number, prompt in enumerate(request.prompts, start=1):
        wrong = wrong_with(prompt)
        if wrong is not None:
            raise UsageError(f"the prompt of segment {number} of {needed} {wrong}; say what is seen there")
    for number, avoided in enumerate(request.negative_prompts, start=1):
        wrong = wrong_with(avoided) if avoided.strip() else None
        if wrong is not None:
            raise UsageError(f"the negative prompt of segment {number} of {needed} {wrong}; say what to avoid")
    if len(request.negative_prompts) not in (0, needed):
        raise UsageError(
            f"{length}, but {len(request.negative_prompts)} negative prompts were given; give one for each, or none"
        )
    if len(request.new_scenes) not in (0, needed):
        raise UsageError(f"{length}, but new_scenes has {len(request.new_scenes)} entries; give one for each, or none")
    if not 1 <= request.steps <= MAX_STEPS:
        raise UsageError(f"--steps {request.steps}: write from 1 to {MAX_STEPS}; CogVideoX is sampled with 50")
    if not (math.isfinite(request.guidance_scale) and request.guidance_scale >= 1):
        raise UsageError(
            f"--guidance-scale {request.guidance_scale:g}: write 1 for none, or more; CogVideoX is sampled with 6"
        )
    if options.preset == "5b":
        source_of(options, VAE, *TEXT_PARTS)
