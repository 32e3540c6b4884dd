"""What a backbone is asked to sample, and what that will take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SampleRequest:
    """What `Sampling.sample` is asked for."""

    prompts: tuple[str, ...]
    """One for each segment, as many as `Sampling.plan_sample` said."""
    negative_prompts: tuple[str, ...]
    """What each segment is guided away from, empty texts where nothing is; no entries where none was given at all."""
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
    """Whether each segment begins a scene of its own, the first never; no entries where none does."""
    imported_from: str | None = None
    """The program whose weights are sampled, as `WeightImport.import_weights` wrote it into the adapter's header under
    `imported_from`; None where what was learned was learned here, and without an adapter. `ttt.sample` fills it in."""


@dataclass(frozen=True)
class SamplePlan:
    """What a sample of some length takes and leaves, known before a model is built."""

    prompts: int
    """How many prompts: one for each segment."""
    files: tuple[Path, ...]
    """What will be written, all of it in the folder of `out`; the command refuses to replace any of it unasked."""
    scenes: bool = False
    """Whether `SampleRequest.new_scenes` is heeded; where it is not, the command says so."""
