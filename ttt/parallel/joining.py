"""How a process joins the others of its run, and leaves them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ttt.config.schema import TrainConfig
from ttt.errors import EnvironmentProblem
from ttt.machine import launch_is_incomplete
from ttt.parallel.layout import launched_layout
from ttt.parallel.world import DIMENSIONS, World
from ttt.words import first_line

TIMEOUT = timedelta(minutes=30)
"""After this long a process gives up waiting for the others. It is longer than the longest thing that one of them does
alone, which is to write a checkpoint. One that dies is noticed long before."""

_times_joined = 0
"""How often this process has: each time the processes meet under other names, since those of the last are there yet."""
_met_in: dist.Store | None = None


def met_in() -> dist.Store | None:
    """The store in which this process met the others; None if it has not."""
    return _met_in


@contextlib.contextmanager
def joined(train: TrainConfig, choose_device: Callable[[], torch.device]) -> Iterator[World]:
    """The processes of this run; alone, without a launcher.

    They talk over NCCL on CUDA, and over gloo on a CPU and about what is on the CPU. A process group that exists
    already is used and left as it is.

    Raises:
        EnvironmentProblem: the launcher has not told everything, or the others cannot be reached.
        ConfigError: `train.parallel` or `train.batch_size` does not fit the number of processes.
    """
    incomplete = launch_is_incomplete()
    if incomplete:
        raise EnvironmentProblem(f"{incomplete}; start the run with `ttt train CONFIG --nproc N` or torchrun")
    layout = launched_layout(train)
    if layout.size == 1:
        yield World()
        return
    device, ours = choose_device(), not dist.is_initialized()
    if ours:
        _begin(device)
    try:
        sizes = (layout.replicate, layout.shard, layout.tensor)
        yield World(dist.get_rank(), layout, init_device_mesh(device.type, sizes, mesh_dim_names=DIMENSIONS))
    except BaseException:
        ours = ours and dist.get_backend() == "gloo"  # NCCL would wait for a process that is gone
        raise
    finally:
        if ours:
            dist.destroy_process_group()


def _begin(device: torch.device) -> None:
    global _times_joined, _met_in
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    gpu = device if device.type == "cuda" else None
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        _met_in = store
        _times_joined += 1
        mine = dist.PrefixStore(f"run {_times_joined}", store)
        dist.init_process_group(backend, store=mine, rank=rank, world_size=count, timeout=TIMEOUT, device_id=gpu)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            f"the other processes of the run cannot be reached: {first_line(error)}; look at what each of them says"
        ) from error
