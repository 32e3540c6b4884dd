"""What a computation allocates: counted by PyTorch's own allocators, not inferred.

On a CPU every block that its allocator hands out and takes back is an event of the profiler's memory report, tensors
and the temporaries of kernels written in C++ alike; what MKL and oneDNN take for themselves by `malloc` is not among
them. On CUDA the caching allocator keeps the count. Bytes are those asked for beyond what there was at the start.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from typing import Any, NamedTuple

# Or each profile writes lines of its own to standard error, about blocks from before it, which are not counted.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch.autograd import profiler

_EVENT = "[memory]"


class Allocations(NamedTuple):
    """What a computation allocated."""

    peak: int
    """The most bytes at once, beyond what there was before."""
    held: int
    """Bytes that are still there with its result, which is alive: of a forward pass, what waits for backward."""
    blocks: int
    """How many times memory was asked for; on CUDA, of the caching allocator."""


def allocations(function: Callable[[], Any], device: torch.device) -> Allocations:
    """Run a function once and count what it allocates.

    Only what it makes is collected meanwhile: cycles from before would be freed at a time of the collector's choosing.
    """
    frozen = _frozen_by_others()
    gc.freeze()
    try:
        return _on_cuda(function, device) if device.type == "cuda" else _on_cpu(function)
    finally:
        if not frozen:
            gc.unfreeze()


@functools.cache
def _frozen_by_others() -> bool:
    """Whether objects were frozen by who means them to stay so: asked once, since all of them are counted."""
    return gc.get_freeze_count() > 0


def _on_cpu(function: Callable[[], Any]) -> Allocations:
    with profiler.profile(profile_memory=True) as profile:
        result = function()
    events = profile.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted(
        (event.start_ns(), size)
        for event in events
        if (size := event.nbytes()) and event.name() == _EVENT  # in this order: names are slow, and most have no size
    )
    live = peak = blocks = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
        blocks += change > 0
    del result
    return Allocations(peak, live, blocks)


def _on_cuda(function: Callable[[], Any], device: torch.device) -> Allocations:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    result = function()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_stats(device)
    start = before["allocated_bytes.all.current"]
    del result
    return Allocations(
        peak=after["allocated_bytes.all.peak"] - start,
        held=after["allocated_bytes.all.current"] - start,
        blocks=after["allocation.all.allocated"] - before["allocation.all.allocated"],
    )
