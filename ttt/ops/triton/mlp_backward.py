"""TTT-MLP backward in Triton: each group forward again, then back with the tiles of the weights' gradients in hand.

Groups run from the last to the first. The forward steps write the weights that open the group's mini-batches, `Z_0`,
`y_0`, `D_0`, `Z_1` and `y_1`. Then launch n of the walk finishes mini-batch n + 1 and begins n. The programs are those
of forward, and again there is one sum of `C·F` numbers over tiles between beginning and finishing, `dE_1`. With the
numbers of `docs/backward.md`, `ρ_l = X̃_l dW̃'_l`, and tiles as in `mlp_forward`:

    begin n          dB_1 = dy_1 E_1ᵀ,  dx = dy_1 W_1ᵀ + (dB_1 ⊙ κ) X,  dy_0 = dx ⊙ φ'(y_0)           (13) to (17)
                     dB_0's part = dy_0 E_0ᵀ;  parts of dη and ds from dκ = dB_0 ⊙ A_0 + dB_1 ⊙ A_1     (14)
                     dE_0 = (κ ⊙ A_0)ᵀ dy_0 + c η ⊙ ρ_0                                               (15), (18)
                     dE_1's part = (κ ⊙ A_1)ᵀ dy_1 + c η ⊙ ρ_1 + (dE_0 ⊙ φ'(Z_0)) W_1                 (15), (18), (19)
    who comes last   dE_1, the sum of its parts
    finish n         dr, dZ_1 from dE_1;  dt, dγ, dβ by the first tile                                (20), (25)
                     dX = (κ ⊙ dB_1)ᵀ x + c η ⊙ E_1 dW_1'ᵀ + dZ_1 W_1ᵀ                                (16), (18), (21)
                     dZ_0 = dE_0 ⊙ D_0 ⊙ φ''(Z_0) + dX ⊙ φ'(Z_0)                                      (19), (21)
                     parts of dK = c η ⊙ E_0 dW_0'ᵀ + dZ_0 W_0ᵀ and of dQ = dy_0 W_0ᵀ                 (18), (23)
                     dW_0 = dW_0' + Kᵀ dZ_0 + Qᵀ dy_0                                                 (22), in place
                     dW_1 = dW_1' + Xᵀ dZ_1 + xᵀ dy_1 + (dE_0 ⊙ φ'(Z_0))ᵀ E_1
    who comes last   dQ, dK, dη, dc and ds: the sums of the parts, and (dB_0 ⊙ κ) K, (dB_0 ⊙ κ)ᵀ Q     (16), (24)

Attention is computed twice, as `A` and as `Aᵀ`, so that no product's result is transposed. A non-causal mini-batch
takes the same way, with a mask of ones: it answers with `W − s G`, which is what (10) says. `dγ`, `dβ` and `ds` of a
pair are added to by one program of each launch, so that every sum has one order.

A group of g mini-batches is `2 (g + 1)` launches. Traffic of one mini-batch: forward `2 S`, the walk `3.5 S` (`dW` read
and written, `W_0` read once and `W_1` twice); and the parts, `5·(HIDDEN/h)·C·F` numbers written and read once more.
Group size 0 keeps the weights that open every mini-batch, so that this pass writes none. Room for each pair and each
mini-batch of a group: `S + 3 C·HIDDEN + 2 C·F` numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttt.ops.fused.layout import Problem, room_between_passes, room_for_tokens
from ttt.ops.triton.forms import Form
from ttt.ops.triton.mlp_run import SHIPPED, Kept, Place, Sizes, Steps, dense, form
from ttt.ops.triton.mlp_walk import mlp_walk

_SPILLED: dict[tuple[int, int, str], int | dict[int, int]] = {
    (128, 1, "tf32"): 768, (128, 16, "ieee"): 1_536, (128, 16, "tf32"): 768, (128, 16, "bf16"): 768,
    (64, 16, "tf32"): {100: 32}, (64, 64, "ieee"): {80: 63_872, 90: 8_192, 100: 8_192},
    (64, 64, "tf32"): {80: 5_888, 90: 2_560, 100: 640}, (64, 64, "bf16"): {80: 4_608, 90: 3_072, 100: 640},
}  # fmt: skip
"""Bytes that a thread of the walk may spill, by F, C and precision; others spill none.

