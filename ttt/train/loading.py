"""Batches of forward passes in turn, read ahead by worker processes: PyTorch's `DataLoader` over the order of a run.

Which windows a pass reads is known beforehand (`ttt.train.order`), so a run that is resumed at any pass, with any
number of workers, reads what the uninterrupted one would have read.

Workers are forked by a server process that has imported PyTorch alone and has no threads, so they are safe beside the
threads and the GPU of the process that trains. They leave signals to it, and end when it ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ttt.errors import EnvironmentProblem, PluginError
from ttt.plugins import Batch, WindowDataset
from ttt.plugins.asking import WAY_OUT, in_one_line, owner
from ttt.train.parts_of_a_step import DATA, part_of_step
from ttt.train.passes import read_batch, to_device
from ttt.train.workers import FEWER, KEY, METHOD, Beginning, Failed, Reads, as_it_is, read_window, starting


class Loader:
    """The batches of forward passes, by number. It is a context, at whose end its workers end.

    Args:
        dataset: the data.
        windows_of: the windows that this process reads in a pass.
        passes: how many passes there are.
        device: where batches go.
        workers: how many processes read ahead; 0 reads each batch when it is asked for.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        windows_of: Callable[[int], Sequence[int]],
        *,
        passes: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self._dataset = dataset
        self._windows_of = windows_of
        self._passes = passes
        self._device = device
        self._workers = workers
        self._ahead: _Ahead | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    @part_of_step(DATA)
    def batch(self, number: int) -> Batch:
        """The batch of pass `number` (from 0) on the device."""
        return to_device(self.read(number), self._device)

    @part_of_step(DATA)
    def read(self, number: int) -> Batch:
        """The same where the dataset has it. Passes that are asked for in turn are read ahead.

        Raises:
            EnvironmentProblem: files are missing or broken, or a worker was killed or cannot be started.
            PluginError: the dataset fails, or cannot be handed to workers.
        """
        if self._workers == 0 or number >= self._passes:
            return read_batch(self._dataset, self._windows_of(number))
        if self._ahead is None or self._ahead.next != number:
            self._close()
            self._ahead = _Ahead(
                self._dataset,
                self._windows_of,
                range(number, self._passes),
                workers=min(self._workers, self._passes - number),
                device=self._device,
            )
        return self._ahead.take()

    def _close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


class _Ahead:
    """Workers that read the batches of consecutive passes."""

    def __init__(
        self,
        dataset: Any,
        windows_of: Callable[[int], Sequence[int]],
        passes: range,
        *,
        workers: int,
        device: torch.device,
    ) -> None:
        self.next = passes.start
        """The pass whose batch comes next."""
        self._dataset = dataset
        self._windows_of = windows_of
        self._staged = getattr(dataset, "reader", None) is not None
        self._asked: deque[list[int]] = deque()
        """What workers were asked to read for each pass that was not taken yet."""
        pickled = _pickled(dataset, staged=self._staged)
        reads = Reads(pickled, collates=not self._staged)
        before = set(multiprocessing.active_children())
        try:
            with starting(pickled):
                self._batches = iter(
                    DataLoader(
                        reads,
                        batch_sampler=self._to_read(passes),
                        num_workers=workers,
                        collate_fn=as_it_is,
                        pin_memory=device.type == "cuda",
                        # sums are rounded as in the process that trains, if windows are made on a CPU there, too
                        worker_init_fn=Beginning(torch.get_num_threads() if device.type == "cpu" else 1),
                        multiprocessing_context=METHOD,
                        generator=torch.Generator(),  # else it would draw from the global one
                    )
                )
        except (OSError, EOFError) as error:
            told = f"{workers} worker processes cannot be started: {in_one_line(error)}"
            raise EnvironmentProblem(told, key=KEY, fix=FEWER) from error
        finally:
            self._workers: list[Any] = [each for each in multiprocessing.active_children() if each not in before]
        reads.forget()

    def _to_read(self, passes: range) -> Iterator[list[int]]:
        """For each pass the windows that a worker reads: all but those that the dataset has kept."""
        for number in passes:
            windows = list(self._windows_of(number))
            if self._staged:
                windows = [window for window in dict.fromkeys(windows) if not self._dataset.kept(window)]
            self._asked.append(windows)
            yield windows

    def take(self) -> Batch:
        """The next batch, on the CPU."""
        try:
            read = next(self._batches).opened()
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise self._lost(error) from error
        if isinstance(read, Failed):
            raise read.error()
        number, asked = self.next, self._asked.popleft()
        self.next += 1
        if not self._staged:
            return read
        found = dict(zip(asked, read, strict=True))
        return self._dataset.collate([self._finished(window, found) for window in self._windows_of(number)])

    def _finished(self, window: int, found: Mapping[int, Any]) -> Any:
        if window in found and not self._dataset.kept(window):
            return self._dataset.finish(window, found[window])
        return read_window(self._dataset, window)

    def _lost(self, error: Exception) -> Exception:
        """The error if a worker answers no more, as a killed one."""
        for each in self._workers:
            each.join(0.1)
        codes = [each.exitcode for each in self._workers if each.exitcode]
        if not codes:
            return error
        return EnvironmentProblem(f"a worker process that reads data ended {_how(codes[0])}", key=KEY, fix=FEWER)

    def close(self) -> None:
        """End the workers. They only read, so killing them loses nothing."""
        for each in self._workers:
            each.kill()
        for each in self._workers:
            each.join(5.0)
        with contextlib.suppress(AttributeError):
            del self._batches


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "by SIGKILL, with which a system also ends processes if memory runs out"
    if code == -getattr(signal, "SIGBUS", signal.SIGKILL):
        return "by SIGBUS: shared memory (/dev/shm) is full"
    return f"by signal {-code}" if code < 0 else f"with code {code}"


def _pickled(dataset: Any, *, staged: bool) -> bytes:
    """What workers get: the part of a dataset that reads files, or all of it.

    Raises:
        PluginError: it cannot be handed to another process.
    """
    try:
        return pickle.dumps(dataset.reader if staged else dataset)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        told = f"the dataset of {owner(getattr(dataset, 'plugin', dataset))} cannot be handed to worker processes"
        raise PluginError(f"{told}: {in_one_line(error)}", key=KEY, fix=f"write 0, or {WAY_OUT}") from error
