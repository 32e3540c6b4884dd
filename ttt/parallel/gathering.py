"""Tensors that are split among processes, made whole. All of the processes take part."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from ttt.parallel.world import World


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split; a tensor that is not split is returned itself."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for dim in range(len(placements)):  # one after the other: PyTorch would too, and warn of it
        placements[dim] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def is_split(tensor: Tensor) -> bool:
    """Whether processes may have parts of it."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that is split, split as `other` is; all of the processes take part, if it is not so already."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor) or not isinstance(other, DTensor) or tensor.placements == other.placements:
        return tensor
    return tensor.redistribute(placements=other.placements)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be split."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of_one_like(part: Tensor, other: Tensor) -> Tensor:
    """The tensor of which every process has such a part as its own part of `other`, split as that; nothing is sent."""
    from torch.distributed.tensor import DTensor

    if not isinstance(other, DTensor):
        return part
    mesh, placements = other.device_mesh, other.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=other.shape, stride=other.stride())


def split_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, split as `other` is; itself if that is not split, or it is itself."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(other.device)
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


def on_first(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the first process, on its CPU if they were split; nothing on the others."""
    found = {}
    for name, tensor in tensors.items():
        made = whole(tensor.detach())
        if world.first:
            found[name] = made if made is tensor or world.alone else made.cpu()
    return found


def rows_on_first(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Tensors whose rows `[B,…]` are those of each process, as tensors of all rows on the first; nothing on the others.

    Every process has as many rows.
    """
    if world.data_size == 1:
        return dict(tensors) if world.first else {}
    found = {}
    for name, tensor in tensors.items():
        parts = [torch.empty_like(tensor) for _ in range(world.data_size)]
        dist.all_gather(parts, tensor.contiguous(), group=world.data_group)
        if world.first:
            found[name] = torch.cat(parts)
    return found