It has four tiles of weights and their gradients in turn, and beside them up to ten numbers of every token and column:
more than 255 registers at F 128, and far more with 64 tokens. What spills stays in the cache of the multiprocessor.
`ieee` has no matrix unit, and gathers the inner width of its factors beside them: with 64 tokens it is slow.
"""
_SPILLED_OPEN = {80: 1_536, 100: 16}
"""The same of an open mini-batch at F 128, C 16."""


def mlp_backward(
    problem: Problem, saved: list[Tensor], d_answers: Tensor, d_following: list[Tensor]
) -> tuple[Any, ...]:
    """The gradients of an inner model of two layers.

    Args:
        problem: the arguments of `mlp_forward`.
        saved: the tensors that it kept.
        d_answers: the gradient of its answers, `[B,H,N,C,F]`.
        d_following: the gradients of the weights or sums that it returned.

    Returns:
        Gradients of all tensors of the problem, in its order; those of tokens in the memory order of `room_for_tokens`.
    """
    steps = Steps(problem)
    n, group_size = steps.dims.steps, problem.group_size or steps.dims.steps
    walk = _Walk(problem, steps, d_answers, d_following, min(group_size, n))
    like = problem.q_BHNCF
    kept = Kept.room(steps.dims, min(group_size, n), like)
    again = room_between_passes(steps.dims._replace(steps=min(group_size, n)), 1, like) if problem.group_size else saved
    for start in range((n - 1) // group_size * group_size, -1, -group_size):
        stop = min(start + group_size, n)
        first = steps.given if not start else Place.joined(saved, start // group_size - 1)

        def opening(n: int, start: int = start, stop: int = stop, first: Place = first) -> Place:
            return first if n in (start, stop) else Place.joined(again, n - start - 1)

        last_update = stop - 1 if problem.group_size else start
        steps.run(start, stop, opening, last_update=last_update, kept=kept)
        walk.back(start, stop, opening, kept)
    return walk.gradients()


class _Walk:
    """The walk from the last mini-batch to the first, and the gradients that it has found so far."""

    def __init__(
        self, problem: Problem, steps: Steps, d_answers: Tensor, d_following: list[Tensor], slots: int
    ) -> None:
        self.problem, self.steps, self.slots = problem, steps, slots
        dims, sizes, like = steps.dims, steps.sizes, problem.q_BHNCF
        self.d_answers = dense(d_answers)
        self.next = Place.of(d_following)
        self.d_weights, self.d_before = (
            Place.of([torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in tensors]) if tensors else self.next
            for tensors in (problem.weights, problem.gradients)
        )
        self.d_tokens = [room_for_tokens(x) for x in problem[:4]]
        self.d_gamma, self.d_beta = (like.new_zeros((dims.pairs, sizes.width)) for _ in range(2))
        self.d_scale = like.new_zeros((dims.pairs, sizes.size))
        self.d_push = like.new_empty((dims.steps, dims.pairs))

        def parts(columns: int, *slots: int) -> Tensor:
            return like.new_empty((*slots, sizes.tiles, dims.pairs, sizes.size, columns))

        shape = 2, dims.pairs, sizes.size
        self.left = [like.new_empty((*shape, columns)) for columns in (sizes.hidden, sizes.hidden, sizes.width)]
        """`dE_0`, `dy_0` and `dE_1`, as beginning a mini-batch leaves them for finishing it."""
        self.parts = [*(parts(sizes.width) for _ in range(3)), parts(sizes.size, 2), parts(4, 2)]
        self.tickets = torch.zeros(dims.pairs, dtype=torch.int32, device=like.device)

    def back(self, start: int, stop: int, opening: Callable[[int], Place], kept: Kept) -> None:
        """Go back through the mini-batches of a group, of which `kept` holds what the kernels read."""
        steps, sizes, dims = self.steps, self.steps.sizes, self.steps.dims
        for n in range(stop - 1, start - 2, -1):
            begin, finish = n >= start, n + 1 < stop
            begun, finished = (opening(min(max(m, start), stop - 1)) for m in (n, n + 1))
            mlp_walk[(dims.pairs, sizes.tiles)](
                steps.q, steps.k, steps.target, steps.rate, steps.gamma, steps.beta, steps.scale, steps.last,
                self.d_answers, begun.w1, finished.w0, finished.w1, *self.next[:4], *self.d_weights[:4],
                *steps.before[:4], *self.d_before[:4], *kept, *self.left, *self.parts, self.tickets,
                *self.d_tokens, self.d_gamma, self.d_beta, self.d_scale, self.d_push,
                n, dims.steps, dims.heads, dims.pairs, self.slots, begun.bias, finished.bias, **steps.strides,
                **steps.shapes, EPS=steps.eps, LEAST=steps.least, PRECISION=steps.precision, CAUSAL=steps.causal,
                FINISH=finish, BEGIN=begin, CLOSES=steps.closes, OPENED=steps.opened,
                num_warps=sizes.warps, num_stages=2,
            )  # fmt: skip
            if finish:
                self.next = self.d_weights

    def gradients(self) -> tuple[Any, ...]:
        """All gradients, once every group has been walked."""
        problem, dims = self.problem, self.steps.dims
        shape = dims.batch, dims.heads
        d_gamma, d_beta = (
            x.view(*shape, 1, -1).sum_to_size(problem.gamma_H1F.shape) for x in (self.d_gamma, self.d_beta)
        )
        d_scale = self.d_scale.view(*shape, -1).sum(1).sum_to_size(problem.scale_BC.shape)
        d_last = -self.d_push.view(dims.steps, *shape).sum(2)
        if problem.last_NB is not None:
            d_last = d_last.sum_to_size(problem.last_NB.shape)
        d_weights = [x.view(w.shape) for x, w in zip(self.d_weights[:4], problem.weights, strict=True)]
        d_before = [x.view(g.shape) for x, g in zip(self.d_before[:4], problem.gradients, strict=False)]
        return (*self.d_tokens, d_gamma, d_beta, d_scale, d_last, d_weights, d_before)


def forms() -> list[Form]:
    """Steps in the middle of a group, which do the most, and an open mini-batch's."""
    found = []
    middle = {"FINISH": True, "BEGIN": True, "CLOSES": True, "OPENED": False}
    for width, size, causal, precision in SHIPPED:
        sizes = Sizes.of_shape(width, 4 * width, size)
        name = f"F {width}, C {size}, {'causal' if causal else 'non-causal'}, {precision}"
        constants = {**middle, "CAUSAL": causal, "PRECISION": precision}
        found.append(form(f"MLP walk, {name}", mlp_walk, sizes, constants, _SPILLED.get((width, size, precision), 0)))
    opened = {**middle, "BEGIN": False, "CLOSES": False, "OPENED": True, "CAUSAL": True, "PRECISION": "tf32"}
    found.append(
        form("MLP walk, F 128, C 16, open, tf32", mlp_walk, Sizes.of_shape(128, 512, 16), opened, _SPILLED_OPEN)
    )
    return found
