"""Several processes of a run as threads of one: each has a model of its own, and a world whose sums are real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ttt.parallel.layout import Layout
from ttt.parallel.world import World
from ttt.train.optim import Optimizer

Answer = TypeVar("Answer")


class Meeting:
    """Where threads bring a value each, and all take all of them away."""

    def __init__(self, size: int) -> None:
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        taken = list(self._values)
        self._barrier.wait()
        return taken

    def leave(self) -> None:
        """One has failed: wake the others."""
        self._barrier.abort()


@dataclass(frozen=True)
class SimulatedWorld(World):
    meeting: Meeting | None = field(default=None, compare=False)

    def sum(self, tensor: Tensor) -> Tensor:
        assert self.meeting is not None
        brought = self.meeting.exchange(self.rank, tensor.detach().clone())
        assert len({(each.shape, each.dtype) for each in brought}) == 1, "processes sum different things"
        return torch.stack(brought).sum(0, dtype=tensor.dtype)

    def any(self, flag: bool) -> bool:
        assert self.meeting is not None
        return any(self.meeting.exchange(self.rank, flag))


def in_processes(size: int, work: Callable[[World], Answer]) -> list[Answer]:
    """What each process returns; if some fail, the error of the first, and not of one that waited for it."""
    meeting = Meeting(size)

    def begun(rank: int) -> Answer:
        try:
            return work(SimulatedWorld(rank, Layout(replicate=size), meeting=meeting))
        except BaseException:
            meeting.leave()
            raise

    with ThreadPoolExecutor(size) as pool:
        tasks = [pool.submit(begun, rank) for rank in range(size)]
    errors = [error for task in tasks if (error := task.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [task.result() for task in tasks]


def sum_gradients(optimizer: Optimizer, world: World) -> None:
    """Add up gradients over processes before they are clipped, as what wraps the model does in real ones."""
    clip = optimizer.clip

    def summed() -> Tensor:
        for name, gradient in optimizer.gradients():
            target = optimizer._targets[name]
            if world.any(gradient is not None):  # carried fast weights may leave none in one of them
                target.grad = world.sum(torch.zeros_like(target) if gradient is None else gradient)
        return clip()

    if world.data_size > 1:
        optimizer.clip = summed  # type: ignore[method-assign]
