"""Which windows a forward pass reads: a pure function of the data's layout, the seed and the pass's number.

What an order keeps is only what it would compute again, so a resumed run reads what the uninterrupted one would have
read. Orders know files as ranges of windows, and groups of files with a weight.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from ttt.errors import ConfigError

Shuffle = bool | Literal["files"]
"""Windows in random order, windows in order, or files in random order with the windows of each in order."""


@dataclass(frozen=True)
class Reading:
    """The windows that one forward pass reads."""

    windows: tuple[int, ...]
    """The window of each batch row."""
    starts: tuple[bool, ...]
    """For each row, whether its window is the first of a file, so that its carried fast weights start over."""

    def part(self, rows: slice) -> Reading:
        """What some of the rows read."""
        return Reading(self.windows[rows], self.starts[rows])


@dataclass(frozen=True)
class Group:
    """Files that share a weight."""

    files: range
    """Their numbers."""
    weight: float = 1.0
    """What they give of all windows read is this of the sum of all weights, whatever their length. At least 1e-6."""
    name: str = "one source"
    """What the user calls them."""


def _permutation(count: int, seed: int, epoch: int, group: int) -> tuple[int, ...]:
    """A permutation of 0 … count-1: the ranks of raw PCG64 output, whose stream numpy never changes."""
    # the first group's words are those of data without groups: numpy fills up with zeros
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, group])).random_raw(count)
    return tuple(int(index) for index in np.argsort(bits, kind="stable"))


class WindowOrder:
    """Every window of a group once in each of its epochs, in one of the orders of `Shuffle`.

    A batch may cross the end of an epoch, so that no window is dropped; and `batch_size` 2 with two passes a step
    reads the same windows as `batch_size` 4. Groups take turns by their weights, as evenly as these allow.

    Args:
        files: the windows of each file.
        batch_size: windows of a pass.
        shuffle: the order within a group.
        seed: of the random order.
        groups: consecutive files that share a weight; without any, all files are one.

    Raises:
        ConfigError: there are no windows.
    """

    def __init__(
        self,
        files: Sequence[range],
        *,
        batch_size: int,
        shuffle: Shuffle,
        seed: int,
        groups: Sequence[Group] = (),
    ) -> None:
        self._starts = frozenset(file.start for file in files if len(file))
        self._batch_size = batch_size
        members = _members(files, groups)
        self._turns = _Turns([group.weight for group, _ in members])
        self._endless = [_Endless(own, shuffle, seed, number) for number, (_, own) in enumerate(members)]

    def at(self, number: int) -> Reading:
        """What forward pass `number` (from 0) reads."""
        first = number * self._batch_size
        windows = tuple(self._window(position) for position in range(first, first + self._batch_size))
        return Reading(windows, tuple(window in self._starts for window in windows))

    def _window(self, position: int) -> int:
        group, rank = self._turns.at(position)
        return self._endless[group].window(rank)


class _Turns:
    """Which group each position of an endless order belongs to.

    The first group has the whole number nearest to its share of the first p positions, for every p; the second that of
    what the first leaves; and so on. So a group is never more than a few positions ahead or behind.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        self._shares = [weight / sum(exact[number:]) for number, weight in enumerate(exact)]

    def at(self, position: int) -> tuple[int, int]:
        """The group of a position, and how many positions before it are that group's."""
        if len(self._shares) == 1:
            return 0, position
        before, after = self._of_the_first(position), self._of_the_first(position + 1)
        return next((group, had) for group, (had, has) in enumerate(zip(before, after, strict=True)) if has > had)

    def _of_the_first(self, positions: int) -> list[int]:
        """How many of the first positions each group has. One position more is one more of exactly one group."""
        counts = []
        for share in self._shares:
            counts.append((2 * positions * share.numerator + share.denominator) // (2 * share.denominator))
            positions -= counts[-1]
        return counts


class _Endless:
    """The windows of a group of consecutive files, epoch after epoch."""

    def __init__(self, files: Sequence[range], shuffle: Shuffle, seed: int, group: int) -> None:
        self._first = files[0].start
        self._windows = _count(files)
        self._shuffle = shuffle
        permutation = functools.partial(_permutation, seed=seed, group=group)
        self._window_order = functools.lru_cache(maxsize=2)(lambda epoch: permutation(self._windows, epoch=epoch))
        self._file_order = functools.lru_cache(maxsize=2)(
            lambda epoch: _FilesInTurn([files[number] for number in permutation(len(files), epoch=epoch)])
        )

    def window(self, position: int) -> int:
        """The window at a position."""
        epoch, rank = divmod(position, self._windows)
        if self._shuffle == "files":
            return self._file_order(epoch).window(rank)
        return self._first + (self._window_order(epoch)[rank] if self._shuffle else rank)


class _FilesInTurn:
    """The windows of files, one file after another."""

    def __init__(self, files: Sequence[range]) -> None:
        self._files = files
        self._ends = list(itertools.accumulate(map(len, files)))

    def window(self, rank: int) -> int:
        """The window at a place in them all."""
        number = bisect.bisect_right(self._ends, rank)
        return self._files[number][rank - self._ends[number]]  # counted from the file's end


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


class FileLaneOrder:
    """Whole files, one after another, in each row of the batch, which takes the next one when it ends; for carried fast
    weights, with files in random order or with groups of files.

    No file is in two rows at once. Of the files of a group that are not being read, the one that was read least often
    is next; among equals, the first in the random order of that epoch, or in their own order. The group is the one that
    has given the fewest windows for its weight.

    Args:
        files: the windows of each file.
        batch_size: rows.
        shuffle: whether files are in random order.
        seed: of the random order.
        groups: consecutive files that share a weight; without any, all files are one.

    Raises:
        ConfigError: there are fewer files than rows, or than rows of a group's share.
    """

    def __init__(
        self, files: Sequence[range], *, batch_size: int, shuffle: bool, seed: int, groups: Sequence[Group] = ()
    ) -> None:
        members = _members(files, groups)
        self._files = [file for _, own in members for file in own]
        _require_files(len(self._files), batch_size)
        _require_shares(members, batch_size)
        self._groups: list[_IdleFiles] = []
        for number, (group, own) in enumerate(members):
            first = sum(len(others) for _, others in members[:number])
            order = functools.partial(_permutation, len(own), seed, group=number) if shuffle else None
            self._groups.append(_IdleFiles(first, own, Fraction(group.weight), order))
        self._begins = [array("q") for _ in range(batch_size)]
        """The passes in which a file begins in each row; known as far as they were asked for."""
        self._read = [array("q") for _ in range(batch_size)]
        """Those files, as numbers of `_files`."""
        self._ends = [0] * batch_size
        """The pass after the last of each row's file."""

    def at(self, number: int) -> Reading:
        """What forward pass `number` (from 0) reads."""
        while (now := min(self._ends)) <= number:
            self._change_files(now)
        windows, starts = [], []
        for begins, read in zip(self._begins, self._read, strict=True):
            last = bisect.bisect_right(begins, number) - 1
            windows.append(self._files[read[last]][number - begins[last]])
            starts.append(begins[last] == number)
        return Reading(tuple(windows), tuple(starts))

    def _change_files(self, now: int) -> None:
        """Give every row that ends before this pass its next file."""
        ended = [row for row, end in enumerate(self._ends) if end == now]
        for row in ended if now else ():
            self._group_of(self._read[row][-1]).give_back(self._read[row][-1])
        for row in ended:
            file = min((group for group in self._groups if group.idle), key=lambda group: group.given).take()
            self._begins[row].append(now)
            self._read[row].append(file)
            self._ends[row] = now + len(self._files[file])

    def _group_of(self, file: int) -> _IdleFiles:
        return next(group for group in self._groups if file in group.numbers)


class _IdleFiles:
    """The files of a group that no row reads, in the order in which they will be taken."""

    def __init__(
        self,
        first: int,
        files: Sequence[range],
        weight: Fraction,
        permutation: Callable[[int], tuple[int, ...]] | None,
    ) -> None:
        self.numbers = range(first, first + len(files))
        self.given = Fraction(0)
        """Windows of the files taken so far, for each unit of weight."""
        self._files = files
        self._weight = weight
        self._ranks = functools.lru_cache(maxsize=8)(lambda epoch: _ranks(permutation(epoch))) if permutation else None
        self._times = [0] * len(files)
        self._next: list[tuple[int, int, int]] = []
        for number in self.numbers:
            self.give_back(number)

    @property
    def idle(self) -> bool:
        """Whether there is one."""
        return bool(self._next)

    def take(self) -> int:
        """The number of the next file, which is being read from now on."""
        _, _, number = heapq.heappop(self._next)
        self._times[number - self.numbers.start] += 1
        self.given += len(self._files[number - self.numbers.start]) / self._weight
        return number

    def give_back(self, number: int) -> None:
        """A file has ended."""
        own = number - self.numbers.start
        times = self._times[own]
        heapq.heappush(self._next, (times, self._ranks(times)[own] if self._ranks else own, number))


def _ranks(permutation: Sequence[int]) -> list[int]:
    """At which place of a permutation each number is."""
    ranks = [0] * len(permutation)
    for rank, number in enumerate(permutation):
        ranks[number] = rank
    return ranks


def deal(files: Sequence[range], lanes: int) -> list[list[range]]:
    """Deal files to lanes: the longest first, each to the lane that is shortest so far.

    Returns:
        The files of each lane, in their own order; the longest lane first.

    Raises:
        ConfigError: there are fewer files than lanes.
    """
    filled = [file for file in files if len(file)]
    _count(filled)
    _require_files(len(filled), lanes)
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


def _members(files: Sequence[range], groups: Sequence[Group]) -> list[tuple[Group, list[range]]]:
    """Each group with its files; files without a window are left out.

    Raises:
        ConfigError: there are no windows, or a group has none.
    """
    _count(files)
    members = [
        (group, [file for file in files[group.files.start : group.files.stop] if len(file)])
        for group in groups or [Group(range(len(files)))]
    ]
    for group, own in members:
        if not own:
            raise ConfigError(f"data: {group.name} has not one window; leave it out")
    return members


def _require_files(files: int, lanes: int) -> None:
    if files < lanes:
        raise ConfigError(
            f"train.batch_size: {lanes} with ttt.persistent_states: true reads {lanes} files side by side, but the "
            f"data has {files}; write batch_size: {files} or less"
        )


def _require_shares(members: Sequence[tuple[Group, list[range]]], lanes: int) -> None:
    """Refuse weights that cannot be kept, because a group has too few files to be in so many rows at once."""
    total = sum(Fraction(group.weight) for group, _ in members)
    for group, own in members:
        share = Fraction(group.weight) / total
        if len(own) < share * lanes:
            raise ConfigError(
                f"data.train_data: {group.name} has {len(own)} files, but its share of {float(share):.0%} is "
                f"{float(share * lanes):g} of {lanes} rows, and with ttt.persistent_states: true each row reads a file "
                f"of its own; write a smaller weight or train.batch_size"
            )


def _count(files: Sequence[range]) -> int:
    windows = sum(len(file) for file in files)
    if windows == 0:
        raise ConfigError("data: not one window; the files are empty or shorter than a window")
    return windows
