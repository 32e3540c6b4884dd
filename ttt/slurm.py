"""What Slurm tells a process of the others of its job, in the variables that `torchrun` would have set.

`srun` starts a process for each task and numbers them; PyTorch's process groups read `RANK`, `WORLD_SIZE` and the rest.
With this `srun ttt train CONFIG --resume` works as a job's script has it, without `torchrun` between the two: `srun`
hands a signal on to every process at once and returns their exit codes, where `torchrun` kills its processes 30 s after
a signal and ends with 1, whatever theirs was.

Source: `man srun`, "OUTPUT ENVIRONMENT VARIABLES"; torchrun's documentation, "Environment Variables".
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping

JOB = "SLURM_JOB_ID"
TASKS = "SLURM_STEP_NUM_TASKS"
"""Set by `srun` alone: in a job's script and in a shell of `salloc`, where `SLURM_NTASKS` is set too, a program is one
process."""

_FIRST_PORT, _PORTS = 15_000, 15_000
"""Where the first process listens: below the ports that systems give out by themselves, from 32,768 on Linux."""


def torchrun_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of `torchrun` for a process that `srun` started beside others.

    Returns:
        Name and value of each; empty if there are no others, or if a launcher has set `WORLD_SIZE`. An address, a port,
        a number of threads and a log level that are set already are kept.
    """
    tasks, rank = _number(environ, TASKS), _number(environ, "SLURM_PROCID")
    if tasks is None or rank is None or tasks < 2 or environ.get("WORLD_SIZE"):
        return {}
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(_number(environ, "SLURM_LOCALID") or 0),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environ)),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_address(environ),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_port(environ)),
        # torchrun's own is 1: a process that took every core would do so beside the others of its node
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or environ.get("SLURM_CPUS_PER_TASK") or "1",
        "TORCH_CPP_LOG_LEVEL": environ.get("TORCH_CPP_LOG_LEVEL") or "ERROR",  # as `ttt train --nproc` sets it
    }


def take_torchrun_variables(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set them for this process and those that it starts."""
    environ.update(torchrun_variables(environ))


def first_host(hosts: str) -> str:
    """The first of a list of hosts as Slurm writes it: `n1` of `n[1-3,7],m2`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", hosts).partition(",")[0] or "localhost"


def _first_address(environ: Mapping[str, str]) -> str:
    """The first host of the step, by name; if it has none that is known, as in a cloud, the address of a job's script.

    That script runs on the first host. A shell of `salloc` need not, so its address is the second choice.
    """
    host = first_host(_hosts(environ))
    address = environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if not address:
        return host
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return address
    return host


def _hosts(environ: Mapping[str, str]) -> str:
    return environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")


def _port(environ: Mapping[str, str]) -> int:
    """A port that every process of a step finds by itself, another one for each job, restart and step."""
    parts = (_number(environ, name) or 0 for name in (JOB, "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
    return _FIRST_PORT + sum(parts) % _PORTS


def _tasks_here(environ: Mapping[str, str]) -> int:
    """How many tasks of the step are on this node: entry `SLURM_NODEID` of a list such as `2(x3),1`."""
    counts: list[int] = []
    for entry in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry):
            counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else 1


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
