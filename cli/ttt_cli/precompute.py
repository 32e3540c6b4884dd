"""`ttt precompute`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ttt_cli.options import Overrides
from ttt_cli.ranks import require_number
from ttt_cli.terminal import show_note

_INTERRUPTED = "interrupted; what is done stays: the same command goes on"


def precompute(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A config file; its data section says what to make.")],
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option("--nproc", help="Processes on this machine, each of which makes a part.")] = 1,
) -> None:
    """Make a backbone's training data: latents from videos, codes from recordings.

    It continues after an interruption: finished files stay, and are not made again. Started by torchrun or srun, each
    process makes its part.
    """
    from rich.console import Console

    from ttt.check import load_config
    from ttt.plugins import Precomputing, capability
    from ttt.train.terminal import lasting

    require_number(nproc, most=1024)
    loaded = load_config(config, overrides=overrides or [], training=False)
    maker = capability(loaded.backbone, Precomputing)
    if nproc > 1:
        raise typer.Exit(_in_processes(nproc, [config, *(f"--set={override}" for override in overrides or [])]))
    console = Console()
    try:
        with lasting(console):
            maker.precompute(loaded.config, console=console)
    except KeyboardInterrupt:
        show_note(_INTERRUPTED)
        raise


def _in_processes(count: int, words: Sequence[str]) -> int:
    """Run the command in several processes, each to its end; returns the exit code of the first that failed.

    Raises:
        UsageError: this process is one of several already.
    """
    from ttt.errors import UsageError
    from ttt.plugins import Part

    if Part.of_launch().size > 1:
        raise UsageError(f"--nproc {count}: this is one of several processes of a launch already; leave --nproc out")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            processes.append(
                subprocess.Popen([sys.executable, "-m", "ttt_cli", "precompute", *words], env=_environment(rank, count))
            )
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise
    lost = [rank + 1 for rank, code in enumerate(codes) if code < 0]
    for number in lost:
        show_note(f"part {number} of {count} was killed; the same command goes on where it was")
    return next((128 - code if code < 0 else code for code in codes if code), 0)


def _environment(rank: int, count: int) -> dict[str, str]:
    """What torchrun tells a process ("Environment Variables" in its documentation)."""
    told = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    return {
        **os.environ,
        **{name: str(value) for name, value in told.items()},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count)),
    }
