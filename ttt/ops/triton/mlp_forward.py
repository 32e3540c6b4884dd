"""TTT-MLP forward as Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.fused.layout import Problem, room_between_passes, room_for_tokens
from ttt.ops.triton.forms import Form
from ttt.ops.triton.mlp_run import SHIPPED, Place, Sizes, Steps, form
from ttt.ops.triton.mlp_step import mlp_step

_SPILLED: dict[tuple[int, int, str], int] = {}
"""Bytes that a thread may spill, by `F`, `C` and precision."""


def mlp_forward(problem: Problem, *, keep: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Answer all mini-batches of an inner model of two layers.

    Args:
        problem: the operation's arguments; in a non-causal one the step sizes of a row are equal.
        keep: whether backward will follow.

    Returns:
        `z [B,H,N,C,F]` in the memory order of `room_for_tokens`; the weights after the last mini-batch, or the sums of
        one that stays open, in the shapes of `problem.weights`; and the kept tensors: `W̃_l [groups − 1,P,J,O]` that
        open the groups after the first; group size 0 counts as 1.

    Raises:
        ValueError: the kernels have no form for these sizes.
    """
    steps = Steps(problem)
    dims, group_size = steps.dims, problem.group_size or 1
    answers = room_for_tokens(problem.q_BHNCF)
    following = Place.of([torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in problem.weights])
    saved = room_between_passes(dims, group_size, problem.q_BHNCF) if keep else []

    def opening(n: int) -> Place:
        if not n:
            return steps.given
        if keep and n < dims.steps and n % group_size == 0:
            return Place.joined(saved, n // group_size - 1)
        return following

    steps.run(0, dims.steps, opening, last_update=dims.steps, answers=answers)
    return answers, list(following[:4]), saved


def forms() -> list[Form]:
    """Steps in the middle of a group, as backward runs them again, which do the most, and an open mini-batch's."""
    found = []
    middle = {"FINISH": True, "BEGIN": True, "UPDATE": True, "CLOSES": True, "OPENED": False, "KEEP": True}
    for width, size, causal, precision in SHIPPED:
        sizes = Sizes.of_shape(width, 4 * width, size)
        name = f"F {width}, C {size}, {'causal' if causal else 'non-causal'}, {precision}"
        constants = {**middle, "CAUSAL": causal, "PRECISION": precision}
        spilled = _SPILLED.get((width, size, precision), 0)
        found.append(form(f"MLP step, {name}", mlp_step, sizes, constants, spilled))
    opened = {**constants, "BEGIN": False, "CLOSES": False, "OPENED": True, "CAUSAL": True}
    found.append(form("MLP step, F 128, C 16, open, tf32", mlp_step, Sizes.of_shape(128, 512, 16), opened, 0))
    return found
