"""TTT-MLP forward in Triton: one launch for each mini-batch, over pairs and tiles of the hidden width.

The inner model is `Z_0 = K W_0 + b_0`, `X = φ(Z_0)`, `Z_1 = X W_1 + b_1`, with `W_0 [F,HIDDEN]` and `W_1 [HIDDEN,F]`.
A program has one pair p (a head of a row) and one tile h of the hidden width: `W_0 [F,h]`, `b_0 [h]` and `W_1 [h,F]`.
All that belongs to the hidden layer is the tile's own, so the only sums over tiles are `Z_1` and the answers `y_1`, of
`C·F` numbers each. With the numbers of `docs/backward.md`, launch n does

    finish n − 1     E_0 = (E_1 W_1ᵀ) ⊙ φ'(Z_0)                            (7)
      causal         y_0 = Q W_0 + b_0 + (κ ⊙ (Q Kᵀ + 1)) E_0              (9), (10)
                     y_1's part = φ(y_0) W_1 + (κ ⊙ φ(y_0) Xᵀ) E_1
      not causal     the same with W − s G, by which every token answers, and no attention: y_0 = Q (W_0 − s G_0) + …
                     W' = W + c G,  G_0 = (η K)ᵀ E_0,  G_1 = Xᵀ (η E_1)    (8), in place
    begin n          Z_0 = K W_0 + b_0,  Z_1's part = φ(Z_0) W_1           (1)
    who comes last   of n: Z_1, the sum of the parts, in the tiles' order; E_1 = ι Π(r)    (5), (6)
                     of n − 1: y_1, a sum too; z = Q + LN(y_1)             (11)

`b_1`, and the ones of `A_1 = x̃ X̃ᵀ`, belong to the first tile's part. N mini-batches are N + 1 launches. A mini-batch
that stays open adds `−s (x G)` of the sums `G` before it to the queries, and returns `G + …` in place of `W'`. For
backward the one that comes last goes on from y_1 to `dy_1` (13), and nothing is answered.

Tokens are walked 16 at a time, so that 64 take hardly more registers than 16. A causal block sees the blocks before it
as an open mini-batch sees what came before: by the sum of their gradients, which the tile has anyway.

Nothing of a launch is read by another program of it, except parts by the one that comes last, which a ticket tells: it
waits for nobody, and no number depends on which it is. Weights are written over those that they replace, or where a
group opens, into what is kept; the next launch reads them there.

Room: a program holds its tiles of `W`, of `G`, and some `[16,F]`, in registers: F 128 with 8 warps, `h = 32`, 16
numbers a thread for each tile; causal mini-batches of several blocks have `h = 16`. Traffic of one mini-batch, with
`S = 2 F·HIDDEN` numbers of weights: `2 S`; and the parts, `2·(HIDDEN/h)·C·F` written and read once more, which a cache
holds if pairs are few. Beyond the results it allocates `2 (HIDDEN/h + 1)·C·F + 2 C·HIDDEN` numbers for each pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.fused.layout import Problem, room_between_passes, room_for_tokens
from ttt.ops.triton.forms import Form
from ttt.ops.triton.mlp_run import SHIPPED, Place, Sizes, Steps, form
from ttt.ops.triton.mlp_step import mlp_step


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


_SPILLED: dict[tuple[int, int, bool, str], dict[int, int]] = {
    (128, 1, False, "bf16"): {100: 32},
    (128, 16, True, "tf32"): {80: 60},
    (128, 16, True, "bf16"): {80: 32, 100: 16},
    (128, 64, True, "ieee"): {80: 100, 90: 40, 100: 44},
    (128, 64, True, "tf32"): {80: 360, 90: 16},
    (128, 64, True, "bf16"): {80: 216, 90: 24},
    (128, 64, False, "tf32"): {80: 4},
    (128, 64, False, "bf16"): {80: 8},
    (64, 1, False, "ieee"): {90: 8},
    (64, 64, True, "ieee"): {100: 12},
    (64, 64, True, "bf16"): {100: 4},
}
"""Bytes that a thread of the step may spill, by F, C, whether it is causal, precision and architecture; else none."""


def forms() -> list[Form]:
    """Steps in the middle of a group, as backward runs them again, which do the most, and an open mini-batch's."""
    found = []
    middle = {"FINISH": True, "BEGIN": True, "UPDATE": True, "CLOSES": True, "OPENED": False, "KEEP": True}
    for width, size, causal, precision in SHIPPED:
        sizes = Sizes.of_shape(width, 4 * width, size, causal=causal)
        name = f"F {width}, C {size}, {'causal' if causal else 'non-causal'}, {precision}"
        constants = {**middle, "CAUSAL": causal, "PRECISION": precision}
        spilled = _SPILLED.get((width, size, causal, precision), 0)
        found.append(form(f"MLP step, {name}", mlp_step, sizes, constants, spilled))
    opened = {**middle, "BEGIN": False, "CLOSES": False, "OPENED": True, "CAUSAL": True, "PRECISION": "tf32"}
    sizes = Sizes.of_shape(128, 512, 16, causal=True)
    return [*found, form("MLP step, F 128, C 16, open, tf32", mlp_step, sizes, opened, {80: 252, 90: 16})]
