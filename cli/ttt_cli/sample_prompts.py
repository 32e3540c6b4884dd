"""`ttt sample` from prompts."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ttt.words import first_few
from ttt_cli.model import find_model, warn_of_changes
from ttt_cli.options import require_free
from ttt_cli.terminal import show, show_note

if TYPE_CHECKING:
    from ttt.check import LoadedConfig
    from ttt.plugins import SamplePlan, SampleRequest
    from ttt.prompts import Prompts


@dataclass(frozen=True)
class AskedPrompts:
    """What the command line asks of samples from prompts."""

    given: list[Prompts]
    """Of each sample."""
    out: str
    seconds: float
    seed: int
    steps: int
    guidance_scale: float

    @property
    def count(self) -> int:
        """How many samples, each with a seed of its own."""
        return len(self.given)

    def make(self, model: str, *, adapter: str | None, overrides: list[str], overwrite: bool, verify: bool) -> None:
        """Make the samples."""
        from ttt.check import load_config
        from ttt.plugins import Sampling, capability

        _require_sane(self.seconds, self.guidance_scale)
        config_file, learned, told = find_model(Path(model), adapter, verify=verify)
        loaded = load_config(config_file, overrides=overrides, training=False)
        sampler = capability(loaded.backbone, Sampling)
        warn_of_changes(Path(model), learned, loaded.config)
        places, together = _places(self.out, self.given, suffix=sampler.sample_suffix, backbone=loaded.backbone.name)
        plans = [sampler.plan_sample(loaded.config, seconds=self.seconds, out=place) for place in places]
        chosen, notes = _spread(self.given, plans, seconds=self.seconds)
        if not together:
            for file in plans[0].files:
                require_free(file, overwrite=overwrite)

        start = loaded.config.train.init_from
        if learned is None and start is not None:
            told = f"{model}: no adapter: it samples what training would start from, {start}"
        notes += _unread(chosen, loaded, guidance_scale=self.guidance_scale, scenes=plans[0].scenes)
        for note in (told, *notes):
            show(note)
        sys.stdout.flush()  # importing torch and the backbone's libraries takes seconds

        requests = self._requests(chosen, places)
        if together:
            _make_many(loaded, requests, learned, verify=verify, overwrite=overwrite)
        else:  # if a run's folder is named, its checkpoint is compared already
            _make_one(loaded, requests[0], learned, verify=verify and (adapter is not None or not Path(model).is_dir()))

    def _requests(self, chosen: list[Prompts], places: list[Path]) -> list[SampleRequest]:
        """A request for each sample: its prompts, its file, and the next seed."""
        from ttt.plugins import SampleRequest

        return [
            SampleRequest(
                prompts=each.prompts,
                negative_prompts=each.negative,
                seconds=self.seconds,
                out=place,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                seed=self.seed + number,
                new_scenes=each.new_scenes,
            )
            for number, (each, place) in enumerate(zip(chosen, places, strict=True))
        ]


def required_seconds(seconds: float | None) -> float:
    """How long samples of prompts are.

    Raises:
        UsageError: `--seconds` is missing.
    """
    from ttt.errors import UsageError

    if seconds is None:
        raise UsageError("ttt sample: write how long the sample is: --seconds 9")
    return seconds


def given_prompts_of(prompts: list[str], prompt_files: list[str], negative: list[str]) -> list[Prompts]:
    """The prompts of each sample, from the command line or from files.

    Raises:
        UsageError: there are no prompts, or both give them.
    """
    from ttt.errors import UsageError
    from ttt.prompts import given_prompts, read_prompts

    if not prompt_files:
        if not prompts:
            raise UsageError("ttt sample: write what it shows: --prompt TEXT, or --prompts FILE.json")
        return [given_prompts(prompts, negative)]
    if prompts:
        raise UsageError("ttt sample: --prompt and --prompts both say what it shows; leave one out")
    read = [each for file in prompt_files for each in read_prompts(file)]
    if not negative:
        return read
    for each in read:
        if each.negative:
            raise UsageError(f"ttt sample: --negative-prompt and the neg_text in {each.source} both say what it avoids")
    avoided = given_prompts((), negative).negative
    return [replace(each, negative=avoided) for each in read]


def _places(out: str, given: list[Prompts], *, suffix: str, backbone: str) -> tuple[list[Path], bool]:
    """The path of each sample, and whether they go into a folder of samples.

    Raises:
        UsageError: `--out` must name a folder and does not, or the backbone makes one sample at a time.
    """
    from ttt.errors import UsageError

    path, count = Path(out), len(given)
    of_a_file = bool(suffix) and path.suffix.lower() == suffix
    meant_as_folder = out.endswith("/") or (path.is_dir() and not of_a_file)
    if count == 1 and not (meant_as_folder and suffix):
        return [path], False
    if not suffix:
        raise UsageError(f"{_of(given)}, and the backbone {backbone} makes one sample at a time")
    if of_a_file and not meant_as_folder:
        raise UsageError(f"--out {path}: names one file, but {_of(given)}; name a folder: --out {path.with_suffix('')}")
    if os.path.lexists(path) and not path.is_dir():
        raise UsageError(f"--out {path}: is not a folder, but {_of(given)}; name a folder for them")
    return [path / f"{number:03d}{suffix}" for number in range(count)], True


def _of(given: list[Prompts]) -> str:
    return f"there are prompts for {len(given)} samples"


def _spread(given: list[Prompts], plans: list[SamplePlan], *, seconds: float) -> tuple[list[Prompts], list[str]]:
    """Assign a prompt to each segment of each sample; also returns notes for the user about it.

    Raises:
        UsageError: a sample's prompts are neither one nor as many as its segments.
    """
    from ttt.errors import UsageError
    from ttt.prompts import for_segments

    chosen: list[Prompts] = []
    problems: list[str] = []
    notes: dict[str, list[str]] = {}
    for each, plan in zip(given, plans, strict=True):
        try:
            prompts, told = for_segments(each, count=plan.prompts, seconds=seconds)
        except UsageError as error:
            problems.append(str(error))
            continue
        chosen.append(prompts)
        if told is not None:
            notes.setdefault(told, []).append(each.source)
        if each.new_scenes[:1] == (True,):
            first = "requires_scene_transition of a first segment means nothing: no scene is before it"
            notes.setdefault(first, []).append(each.source)
    if problems:
        raise UsageError.about(problems, "samples do not have a prompt for each segment")
    several = len(given) > 1
    return chosen, [f"{first_few(where, 2)}: {note}" if several else note for note, where in notes.items()]


def _require_sane(seconds: float, guidance_scale: float) -> None:
    """Refuse a length or a guidance scale that is not a usable number.

    Raises:
        UsageError: one of them is not.
    """
    from ttt.errors import UsageError

    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"--seconds {seconds:g}: is not a length; write 9")
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise UsageError(f"--guidance-scale {guidance_scale:g}: must be a number of 0 or more; 1 is without guidance")


def _unread(chosen: list[Prompts], loaded: LoadedConfig, *, guidance_scale: float, scenes: bool) -> list[str]:
    """A sentence for each part of the prompts that the sampler will not use."""
    notes = []
    if guidance_scale <= 1 and any(each.negative for each in chosen):
        notes.append(f"--guidance-scale {guidance_scale:g} is without guidance: negative prompts are not read")
    if any(any(each.new_scenes) for each in chosen) and not scenes:
        notes.append(
            f"requires_scene_transition: {loaded.backbone.name} makes no transitions; they are left to the texts"
        )
    return notes


def _make_one(loaded: LoadedConfig, request: SampleRequest, learned: Path | None, *, verify: bool) -> None:
    from rich.console import Console

    from ttt.printable import say
    from ttt.sample import sample as make
    from ttt.train.terminal import lasting

    console = Console()
    with lasting(console):
        written = make(loaded.config, loaded.backbone, request, adapter=learned, console=console, verify=verify)
        say(console, f"wrote {', '.join(map(str, written))}")


def _make_many(
    loaded: LoadedConfig, requests: list[SampleRequest], learned: Path | None, *, verify: bool, overwrite: bool
) -> None:
    from rich.console import Console

    from ttt.sample import sample_many
    from ttt.train.terminal import lasting

    console = Console()
    with lasting(console):
        try:
            sample_many(
                loaded.config,
                loaded.backbone,
                requests,
                adapter=learned,
                console=console,
                verify=verify,
                overwrite=overwrite,
            )
        except KeyboardInterrupt:
            show_note("interrupted; samples that are made stay: the same command makes the others")
            raise
