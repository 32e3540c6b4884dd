"""The place of this process among those of a run: which rows it reads, and how all of them agree.

`World()` is one process alone. Nothing about it costs anything: it sums nothing, asks nobody and changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from ttt.errors import OtherProcessError
from ttt.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
DIMENSIONS = ("replicate", "shard", "tensor")
"""Of the mesh, the last one innermost: neighbouring ranks share a tensor."""


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them. Ranks count over `replicate`, then `shard`, then `tensor`."""

    rank: int = 0
    """This process among all, from 0."""
    layout: Layout = field(default_factory=Layout)
    mesh: DeviceMesh | None = field(default=None, compare=False)
    """Of the dimensions `replicate, shard, tensor`; None if this process is alone."""

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.layout.size

    @property
    def replicate(self) -> int:
        """How many copies of the parameters there are."""
        return self.layout.replicate

    @property
    def shard(self) -> int:
        """Among how many processes a copy's parameters are split."""
        return self.layout.shard

    @property
    def tensor(self) -> int:
        """Among how many processes the heads of a TTT layer are split."""
        return self.layout.tensor

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Among how many processes the rows of a batch are divided."""
        return self.layout.data_size

    @property
    def data_rank(self) -> int:
        """Which part of the rows this process reads, from 0; the processes of one tensor group read the same."""
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """Which part of the heads this process has, from 0."""
        return self.rank % self.tensor

    def rows(self, count: int) -> slice:
        """The rows that this process reads of a global batch of `count`: equal consecutive parts by `data_rank`.

        Raises:
            ValueError: they cannot be divided evenly.
        """
        if count % self.data_size:
            raise ValueError(f"{count} rows cannot be divided evenly among {self.data_size} processes")
        own = count // self.data_size
        return slice(self.data_rank * own, (self.data_rank + 1) * own)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes that read different rows, in each of them; alone the tensor itself.

        Its gradient is not tracked.
        """
        if self.data_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.data_group)
        return total

    def any(self, flag: bool) -> bool:
        """Whether one of all processes says so. Each must ask; alone it is the flag itself."""
        if self.alone:
            return flag
        said = torch.tensor([int(flag)], dtype=torch.int32)  # on the CPU, so that no GPU is waited for
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said.item())

    def gather(self, value: T) -> list[T]:
        """What each process says, by rank, in each of them; alone its own."""
        if self.alone:
            return [value]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in each of them; alone what it makes. The others wait.

        Raises:
            OtherProcessError: in the others, if it could not be made; the first raises what happened.
        """
        if self.alone:
            return make()
        sent: list[Any] = [None, None]
        if self.first:
            try:
                sent[0] = make()
            except BaseException as error:
                dist.broadcast_object_list([None, (str(error), getattr(error, "exit_code", 1))])
                raise
        dist.broadcast_object_list(sent)
        if sent[1] is not None:
            raise OtherProcessError(*sent[1])
        return cast("T", sent[0])

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The processes that read different rows, with this one's part of the heads."""
        if self.mesh is None:
            return None
        if self.tensor == 1:
            return dist.group.WORLD
        return self.mesh[DIMENSIONS[:2]]._flatten("data").get_group()
