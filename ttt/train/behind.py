"""A checkpoint that is written while the run goes on (`train.ckpt_async`), and takes its place when all of it is there.

Everything is copied to the CPU's memory first. Until the checkpoint is placed it has a temporary name, so a run that is
killed meanwhile goes on from the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt.parallel.world import World
from ttt.train.shards import begin_shards


@dataclass(frozen=True)
class Behind:
    """A checkpoint that is being written."""

    step: int
    """Optimiser steps done."""
    folder: Path
    """Where, under a temporary name."""
    state: Mapping[str, Any]
    """The content of `trainer_state.json`."""
    keep: int | None
    """How many checkpoints stay when it is placed."""
    _files: Future[None] | None
    """This process's files but for its part of the optimiser's state; None if it has none."""
    _shards: Callable[[float | None], bool] | None
    """Whether all have written their parts of the optimiser's state; None if one file holds it."""

    @classmethod
    def begun(
        cls,
        step: int,
        folder: Path,
        state: Mapping[str, Any],
        keep: int | None,
        write: Callable[[], None] | None,
        optimizer: Mapping[str, Tensor],
        world: World,
    ) -> Behind:
        """Begin to write: with `write` what this process has, and of several processes each its part of `optimizer`."""
        files = None
        if write is not None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            files = pool.submit(write)
            pool.shutdown(wait=False)
        return cls(step, folder, state, keep, files, None if world.alone else begin_shards(folder, optimizer, world))

    @property
    def is_written(self) -> bool:
        """Whether this process has nothing left to write."""
        return (self._files is None or self._files.done()) and self.has_shards

    @property
    def has_shards(self) -> bool:
        """Whether all processes have ended writing their parts of the optimiser's state, or there are none."""
        return self._shards is None or self._shards(0)

    def wait_for_shards(self) -> None:
        """Wait until all processes have written their parts of the optimiser's state.

        Raises:
            EnvironmentProblem: in all of them, if one cannot write.
        """
        if self._shards is not None:
            self._shards(None)

    def wait_for_files(self) -> None:
        """Wait until this process has written its files.

        Raises:
            EnvironmentProblem: the disk is full or cannot be written.
        """
        if self._files is not None:
            self._files.result()
