"""Which windows a forward pass reads: a pure function of the data's layout, the seed and the pass's number.

Nothing is remembered between passes, so a resumed run reads what the uninterrupted one would have read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttt.errors import ConfigError


@dataclass(frozen=True)
class Reading:
    """The windows that one forward pass reads."""

    windows: tuple[int, ...]
    """The window of each batch row."""
    starts: tuple[bool, ...]
    """For each row, whether its window is the first of a file, so that its carried fast weights start over."""


@functools.lru_cache(maxsize=2)
def _permutation(windows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of the windows: the ranks of raw PCG64 output, whose stream numpy never changes."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(windows)
    return tuple(int(index) for index in np.argsort(bits, kind="stable"))


class WindowOrder:
    """Every window once an epoch: shuffled again every epoch, or in order of their numbers.

    A batch may cross the end of an epoch, so that no window is dropped; and `batch_size` 2 with two passes a step
    reads the same windows as `batch_size` 4.

    Raises:
        ConfigError: there are no windows.
    """

    def __init__(self, files: Sequence[range], *, batch_size: int, shuffle: bool, seed: int) -> None:
        self._starts = frozenset(file.start for file in files if len(file))
        self._windows = _count(files)
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed

    def at(self, number: int) -> Reading:
        """What forward pass `number` (from 0) reads."""
        first = number * self._batch_size
        windows = tuple(self._window(position) for position in range(first, first + self._batch_size))
        return Reading(windows, tuple(window in self._starts for window in windows))

    def _window(self, position: int) -> int:
        epoch, rank = divmod(position, self._windows)
        return _permutation(self._windows, self._seed, epoch)[rank] if self._shuffle else rank


class LaneOrder:
    """Whole files in order, one after another, in each row of the batch; for carried fast weights.

    Files are dealt to rows so that the rows are about equally long; a row that has read all its files starts again
    with its first.

    Raises:
        ConfigError: there are fewer files than rows.
    """

    def __init__(self, files: Sequence[range], *, batch_size: int) -> None:
        self._lanes = [[window for file in lane for window in file] for lane in deal(files, batch_size)]
        self._starts = frozenset(file.start for file in files if len(file))

    def at(self, number: int) -> Reading:
        """What forward pass `number` (from 0) reads."""
        windows = tuple(lane[number % len(lane)] for lane in self._lanes)
        return Reading(windows, tuple(window in self._starts for window in windows))


def deal(files: Sequence[range], lanes: int) -> list[list[range]]:
    """Deal files to lanes: the longest first, each to the lane that is shortest so far.

    Returns:
        The files of each lane, in their own order; the longest lane first.

    Raises:
        ConfigError: there are fewer files than lanes.
    """
    filled = [file for file in files if len(file)]
    _count(filled)
    if len(filled) < lanes:
        raise ConfigError(
            f"train.batch_size: {lanes} with ttt.persistent_states: true reads {lanes} files side by side, but the "
            f"data has {len(filled)}; write batch_size: {len(filled)} or less"
        )
    dealt: list[list[range]] = [[] for _ in range(lanes)]
    lengths = [0] * lanes
    for file in sorted(filled, key=lambda file: (-len(file), file.start)):
        shortest = min(range(lanes), key=lengths.__getitem__)
        dealt[shortest].append(file)
        lengths[shortest] += len(file)
    for lane in dealt:
        lane.sort(key=lambda file: file.start)
    return sorted(dealt, key=lambda lane: (-sum(map(len, lane)), lane[0].start))


def once(files: Sequence[range], *, batch_size: int, lanes: bool) -> list[Reading]:
    """Every window once, in order, for evaluation.

    With `lanes`, each row reads files of its own. A row that has read all its files leaves the end of the batch, so
    that row i of a reading continues row i of the previous one. If there are fewer files than rows, the batch is
    smaller.

    Raises:
        ConfigError: there are no windows.
    """
    starts = frozenset(file.start for file in files if len(file))
    if lanes:
        columns = [
            [window for file in lane for window in file]
            for lane in deal(files, min(batch_size, max(1, len([file for file in files if len(file)]))))
        ]
        batches = [tuple(column[time] for column in columns if time < len(column)) for time in range(len(columns[0]))]
    else:
        count = _count(files)
        batches = [tuple(range(first, min(first + batch_size, count))) for first in range(0, count, batch_size)]
    return [Reading(batch, tuple(window in starts for window in batch)) for batch in batches]


def _count(files: Sequence[range]) -> int:
    windows = sum(len(file) for file in files)
    if windows == 0:
        raise ConfigError("data: not one window; the files are empty or shorter than a window")
    return windows
