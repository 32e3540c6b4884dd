"""A run is looked at, then submitted: what `ttt train` would refuse is told before a job waits for days."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ttt.cluster import script
from ttt.cluster.request import Request
from ttt.config.dumping import dump_config
from ttt.config.paths import with_absolute_paths
from ttt.config.schema import RunConfig
from ttt.errors import ConfigError, EnvironmentProblem, UsageError
from ttt.files import write_text, writing
from ttt.parallel.layout import layout_of, uneven
from ttt.plugins import Backbone
from ttt.printable import as_line
from ttt.train import rundir
from ttt.train.claim import SUMMARY
from ttt.train.rundir import RunDir

if TYPE_CHECKING:
    from ttt.cluster.executor import SlurmCommand

_ANSWER_SECONDS = 60
"""The longest that Slurm may take to say which jobs there are."""


@dataclass(frozen=True)
class Job:
    """A job that can be submitted."""

    run: Path
    """The run's folder, absolute."""
    config: str
    """The resolved config, with which it trains."""
    slurm: SlurmCommand
    notes: tuple[str, ...]
    """What is to be said of the run that goes on."""

    @property
    def script(self) -> str:
        """What sbatch is given."""
        return self.slurm.script

    @property
    def folder(self) -> Path:
        """The run's folder of jobs."""
        return self.run / script.FOLDER


def plan(config: RunConfig, backbone: Backbone, request: Request) -> Job:
    """The job that trains a run, or goes on with it if it has begun. Nothing is written, and Slurm is not asked.

    Raises:
        ConfigError: the config does not fit what is asked for, or is not the run's.
        UsageError: the run's folder is in use or cannot be gone on with, or the run is done.
        EnvironmentProblem: submitit is missing, or the run's folder cannot be used.
    """
    _require_fit(config, request)
    run = _run_of(config)
    notes = _require_startable(run, config, backbone)
    path = run.path
    if "%" in str(path) or "\\" in str(path) or not str(path).isprintable():
        raise UsageError(f"run_dir: {as_line(str(path))}: Slurm replaces % and \\ in the name of a log; name another")
    text = dump_config(with_absolute_paths(config).model_copy(update={"run_dir": str(path)}))
    return Job(path, text, script.of_run(path, request), tuple(notes))


def submit(job: Job) -> str:
    """Write the job's config and script, and submit it; returns its number.

    Raises:
        EnvironmentProblem: there is no Slurm here, or it does not answer or refuses the job; nothing was submitted.
        UsageError: a job of the run is in the queue already.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentProblem(
            "there is no sbatch here, so no Slurm to submit to; log in where your cluster has it, or look at the job "
            "with --dry-run"
        )
    _require_no_job(job.run)
    new = [folder for folder in (job.folder, *job.folder.parents) if not folder.exists()]
    with writing(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    try:
        write_text(job.folder / script.SUBMITTED, job.config)
        return _started(job)
    except EnvironmentProblem as error:
        if new and not isinstance(error, _UnclearError):
            (job.folder / script.SUBMITTED).unlink(missing_ok=True)
        raise
    finally:
        for leftover in job.folder.glob(".submission_file_*.sh"):  # submitit's name for it, before it has a number
            leftover.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: another run may have come into one of them meanwhile
            for folder in new:
                folder.rmdir()


class _UnclearError(EnvironmentProblem):
    """Nobody knows whether there is a job: if there is, it needs its config."""


def _started(job: Job) -> str:
    from ttt.cluster.executor import REFUSED, UNCLEAR

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # what sbatch says, which the error says too
            return job.slurm.start()
    except UNCLEAR as error:
        raise _UnclearError(
            f"sbatch did not say which job it made ({as_line(str(error).splitlines()[0])}); look whether there is one "
            f"with `squeue --name {script.job_name(job.run)}`"
        ) from error
    except (REFUSED, OSError) as error:
        raise _refused("sbatch", str(error)) from error


def _refused(program: str, said: str) -> EnvironmentProblem:
    """What a program of Slurm said, each line without the program's name, as one sentence."""
    reasons = [line.removeprefix(f"{program}: ").removeprefix("error: ") for line in said.splitlines() if line]
    return EnvironmentProblem(f"{program}: {as_line('; '.join(reasons)) or 'no reason'}; nothing was submitted")


def _require_fit(config: RunConfig, request: Request) -> None:
    device = config.train.device
    if device == "cuda" and not request.gpus:
        raise ConfigError("train.device: cuda, but --gpus 0 asks for none; write --gpus, or train.device: cpu")
    if device == "cpu" and request.gpus:
        raise ConfigError(f"train.device: cpu, but --gpus {request.gpus} asks for GPUs; write --gpus 0, or auto")
    asked = f"{request.nodes} {'node' if request.nodes == 1 else 'nodes'} with {request.tasks}"
    try:
        layout = layout_of(config.train.parallel, request.processes)
    except ValueError as error:
        raise ConfigError(
            f"train.parallel: {error}, but {asked} {'process' if request.tasks == 1 else 'processes'} each make "
            f"{request.processes}; change --nodes or --gpus, or write auto for one of the sizes"
        ) from None
    problem = uneven(config.train, layout)
    if problem is not None:
        raise ConfigError(f"train.batch_size: {problem}; write a multiple of {layout.data_size}")


def _run_of(config: RunConfig) -> RunDir:
    """The run's folder, absolute: a job that is queued again must find it. Without `run_dir` it is a new one."""
    run = rundir.choose(config, resume=False)
    path = run.path.absolute()
    if config.run_dir is None and os.path.lexists(path):
        path = RunDir(path).beside()
    return RunDir(path)


def _require_startable(run: RunDir, config: RunConfig, backbone: Backbone) -> list[str]:
    """Look at the run's folder as `ttt train --resume` will; returns what it would say."""
    with run.held():
        checkpoint, notes = run.reopen(config, backbone, verify=False)
    if checkpoint is not None and checkpoint.step >= config.train.max_steps and (run / SUMMARY).is_file():
        raise UsageError(f"{run.path}: done already, {checkpoint.step} steps; raise train.max_steps to go on")
    return notes if checkpoint is None else [f"{run.path} goes on after step {checkpoint.step}", *notes]


def _require_no_job(run: Path) -> None:
    """Refuse a run that a job trains or waits to train: one of the two would end with an error."""
    for number, state, comment in _jobs(script.job_name(run)):
        if comment == str(run):
            raise UsageError(
                f"{run}: job {number} of this run is in the queue already ({state.lower()}); wait for it, or end it "
                f"with `scancel {number}`"
            )


def _jobs(name: str) -> Sequence[tuple[str, str, str]]:
    """Number, state and comment of each job of this name that is not over."""
    command = ["squeue", "--noheader", f"--name={name}", "--format=%i|%T|%k"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise _refused("squeue", str(getattr(error, "stderr", None) or error)) from error
    lines = [line.split("|", 2) for line in answer.stdout.splitlines()]
    return [(parts[0], parts[1], parts[2]) for parts in lines if len(parts) == 3]
