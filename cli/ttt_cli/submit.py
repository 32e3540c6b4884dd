"""`ttt submit`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt_cli.options import BackboneName, Overrides
from ttt_cli.terminal import show, show_findings, show_note

if TYPE_CHECKING:
    from ttt.check import LoadedConfig

_NO_MACHINE = sys.maxsize
"""Bytes of memory: what this machine has says nothing about those that the job gets."""


def submit(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A config file, or the folder of a run to go on with.")
    ],
    nodes: Annotated[int, typer.Option("--nodes", help="How many nodes.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs of each node, a process for each; 0 trains on CPUs.")] = 1,
    time: Annotated[
        str, typer.Option("--time", help="The longest a job may take at a time: hours:minutes:seconds, or days-hours.")
    ] = "24:00:00",
    partition: Annotated[str | None, typer.Option("--partition", help="Slurm's partition, as `sinfo` lists.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Who pays.")] = None,
    qos: Annotated[str | None, typer.Option("--qos", help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option("--constraint", help="Features of the nodes, as a100.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option("--cpus-per-task", help="CPU cores of each process.")] = None,
    mem: Annotated[str | None, typer.Option("--mem", help="Memory of each node, as 200GB.")] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option("--tasks-per-node", help="Processes of each node, with --gpus 0.")
    ] = None,
    warn: Annotated[
        int | None,
        typer.Option(
            "--warn",
            metavar="SECONDS",
            help="How long before its time ends a job saves and is queued again. [default: 300, or a quarter]",
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="KEY=VALUE", help="Any other option of sbatch; can be repeated."),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option("--setup", metavar="LINE", help="A line of shell to run first, as 'module load cuda'."),
    ] = None,
    backbone: BackboneName = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch script; write and submit nothing.")
    ] = False,
) -> None:
    """Train as a job of a Slurm cluster: what submit_job.sh did.

    The config is checked first; if it has an error, nothing is submitted. The job runs `ttt train --resume` on every
    GPU. If it is preempted, or its time ends, it saves, is queued again and goes on from its last checkpoint, until
    all steps are done. Scripts and logs are in RUN/slurm. The same command goes on with a run whose job has ended.

    --nodes 2 --gpus 8 makes 16 processes, which `train.parallel` divides. Jobs are made by submitit: pip install
    'ttt-adapters[cluster]'.
    """
    from ttt.cluster import submission
    from ttt.cluster.request import Request

    request = Request(
        nodes=nodes,
        gpus=gpus,
        time=time,
        tasks_per_node=tasks_per_node,
        warn=warn,
        cpus_per_task=cpus_per_task,
        mem=mem,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        more=more or [],
        setup=setup or [],
    )
    loaded = _loaded(Path(config), backbone, overrides or [])
    show_findings(loaded.findings, stream=sys.stderr)
    job = submission.plan(loaded.config, loaded.backbone, request)
    for note in job.notes:
        show_note(note)
    if dry_run:
        show_note(f"{request.in_words()}; nothing is written or submitted. What sbatch would be given:")
        print(job.script)
        return
    number = submission.submit(job)
    show(f"submitted job {number}: {request.in_words()}")
    show(f"run: {job.run}")
    show(f"log: {job.folder / f'{number}_0_log.out'}")
    show(f"how it stands: squeue --job {number}; end it: scancel {number}")


def _loaded(path: Path, backbone: str | None, overrides: list[str]) -> LoadedConfig:
    """The config, checked as `ttt train --resume` in the job will check it."""
    from ttt.check import load_config
    from ttt.checkpoint_folder import step_folders
    from ttt.train.stored_config import CONFIG
    from ttt_cli.train import load

    loaded = load(path, backbone, overrides, resume=True, memory=_NO_MACHINE)
    run = loaded.config.run_dir
    if run is not None and step_folders(Path(run)):
        return loaded
    file = path / CONFIG if path.is_dir() else path
    fresh = load_config(file, backbone=backbone, overrides=overrides, memory=_NO_MACHINE)
    return replace(fresh, config=fresh.config.model_copy(update={"run_dir": run}))
