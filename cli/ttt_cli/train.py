"""`ttt train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt_cli.options import BackboneName, Overrides, Verify
from ttt_cli.terminal import show, show_findings, show_note

if TYPE_CHECKING:
    from ttt.check import LoadedConfig
    from ttt.train import TrainResult


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A config file; with --resume also a run's folder. Without it, the backbone's demo runs.",
            show_default=False,
        ),
    ] = None,
    backbone: BackboneName = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run from its last checkpoint; start it if it has none yet."),
    ] = False,
    verify: Verify = True,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            metavar="N",
            help="Train in N processes on this machine, one for each GPU; train.parallel says how they share the run.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Say where the time of ten steps goes, after three to warm up: a table, and a trace for a browser in "
            "the run's folder.",
        ),
    ] = False,
) -> None:
    """Train TTT layers in a backbone.

    In several processes by --nproc, or one of them each by torchrun: `torchrun --nproc-per-node 8 -m ttt_cli train
    CONFIG`. If one fails, the others end within 30 s, and the last checkpoint is whole.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 or SIGUSR2: it finishes the step, saves, says how to go on and
    ends with 130. Before the first step nothing is written; once all steps are done the pictures are finished. A second
    signal stops at once. Under nohup, SIGHUP is ignored.
    """
    from ttt.interrupt import NOT_BEGUN, StopRequested
    from ttt_cli.ranks import as_launcher_of, as_one_of_several, require_number, run_in_processes

    require_number(nproc)
    if nproc is not None and nproc > 1:
        with as_launcher_of(nproc):
            _loaded(config, backbone, overrides or [], resume=resume)
            run_in_processes(nproc)
    try:
        with as_one_of_several():
            result = _trained(config, backbone, overrides or [], resume=resume, verify=verify, profile=profile)
    except StopRequested:
        show_note(NOT_BEGUN)
        raise
    except KeyboardInterrupt:
        show_note("stopped at once; what came after the last checkpoint is lost: --resume goes on from there")
        raise
    if result.interrupted:
        from ttt_cli.outcome import INTERRUPTED

        raise typer.Exit(INTERRUPTED)


def _trained(
    config: str | None, backbone: str | None, overrides: list[str], *, resume: bool, verify: bool, profile: bool
) -> TrainResult:
    """Load the config and train."""
    from ttt.interrupt import stop_if_asked
    from ttt.parallel.layout import launched_layout
    from ttt_cli.ranks import told_by_launcher

    with told_by_launcher():
        loaded = _loaded(config, backbone, overrides, resume=resume)
    launched_layout(loaded.config.train)
    stop_if_asked()
    if config is not None:  # a demo has printed a note already
        show(f"read {config}; loading {loaded.backbone.name}")
    sys.stdout.flush()  # importing torch and the backbone's libraries takes seconds
    from ttt.train import train as run

    stop_if_asked()
    return run(loaded.config, loaded.backbone, resume=resume, verify=verify, profile=profile)


def _loaded(config: str | None, backbone: str | None, overrides: list[str], *, resume: bool) -> LoadedConfig:
    """Load the config of the command line and show its findings."""
    from ttt.errors import UsageError

    if config is not None:
        loaded = load(Path(config), backbone, overrides, resume=resume)
    elif backbone is not None:
        loaded = _load_demo(backbone, overrides)
    else:
        raise UsageError("ttt train: name a config, or a backbone whose demo to run, as `ttt train --backbone moshi`")
    show_findings(loaded.findings, stream=sys.stderr)
    return loaded


def load(
    path: Path, backbone: str | None, overrides: list[str], *, resume: bool, memory: int | None = None
) -> LoadedConfig:
    """Load the config from a file or, to resume, from a run's folder, even if that folder was moved."""
    from dataclasses import replace

    from ttt.check import load_config
    from ttt.checkpoint_folder import CHECKPOINTS
    from ttt.errors import UsageError
    from ttt.train.claim import require_places
    from ttt.train.stored_config import CONFIG, is_of_a_run

    is_folder = os.path.isdir(path)
    if is_folder:
        if not resume:
            raise UsageError(f"{path}: a folder; name a config, or continue the run in it with --resume")
        require_places(path)
        path = path / CONFIG
        if not path.is_file():
            raise UsageError(
                f"{path.parent}: holds no run to resume (no {CONFIG}); name the config that the run should have, as "
                f"`ttt train CONFIG --resume`"
            )
    loaded = load_config(path, backbone=backbone, overrides=overrides, resuming=resume, memory=memory)
    in_its_run = path.name == CONFIG and (path.parent / CHECKPOINTS).is_dir()
    here = in_its_run or (is_folder and (loaded.config.run_dir is None or is_of_a_run(path)))
    if resume and here and not any(override.startswith("run_dir=") for override in overrides):
        loaded = replace(loaded, config=loaded.config.model_copy(update={"run_dir": str(path.parent)}))
    return loaded


def _load_demo(name: str, overrides: list[str]) -> LoadedConfig:
    from ttt.check import load_config
    from ttt.plugins import get_backbone
    from ttt_cli.init import preset_text

    backbone = get_backbone(name)
    text = preset_text(backbone, "demo")
    show_note(f"No config given: training the demo of {name}. `ttt init --backbone {name}` writes its config.")
    return load_config(f"{name} demo", text=text, backbone=backbone, overrides=overrides)
