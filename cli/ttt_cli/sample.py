"""`ttt sample`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt.words import first_few
from ttt_cli.model import find_model, warn_of_changes
from ttt_cli.options import Overrides, Verify, require_replaceable
from ttt_cli.sample_audio import Asked, Channel, Gates, answer_recordings
from ttt_cli.terminal import show, show_note

if TYPE_CHECKING:
    from ttt.check import LoadedConfig
    from ttt.errors import UsageError
    from ttt.plugins import Backbone, Capability, SamplePlan, SampleRequest
    from ttt.prompts import Prompts

_MOST_SEED = (1 << 63) - 1


def sample(
    model: Annotated[str, typer.Argument(metavar="CONFIG|RUN", help="A config file, or a run's folder.")],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE|FOLDER",
            help="Where the sample goes. Of several, the folder: for 000, 001, …, or for answers of the recordings' "
            "names. [required]",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            help="How long the sample is; with --audio, how long the silence after the recording is, in which the "
            "model can finish. [default: with --audio 0, else required]",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="From prompts: what it shows, once for all, or once for each segment in order.",
        ),
    ] = None,
    prompt_files: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="FILE.json[l]",
            help='From prompts, instead of --prompt: a list of texts, or of {"text": …, "neg_text": …}, one for each '
            "segment; or many such lists, in a .jsonl one on each line, for as many samples. Can be repeated.",
        ),
    ] = None,
    negative_prompts: Annotated[
        list[str] | None,
        typer.Option("--negative-prompt", metavar="TEXT", help="From prompts: what it avoids, likewise."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="From prompts: steps of the sampler. [default: 50]"),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance-scale",
            help="From prompts: how strictly it follows them; 1 is without guidance. [default: 6.0]",
        ),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(
            "--audio",
            metavar="FILE",
            help="From a recording: the one that the model hears and answers, of any length and rate. Can be repeated.",
        ),
    ] = None,
    stereo: Annotated[
        bool,
        typer.Option("--stereo", help="From a recording: write the user on the left and the model on the right."),
    ] = False,
    user_channel: Annotated[
        Channel | None,
        typer.Option(
            "--user-channel",
            help="From a recording: which of its channels is the user. [default: its only one, or the left]",
        ),
    ] = None,
    gates: Annotated[
        Gates | None,
        typer.Option(
            "--gates",
            help="From a recording: closed is the same model without TTT; with the same seed the same draws. "
            "[default: open]",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            help="From a recording: of the sampling of sound; 0 takes the likeliest. [default: the model's own, 0.8]",
        ),
    ] = None,
    text_temperature: Annotated[
        float | None,
        typer.Option("--text-temperature", help="From a recording: the same of text. [default: the model's own, 0.7]"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            help="From a recording: how many of the likeliest codes sound is drawn from; 0 is all. "
            "[default: the model's own, 250]",
        ),
    ] = None,
    text_top_k: Annotated[
        int | None,
        typer.Option("--text-top-k", help="From a recording: the same of text. [default: the model's own, 25]"),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="PATH",
            help="What was learned: an adapter or a run. [default: the run's last checkpoint]",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, max=_MOST_SEED, help="Another seed, another sample; of several, the first one's."
        ),
    ] = 0,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace files that are there; of several samples, those made otherwise."),
    ] = False,
    verify: Verify = True,
) -> None:
    """Make samples with what a run has learned: videos of prompts, or answers to recordings.

    A run's folder gives its config and its last complete checkpoint. A config alone gives the model as training would
    start it. Which of the two a backbone samples from, `ttt plugins` tells (sample, answer).

    Several samples of prompts go into a folder: FOLDER/000 with the seed that --seed says, 001 with the next one, and
    so on; beside each, a .json says what it was made from. The same command, given once more, makes those that are
    missing.

    An answer is a .wav; the .json beside it has its text with times, and how much of each minute is repetition.
    """
    of_prompts = {
        "--prompt": prompts,
        "--prompts": prompt_files,
        "--negative-prompt": negative_prompts,
        "--steps": steps,
        "--guidance-scale": guidance_scale,
    }
    of_audio = {
        "--audio": audio,
        "--stereo": stereo or None,
        "--user-channel": user_channel,
        "--gates": gates,
        "--temperature": temperature,
        "--text-temperature": text_temperature,
        "--top-k": top_k,
        "--text-top-k": text_top_k,
    }
    by_audio = _is_by_audio(Path(model), overrides or [], _given_of(of_prompts), _given_of(of_audio))
    given = [] if by_audio else _given(prompts or [], prompt_files or [], negative_prompts or [])
    place = _required_out(out)
    if by_audio:
        _require_seeds(seed, len(audio or []))
        asked = Asked(
            audio=tuple(audio or []),
            out=place,
            seconds=seconds or 0.0,
            seed=seed,
            stereo=stereo,
            user_channel=user_channel,
            gates=gates or "open",
            temperature=temperature,
            text_temperature=text_temperature,
            top_k=top_k,
            text_top_k=text_top_k,
        )
        answer_recordings(model, asked, adapter=adapter, overrides=overrides or [], overwrite=overwrite, verify=verify)
        return
    _sample_prompts(
        model,
        given,
        out=place,
        seconds=_required_seconds(seconds),
        steps=50 if steps is None else steps,
        guidance_scale=6.0 if guidance_scale is None else guidance_scale,
        seed=seed,
        adapter=adapter,
        overrides=overrides or [],
        overwrite=overwrite,
        verify=verify,
    )


def _sample_prompts(
    model: str,
    given: list[Prompts],
    *,
    out: str,
    seconds: float,
    steps: int,
    guidance_scale: float,
    seed: int,
    adapter: str | None,
    overrides: list[str],
    overwrite: bool,
    verify: bool,
) -> None:
    """Make samples of prompts."""
    from ttt.check import load_config
    from ttt.plugins import Sampling, capability

    _require_sane(seconds, guidance_scale)
    _require_seeds(seed, len(given))
    config_file, learned, told = find_model(Path(model), adapter, verify=verify)
    loaded = load_config(config_file, overrides=overrides, training=False)
    sampler = capability(loaded.backbone, Sampling)
    warn_of_changes(Path(model), learned, loaded.config)
    places, together = _places(out, given, suffix=sampler.sample_suffix, backbone=loaded.backbone.name)
    plans = [sampler.plan_sample(loaded.config, seconds=seconds, out=place) for place in places]
    chosen, notes = _spread(given, plans, seconds=seconds)
    if not together:
        _require_free(plans[0], overwrite=overwrite)

    start = loaded.config.train.init_from
    if learned is None and start is not None:
        told = f"{model}: no adapter: it samples what training would start from, {start}"
    notes += _unread(chosen, loaded, guidance_scale=guidance_scale, scenes=plans[0].scenes)
    for note in (told, *notes):
        show(note)
    sys.stdout.flush()  # importing torch and the backbone's libraries takes seconds

    requests = _requests(chosen, places, seconds=seconds, steps=steps, guidance_scale=guidance_scale, first_seed=seed)
    if together:
        _make_many(loaded, requests, learned, verify=verify, overwrite=overwrite)
    else:  # if a run's folder is named, its checkpoint is compared already
        _make_one(loaded, requests[0], learned, verify=verify and (adapter is not None or not Path(model).is_dir()))


def _given_of(options: Mapping[str, object]) -> list[str]:
    """The options that the command line has."""
    return [name for name, value in options.items() if value not in (None, [])]


def _is_by_audio(model: Path, overrides: list[str], of_prompts: list[str], of_audio: list[str]) -> bool:
    """Whether samples are answers to recordings, by the options and by what the model's backbone can do.

    Raises:
        UsageError: options do not go together, or not with the backbone, or there is nothing to sample from.
    """
    from ttt.errors import UsageError
    from ttt.plugins import Answering, Sampling, has_capability

    if of_prompts and of_audio:
        raise UsageError(
            f"ttt sample: {of_prompts[0]} is for samples of prompts and {of_audio[0]} for answers to a recording; "
            f"leave one out"
        )
    backbone = _backbone_of(model, overrides)
    answers = backbone is not None and has_capability(backbone, Answering)
    of_texts = backbone is not None and has_capability(backbone, Sampling)
    if backbone is not None and of_audio and of_texts and not answers:
        raise _lacking(backbone, Answering, of_audio[0], "it samples from prompts: write --prompt TEXT")
    if backbone is not None and of_prompts and answers and not of_texts:
        raise _lacking(backbone, Sampling, of_prompts[0], "it answers a recording: write --audio in.wav")
    if "--audio" not in of_audio and (of_audio or (answers and not of_texts)):
        raise UsageError("ttt sample: write the recording that it answers: --audio in.wav")
    return bool(of_audio)


def _lacking(backbone: Backbone, kind: type[Capability], option: str, instead: str) -> UsageError:
    """The error of an option for which the backbone has no capability; it says what it can do instead."""
    from ttt.errors import UsageError
    from ttt.plugins import capability

    try:
        capability(backbone, kind)
    except UsageError as error:
        return UsageError(f"ttt sample {option}: {error}; {instead}")
    raise AssertionError(f"{backbone.name} has it")


def _backbone_of(model: Path, overrides: list[str]) -> Backbone | None:
    """The backbone of a config or a run; None if it does not say, which those who read all of it will report."""
    from ttt.check import check_config
    from ttt.errors import TTTError
    from ttt.train.stored_config import CONFIG

    file = model / CONFIG if model.is_dir() else model
    try:
        return check_config(file, overrides=overrides, training=False).backbone
    except TTTError:
        return None


def _required_out(out: str | None) -> str:
    """Where the samples go.

    Raises:
        UsageError: `--out` is missing or empty.
    """
    from ttt.errors import UsageError

    if out is None:
        raise UsageError("ttt sample: write where the sample goes: --out FILE, or a folder")
    if not out:
        raise UsageError("--out: is empty; name a file, or a folder")
    return out


def _required_seconds(seconds: float | None) -> float:
    """How long samples of prompts are.

    Raises:
        UsageError: `--seconds` is missing.
    """
    from ttt.errors import UsageError

    if seconds is None:
        raise UsageError("ttt sample: write how long the sample is: --seconds 9")
    return seconds


def _require_seeds(first: int, count: int) -> None:
    """Refuse a first seed after which there are not enough seeds for every sample.

    Raises:
        UsageError: there are not.
    """
    from ttt.errors import UsageError

    if first + count - 1 > _MOST_SEED:
        raise UsageError(f"--seed {first}: the last of {count} samples has no seed left; write a smaller one")


def _requests(
    chosen: list[Prompts],
    places: list[Path],
    *,
    seconds: float,
    steps: int,
    guidance_scale: float,
    first_seed: int,
) -> list[SampleRequest]:
    """A request for each sample: its prompts, its file, and the next seed."""
    from ttt.plugins import SampleRequest

    return [
        SampleRequest(
            prompts=each.prompts,
            negative_prompts=each.negative,
            seconds=seconds,
            out=place,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=first_seed + number,
            new_scenes=each.new_scenes,
        )
        for number, (each, place) in enumerate(zip(chosen, places, strict=True))
    ]


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


def _given(prompts: list[str], prompt_files: list[str], negative: list[str]) -> list[Prompts]:
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


def _require_free(plan: SamplePlan, *, overwrite: bool) -> None:
    """Refuse to replace files without `--overwrite`, and folders always.

    Raises:
        UsageError: a file exists already, or is a folder.
    """
    from ttt.errors import UsageError

    for file in plan.files:
        require_replaceable(file, force=True)
        if file.exists() and not overwrite:
            raise UsageError(f"{file}: is already there; name another --out, or replace it with --overwrite")
