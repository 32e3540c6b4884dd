"""`ttt sample`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt.printable import shell_word
from ttt_cli.options import Overrides, Verify, require_replaceable
from ttt_cli.terminal import show

if TYPE_CHECKING:
    from ttt.backbone import SamplePlan
    from ttt.config import RunConfig
    from ttt.prompts import Prompts


def sample(
    model: Annotated[str, typer.Argument(metavar="CONFIG|RUN", help="A config file, or a run's folder.")],
    seconds: Annotated[float, typer.Option("--seconds", help="How long the sample is.", show_default=False)],
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Where the sample goes.", show_default=False)],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", metavar="TEXT", help="What it shows: once for all, or once for each segment in order."
        ),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE.json",
            help='Instead of --prompt: a list of texts, or of {"text": …, "neg_text": …}, one for each segment.',
        ),
    ] = None,
    negative_prompts: Annotated[
        list[str] | None,
        typer.Option("--negative-prompt", metavar="TEXT", help="What it avoids, likewise."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="PATH",
            help="What was learned: an adapter or a run. [default: the run's last checkpoint]",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the sampler.")] = 50,
    guidance_scale: Annotated[
        float, typer.Option("--guidance-scale", help="How strictly it follows the prompts; 1 is without guidance.")
    ] = 6.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=(1 << 63) - 1, help="Another seed, another sample.")] = 0,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    verify: Verify = True,
) -> None:
    """Make a sample with what a run has learned.

    A run's folder gives its config and its last complete checkpoint. A config alone gives the model as training would
    start it.
    """
    from ttt.backbone import SampleRequest
    from ttt.config import load_config
    from ttt.errors import UsageError
    from ttt.prompts import for_segments

    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"--seconds {seconds:g}: is no length; write one such as 9")
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise UsageError(f"--guidance-scale {guidance_scale:g}: must be a number of 0 or more; 1 is without guidance")
    given = _given(prompts or [], prompt_file, negative_prompts or [])
    config_file, learned, told = _find(Path(model), adapter, verify=verify)
    loaded = load_config(config_file, overrides=overrides or [], training=False)
    _warn_of_changes(Path(model), learned, loaded.config)
    plan = loaded.backbone.plan_sample(loaded.config, seconds=seconds, out=Path(out))
    chosen, spread = for_segments(given, count=plan.prompts, seconds=seconds)
    _require_free(plan, overwrite=overwrite)

    start = loaded.config.train.init_from
    if learned is None and start is not None:
        told = f"{model}: no adapter: it samples what training would start from, {start}"
    show(told)
    if spread is not None:
        show(spread)
    sys.stdout.flush()  # torch and the backbone's libraries are seconds away
    from rich.console import Console

    from ttt.sample import sample as make
    from ttt.train.metrics import say
    from ttt.train.terminal import lasting

    console = Console()
    request = SampleRequest(
        prompts=chosen.prompts,
        negative_prompts=chosen.negative,
        seconds=seconds,
        out=Path(out),
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
    )
    verify = verify and (adapter is not None or not Path(model).is_dir())  # that of a run is compared already
    with lasting(console):
        written = make(loaded.config, loaded.backbone, request, adapter=learned, console=console, verify=verify)
    say(console, f"wrote {', '.join(map(str, written))}")


def _given(prompts: list[str], prompt_file: str | None, negative: list[str]) -> Prompts:
    """The prompts of the command line, or of the file.

    Raises:
        UsageError: there are none, or both.
    """
    from ttt.errors import UsageError
    from ttt.prompts import Prompts, given_prompts, read_prompts

    if prompt_file is None:
        if not prompts:
            raise UsageError("ttt sample: write what it shows: --prompt TEXT, or --prompts FILE.json")
        return given_prompts(prompts, negative)
    if prompts:
        raise UsageError("ttt sample: --prompt and --prompts both say what it shows; leave one out")
    read = read_prompts(prompt_file)
    if negative and read.negative:
        raise UsageError(f"ttt sample: --negative-prompt and the neg_text in {prompt_file} both say what it avoids")
    return Prompts(read.prompts, read.negative or given_prompts((), negative).negative, read.source)


def _warn_of_changes(model: Path, learned: Path | None, config: RunConfig) -> None:
    """Say where a run's config is not the one that the run wrote."""
    import warnings

    from ttt.errors import DamagedFileWarning
    from ttt.train.rundir import TRAINER_STATE, RunDir, read_checkpoint

    if model.is_dir() and learned is not None and (learned / TRAINER_STATE).is_file():
        changed = RunDir(model).config_change(read_checkpoint(learned), config)
        if changed:
            warnings.warn(changed, DamagedFileWarning, stacklevel=2)


def _find(path: Path, adapter: str | None, *, verify: bool) -> tuple[Path, Path | None, str]:
    """The config of a model, what it has learned, and that in words.

    Raises:
        UsageError: a folder that is no run, or has nothing to sample yet.
    """
    import warnings

    from ttt.adapter_file import BACKBONE, MODEL
    from ttt.errors import DamagedFileWarning, UsageError
    from ttt.train.rundir import CHECKPOINTS, CONFIG, RunDir

    file, learned = path, None
    if path.is_dir():
        file = path / CONFIG
        if not file.is_file():
            raise UsageError(f"{path}: holds no run (no {CONFIG}); name a config or a run's folder")
        if adapter is None:
            checkpoint, passed_over = RunDir(path).latest(verify=verify, only=(MODEL, BACKBONE))
            if checkpoint is None:
                detail = f" ({'; '.join(passed_over)})" if passed_over else ""
                raise UsageError(
                    f"{path}: has no complete checkpoint{detail}; name {file} to sample the model before training"
                )
            learned = checkpoint.path
            for problem in passed_over:
                warnings.warn(
                    f"passed over a checkpoint that is not whole: {problem}; {learned} is taken instead",
                    DamagedFileWarning,
                    stacklevel=2,
                )
    if adapter is not None:
        learned = Path(adapter)
    if learned is not None:
        return file, learned, f"{path}: with what was learned in {learned}"
    run = f" (`ttt sample {shell_word(path.parent)}` samples the run)" if (path.parent / CHECKPOINTS).is_dir() else ""
    return file, None, f"{path}: no adapter: it samples the untrained model{run}"


def _require_free(plan: SamplePlan, *, overwrite: bool) -> None:
    """Refuse to replace files unasked.

    Raises:
        UsageError: one is there, or is a folder.
    """
    from ttt.errors import UsageError

    for file in plan.files:
        require_replaceable(file, force=True)
        if file.exists() and not overwrite:
            raise UsageError(f"{file}: is already there; name another --out, or replace it with --overwrite")
