"""How a run starts or goes on: its folder is checked, its parts are built, and the loop runs.

The final adapter of a run is in its last checkpoint, which `summary.json` names (see `ttt.train.rundir`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from rich.console import Console

from ttt.adapter_file import read_info
from ttt.checkpoint_folder import Checkpoint
from ttt.config.schema import RunConfig
from ttt.interrupt import NOT_BEGUN, StopRequested, begin, interruptible, is_asked_to_stop
from ttt.parallel.joining import joined
from ttt.parallel.world import World
from ttt.plugins import Backbone
from ttt.printable import say
from ttt.train import loop, rundir
from ttt.train.claim import METRICS
from ttt.train.compiling import compile_errors
from ttt.train.graphs import cuda_graphs
from ttt.train.loggers import require_packages
from ttt.train.metrics import read_metrics
from ttt.train.parts import build_parts
from ttt.train.pictures import Pictures, pictures_are_due
from ttt.train.profiling import require_steps
from ttt.train.progress import Progress
from ttt.train.result import TrainResult, finished
from ttt.train.rundir import RunDir
from ttt.train.saving import require_space_for_one, restored
from ttt.train.setup import (
    choose_device,
    memory_errors,
    require_optimizer,
    threads,
    ways_to_less_memory,
    with_backbone_options,
)
from ttt.train.terminal import lasting


def train(
    config: RunConfig,
    backbone: Backbone,
    *,
    resume: bool = False,
    console: Console | None = None,
    verify: bool = True,
    profile: bool = False,
) -> TrainResult:
    """Train TTT layers in a backbone.

    In the main thread, signals can stop the run (`ttt.interrupt`): before the first step nothing is written; after
    that, the current step is finished and saved, and the pictures are drawn. If the output is closed, the run goes on.

    If a launcher started several processes, each calls this, and they train one run together: `config.train.parallel`
    says how. The first of them writes and prints.

    Args:
        config: the resolved config.
        backbone: the plugin that `config.backbone` names.
        resume: continue the run in `config.run_dir`; if it has no checkpoint yet, start it there.
        console: the console for reports; standard output by default.
        verify: compare the checkpoint or adapter that the run starts from with its checksums; this reads it once more.
        profile: say where the time of ten steps goes, after three to warm up (`ttt.train.profiling`).

    Raises:
        ConfigError: the config cannot be honoured with this data and backbone.
        UsageError: the run directory is in use, there is nothing to resume, or too few steps are left to profile.
        EnvironmentProblem: a device, a file, memory or disk space is missing, or other processes cannot be reached.
        OtherProcessError: of several processes another one failed, and says why.
        AdapterMismatchError: `train.init_from` belongs to something else; nothing was written.
        NonFiniteError: a loss or gradient was not finite; the weights are those before that step.
        InactiveLayerError: on the first step, a TTT layer was not reached, did not learn, or got no gradient.
    """
    config = with_backbone_options(config, backbone)
    require_packages(config)
    require_optimizer(config.train)
    with (
        interruptible(),
        joined(config.train, lambda: choose_device(config.train.device)) as world,
        lasting(console or Console(quiet=not world.first)) as console,
    ):
        return _train(config, backbone, world, resume=resume, console=console, verify=verify, profile=profile)


def _train(
    config: RunConfig,
    backbone: Backbone,
    world: World,
    *,
    resume: bool,
    console: Console,
    verify: bool,
    profile: bool,
) -> TrainResult:
    run = rundir.choose(config, resume=resume)
    with run.held() if world.first else contextlib.nullcontext():

        def look() -> tuple[Path, Checkpoint | None, TrainResult | None]:
            found = _standing(run, config, backbone, console, resume=resume, verify=verify)
            return run.path, found, None if found is None else finished(run, found, config)

        path, checkpoint, ended = world.from_first(look)
        run = run if world.first else RunDir(path)
        if ended is not None:
            begin()
            return _tidied(run, ended, config, console) if world.first else ended
        init_from = config.train.init_from if checkpoint is None else None
        start = None if init_from is None else read_info(init_from, verify=verify)
        device = choose_device(config.train.device)
        with (
            memory_errors(ways_to_less_memory(config)),
            compile_errors(config.train.compile),
            threads(config.train.cpu_threads),
            cuda_graphs(config.train, device, lambda text: say(console, text)),
        ):
            try:
                parts = build_parts(
                    config, backbone, device, run, console, start=start, resumed=checkpoint, world=world
                )
                require_space_for_one(parts)
                progress = Progress() if checkpoint is None else restored(parts, checkpoint)
                if profile:
                    require_steps(parts, progress)
                _stop_if_one_was_asked(world)
            except StopRequested:
                return _not_begun(run, checkpoint, console)
            begin()  # what is written now can be saved
            if checkpoint is None:
                run.path = world.from_first(lambda: _created(run, config, console))
            return loop.run(parts, progress, resumed=checkpoint, profile=profile)


def _standing(
    run: RunDir, config: RunConfig, backbone: Backbone, console: Console, *, resume: bool, verify: bool
) -> Checkpoint | None:
    """The checkpoint to go on from, or None if the run starts; reports what has changed since the run stopped."""
    if not resume:
        run.require_unused()
        return None
    checkpoint, notes = run.reopen(config, backbone, verify=verify)
    for note in notes:
        say(console, note)
    if checkpoint is None:
        say(console, f"{run.path}: no checkpoint yet to resume from; the run starts")
        if run.stored_config.is_as_written() is False:
            say(console, f"{run.stored_config.path} was changed since a run wrote it; look at it, if that was not you")
    return checkpoint


def _stop_if_one_was_asked(world: World) -> None:
    """End what has not begun in any of the processes.

    Raises:
        StopRequested: a signal asked one of them to stop.
    """
    if not world.alone:
        begin()  # from here on a signal is heeded together with the others
    if world.any(is_asked_to_stop()):
        raise StopRequested


def _created(run: RunDir, config: RunConfig, console: Console) -> Path:
    """Make the run's folder; returns its path."""
    run.create(config)
    _say_taken_over(run, console)
    return run.path


def _say_taken_over(run: RunDir, console: Console) -> None:
    lines = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    if lines:
        say(
            console,
            f"{run.path}: a run ended there after step {lines[-1]['step']}, before its first checkpoint; its folder is "
            f"taken over",
        )


def _tidied(run: RunDir, ended: TrainResult, config: RunConfig, console: Console) -> TrainResult:
    """Complete what a process that was killed at the very end did not do, and report that the run is done."""
    run.tidy(config.train.ckpt_keep)
    if pictures_are_due(run.path):
        Pictures(run, lambda text: say(console, text)).draw()
    say(console, f"{run.path}: done already, {ended.steps} steps; raise train.max_steps to go on")
    return ended


def _not_begun(run: RunDir, checkpoint: Checkpoint | None, console: Console) -> TrainResult:
    """Report that a run was interrupted before its first step, or before it went on."""
    say(console, NOT_BEGUN)
    return TrainResult(
        run_dir=run.path,
        steps=0 if checkpoint is None else checkpoint.step,
        interrupted=True,
        loss=None,
        evaluation=None,
        checkpoint=None if checkpoint is None else checkpoint.path,
        resume_command=run.resume_command(),
    )
