"""`ttt sample`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt_cli.options import Overrides, Verify
from ttt_cli.sample_audio import AskedAnswers, Channel, Gates
from ttt_cli.sample_prompts import AskedPrompts, given_prompts_of, required_seconds

if TYPE_CHECKING:
    from ttt.errors import UsageError
    from ttt.plugins import Backbone, Capability

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
            help="From a recording: closed is the plain backbone, without TTT and LoRA; with the same seed the same "
            "draws. "
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
    asked: AskedAnswers | AskedPrompts
    if _is_by_audio(Path(model), overrides or [], _given_of(of_prompts), _given_of(of_audio)):
        asked = AskedAnswers(
            audio=tuple(audio or []),
            out=_required_out(out),
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
    else:
        asked = AskedPrompts(
            given=given_prompts_of(prompts or [], prompt_files or [], negative_prompts or []),
            out=_required_out(out),
            seconds=required_seconds(seconds),
            seed=seed,
            steps=50 if steps is None else steps,
            guidance_scale=6.0 if guidance_scale is None else guidance_scale,
        )
    _require_seeds(seed, asked.count)
    asked.make(model, adapter=adapter, overrides=overrides or [], overwrite=overwrite, verify=verify)


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


def _require_seeds(first: int, count: int) -> None:
    """Refuse a first seed after which there are not enough seeds for every sample.

    Raises:
        UsageError: there are not.
    """
    from ttt.errors import UsageError

    if first + count - 1 > _MOST_SEED:
        raise UsageError(f"--seed {first}: the last of {count} samples has no seed left; write a smaller one")
