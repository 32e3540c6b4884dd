"""A request for a sample, and the plan of what it needs and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
