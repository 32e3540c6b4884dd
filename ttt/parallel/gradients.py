"""Gradients of parameters that are split among processes in different ways: their norm, and that copies are equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from ttt.parallel.gathering import own_part
from ttt.parallel.world import World

TENSOR = "tensor"
"""The dimension of the mesh over which heads are shared out."""


def clip_(gradients: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a total norm of at most `max_norm`; returns the norm before. Every process calls it.

    A number counts once, in however many processes it is: of a gradient that is split every part counts, of one that
    every process has whole, one of them.
    """
    norm = total_norm(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as `torch.nn.utils.clip_grad_norm_` has it
    with torch.no_grad():
        for gradient in gradients:
            own_part(gradient).mul_(factor.to(gradient.dtype))
    return norm


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm over all numbers of gradients that may be split; see `clip_`."""
    squares: dict[tuple[str, ...], list[Tensor]] = {}
    groups: dict[tuple[str, ...], list[dist.ProcessGroup]] = {}
    for gradient in gradients:
        over = _split_over(gradient)
        key = _names(over)
        groups[key] = over
        squares.setdefault(key, []).append(torch.linalg.vector_norm(own_part(gradient.detach()).float()).double() ** 2)
    total: Tensor | None = None
    for key in sorted(squares):  # in the same order everywhere
        part = torch.stack(squares[key]).sum()
        for group in groups[key]:
            dist.all_reduce(part, group=group)
        total = part if total is None else total + part
    assert total is not None
    return total.sqrt().float()


def _split_over(tensor: Tensor) -> list[dist.ProcessGroup]:
    """The groups of processes among which a tensor is split."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return []
    mesh = tensor.device_mesh
    return [mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def is_zero(gradient: Tensor) -> bool:
    """Whether a gradient that may be split is zero in all of its parts. Every process calls it, and waits."""
    count = own_part(gradient.detach()).count_nonzero()
    for group in _split_over(gradient):
        dist.all_reduce(count, group=group)
    return not bool(count)


def _names(groups: Iterable[dist.ProcessGroup]) -> tuple[str, ...]:
    return tuple(str(group.group_name) for group in groups)


def make_equal_(gradients: Iterable[Tensor], world: World) -> None:
    """Give the processes that share heads out the same gradients of what each of them has whole: those of the first.

    They have computed them alike, from the same rows. On a GPU two of them may still differ in the last digit, where
    sums are added up in no fixed order, and from there on the copies would drift apart. Heads' gradients stay.
    """
    if world.tensor == 1:
        return
    assert world.mesh is not None
    group = world.mesh[TENSOR].get_group()
    first = dist.get_global_rank(group, 0)
    sent = [
        dist.broadcast(own_part(gradient), first, group=group, async_op=True)
        for gradient in gradients
        if not _is_of_heads(gradient)
    ]
    for work in sent:
        work.wait()


def _is_of_heads(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor) and TENSOR in (tensor.device_mesh.mesh_dim_names or ())
