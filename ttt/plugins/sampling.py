"""What `ttt sample` asks of a backbone: a sample of prompts, with its plan, or an answer to a recording."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class SampleRequest:
    """What `Sampling.sample` is asked for."""

    prompts: tuple[str, ...]
    """One for each segment, as many as `Sampling.plan_sample` said."""
    negative_prompts: tuple[str, ...]
    """Negative prompts, one for each segment, empty texts for none; no entries if none was given at all."""
    seconds: float
    """Length of the sample."""
    out: Path
    """Where the sample goes; its folder may have to be made."""
    steps: int
    """Steps of the sampler."""
    guidance_scale: float
    """Strength of classifier-free guidance; 1 is none."""
    seed: int
    """The same seed gives the same sample."""
    new_scenes: tuple[bool, ...] = ()
    """Whether each segment begins a new scene, the first never; no entries if none does."""
    imported_from: str | None = None
    """The program whose weights are sampled, as `WeightImport.import_weights` wrote it into the adapter's header under
    `imported_from`; None where what was learned was learned here, and without an adapter. `ttt.sample` fills it in."""


@dataclass(frozen=True)
class SamplePlan:
    """What a sample of some length needs, and which files it writes. It is known before the model is built."""

    prompts: int
    """How many prompts: one for each segment."""
    files: tuple[Path, ...]
    """What will be written, all of it in the folder of `out`; the command refuses to replace any of it unasked."""
    scenes: bool = False
    """Whether `SampleRequest.new_scenes` has an effect; if not, the command says so."""


@dataclass(frozen=True)
class AnswerRequest:
    """What `Answering.prepare_answers` is asked for: the model's answer to a recording, while it listens."""

    audio: Path
    """The recording, of any length, rate and number of channels."""
    out: Path
    """Where the sound goes; a `.json` of the same name beside it has the text with its times."""
    seed: int = 0
    """The same seed gives the same answer."""
    seconds: float = 0.0
    """Silence that the model hears after the recording, so that it can finish what it says."""
    stereo: bool = False
    """Whether the sound has the user on the left and the model on the right; if not, the model alone."""
    user_channel: Literal["left", "right", "mean"] | None = None
    """Which channel of the recording is the user; None is its only one or, if it has several, the left."""
    gates: Literal["open", "closed"] = "open"
    """`closed` is the plain backbone: the core closes gates and turns LoRA off; the answer says which it is."""
    temperature: float | None = None
    """Of the sampling of sound, 0 takes the likeliest; None is the model's own."""
    text_temperature: float | None = None
    """Of the sampling of text."""
    top_k: int | None = None
    """How many of the likeliest codes sound is drawn from, 0 is all; None is the model's own."""
    text_top_k: int | None = None
    """The same of text."""
