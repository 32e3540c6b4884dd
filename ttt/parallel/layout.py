"""How the processes of a run share its work: `train.parallel` with its `auto` sizes made numbers. Needs no torch.

replicate   groups with whole copies of the parameters, which read different rows
shard       processes that split the parameters of a copy among them, and read different rows too
tensor      processes that split the heads of the TTT layers among them, and read the same rows
"""

from __future__ import annotations

from dataclasses import dataclass

from ttt.config.schema import ParallelConfig, TrainConfig
from ttt.errors import ConfigError
from ttt.machine import processes_launched


@dataclass(frozen=True)
class Layout:
    """How many processes do what."""

    replicate: int = 1
    """Copies of the parameters, each for different rows."""
    shard: int = 1
    """Processes that split the parameters of a copy among them, and read different rows too."""
    tensor: int = 1
    """Processes that split the heads of the TTT layers among them, and read the same rows."""

    @property
    def size(self) -> int:
        """All processes."""
        return self.replicate * self.shard * self.tensor

    @property
    def data_size(self) -> int:
        """Among how many processes the rows of a batch are divided."""
        return self.replicate * self.shard

    def in_words(self) -> str:
        """The sizes above 1, as `replicate 2, shard 4`."""
        sizes = {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor}
        return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one process"


def layout_of(parallel: ParallelConfig, processes: int) -> Layout:
    """The layout of `train.parallel` for a number of processes; an `auto` size takes all that the others leave.

    Raises:
        ValueError: the sizes do not make this number; the message says how many they make.
    """
    replicate, shard, tensor = parallel.replicate, parallel.shard, parallel.tensor
    if replicate == "auto":
        others = (1 if shard == "auto" else shard) * tensor
        replicate = _left(processes, others)
    if shard == "auto":
        shard = _left(processes, replicate * tensor)
    layout = Layout(replicate, shard, tensor)
    if layout.size != processes:
        auto = "auto" in (parallel.replicate, parallel.shard)
        raise ValueError(f"the sizes make {'a multiple of ' if auto else ''}{layout.size} processes")
    return layout


def launched_layout(train: TrainConfig) -> Layout:
    """The layout of the processes that were started, this one alone or those of a launcher.

    Raises:
        ConfigError: `train.parallel`, `train.batch_size` or `train.optimizer` does not fit their number.
    """
    count = processes_launched()
    try:
        layout = layout_of(train.parallel, count)
    except ValueError as error:
        started = "this is one process" if count == 1 else f"{count} processes were started"
        raise ConfigError(
            f"train.parallel: {error}, but {started}; start as many with --nproc or torchrun, or write other sizes"
        ) from None
    cannot = uneven(train, layout)
    if cannot:
        raise ConfigError(f"train.batch_size: {cannot}; write a multiple of {layout.data_size}")
    split = needs_whole_matrices(train, layout)
    if split:
        raise ConfigError(f"train.parallel: {split}; write {NOT_SPLIT}")
    return layout


def planned_layout(parallel: ParallelConfig) -> Layout | None:
    """The layout that a config asks for, whatever is started; None if that decides about one of its sizes."""
    if parallel.replicate == "auto" or parallel.shard == "auto":
        return None
    return Layout(parallel.replicate, parallel.shard, parallel.tensor)


def _left(processes: int, others: int) -> int:
    """What is left for an `auto` size: 1 if the others do not divide the processes, which then do not match."""
    return processes // others if processes % others == 0 else 1


NO_HEADS = "processes that share heads share those of TTT layers, and no layer has TTT"
NOT_SPLIT = "optimizer: adamw, or parallel: {shard: 1, tensor: 1}"
NOT_COMPILED = "TTT layers whose heads are shared out among processes are not compiled"


def uneven_heads(heads: int, processes: int) -> str | None:
    """Why so many heads of a TTT layer cannot be shared out among so many processes; None if they can."""
    if heads % processes == 0:
        return None
    return f"the {heads} heads of a TTT layer cannot be divided evenly among {processes} processes"


def needs_whole_matrices(train: TrainConfig, layout: Layout) -> str | None:
    """Why the optimiser cannot update parameters that this layout splits; None if it can, or none is split."""
    if train.optimizer == "adamw" or layout.shard * layout.tensor == 1:
        return None
    needs = {"muon": "orthogonalises whole matrices", "adamw_8bit": "scales moments by blocks of whole tensors"}
    return f"optimizer: {train.optimizer} {needs[train.optimizer]}, and {layout.in_words()} splits them"


def uneven(train: TrainConfig, layout: Layout) -> str | None:
    """What is wrong if the rows of a batch cannot be divided evenly; None if they can."""
    if train.batch_size % layout.data_size == 0:
        return None
    return (
        f"the {train.batch_size} {'row' if train.batch_size == 1 else 'rows'} of a forward pass cannot be divided "
        f"evenly among {layout.data_size} processes ({layout.in_words()})"
    )
