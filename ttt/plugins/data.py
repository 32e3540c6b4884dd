"""The data that training reads, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ttt.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


Batch = Any
"""A batch as the plugin's dataset collates it: any nesting of tuples, lists, dicts and tensors `[B, …]`."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of a batch."""

    loss: Tensor
    """Scalar, differentiable: the mean over the batch, or the sum of several means (`means`)."""
    tokens: int
    """Positions that the backbone read (B · T), for throughput."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars to record in `metrics.jsonl`, such as `text_loss`; each is a mean, as the loss is. All batches
    have the same names."""
    means: Tensor | None = None
    """`[K]`, differentiable: the means whose sum is `loss`, each over its entry of `Backbone.loss_weights`. None if the
    loss is a single mean."""
    metrics_over: Mapping[str, int] = field(default_factory=dict)
    """By a metric's name, the entry of `Backbone.loss_weights` over which it is a mean; 0 for metrics without one."""


@dataclass(frozen=True)
class SourceFiles:
    """The files of one of several sources of data."""

    name: str
    """What the user calls it."""
    files: range
    """Which of the dataset's files they are, by number."""
    weight: float = 1.0
    """Its share of the windows that training reads is its weight of the sum of all weights, whatever its length."""


def rows_of(batch: Batch) -> int:
    """The rows of a batch: the first size of its first tensor that has one.

    Raises:
        UsageError: it has no such tensor.
    """
    for tensor in tensors_in(batch):
        if tensor.dim():
            return int(tensor.shape[0])
    raise UsageError("a batch without a tensor [B, …], so that its rows cannot be counted")


def tensors_in(batch: Batch) -> Iterator[Tensor]:
    """Every tensor in nested mappings and sequences."""
    from torch import Tensor

    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors_in(value)


def files_of_sources(sources: Iterable[tuple[str, float, int]]) -> list[SourceFiles]:
    """Which files of a dataset are of which source: by name, weight, and how many files each has, in order."""
    found: list[SourceFiles] = []
    for name, weight, count in sources:
        first = found[-1].files.stop if found else 0
        found.append(SourceFiles(name, range(first, first + count), weight))
    return found


def source_files(dataset: WindowDataset) -> Sequence[SourceFiles]:
    """The sources of a dataset: what it says in `sources`, else all its files as one."""
    sources: Sequence[SourceFiles] = getattr(dataset, "sources", ())
    return sources or (SourceFiles("the data", range(len(dataset.files))),)


class WindowDataset(Protocol):
    """Windows of training data, addressed by number, the windows of a file in order of time.

    If the data are of several sources with weights, it also has `sources`, a sequence of `SourceFiles` that cover its
    files in order.
    """

    def __len__(self) -> int:
        """Number of windows."""
        ...

    def __getitem__(self, index: int) -> Any:
        """One window, as CPU tensors; the same index always gives the same window."""
        ...

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Collate windows to a batch."""
        ...

    @property
    def files(self) -> Sequence[range]:
        """The windows of each file: consecutive ranges that cover 0 … len-1."""
        ...

    def describe(self, index: int) -> str:
        """A window in the user's words, as "dialogue.flac, 15.0-30.0 s"."""
        ...

    @property
    def notice(self) -> str | None:
        """What a user must know about this data, as that it is a stand-in; lines that are printed when a run starts."""
        ...


class WindowReader(Protocol):
    """The part of a dataset that reads files. It can be pickled, and holds nothing that is on a device."""

    def __getitem__(self, index: int) -> Any:
        """What `StagedDataset.finish` needs of a window."""
        ...


class StagedDataset(WindowDataset, Protocol):
    """A dataset whose windows need something large, or the device, such as a codec.

    Any dataset that can be pickled is read by worker processes, if `data.num_workers` asks for some. Of one that has
    `reader`, they get this alone, and the process that trains makes the windows of what they read.
    """

    @property
    def reader(self) -> WindowReader | None:
        """What workers get; None if they get the whole dataset."""
        ...

    def kept(self, index: int) -> bool:
        """Whether the dataset has kept a window, so that no file need be read for it."""
        ...

    def finish(self, index: int, read: Any) -> Any:
        """Make a window of what `reader[index]` returned; the same as `self[index]`."""
        ...
