"""TTT-MLP backward in Triton: each group forward again, then back with the tiles of the weights' gradients in hand.

Groups run from the last to the first. The forward steps write the weights that open the group's mini-batches, `Z_0`,
`y_0`, `D_0`, `Z_1`, `E_1` and `dy_1`. Then launch n of the walk finishes mini-batch n + 1 and begins n, across the
borders of groups too. The programs are those of forward, and again there is one sum of `C·F` numbers over tiles between
beginning and finishing, `dE_1`. With the numbers of `docs/backward.md`, `ρ_l = X̃_l dW̃'_l`, and tiles as in
`mlp_forward`, launch n of a mini-batch of one block does

    begin n, causal  dB_1 = dy_1 E_1ᵀ,  dx = dy_1 W_1ᵀ + (dB_1 ⊙ κ) X,  dy_0 = dx ⊙ φ'(y_0)           (13) to (17)
                     dB_0's part = dy_0 E_0ᵀ;  parts of dη and ds from dκ = dB_0 ⊙ A_0 + dB_1 ⊙ A_1     (14)
      not causal     dx = dy_1 W_1'ᵀ,  dy_0 = dx ⊙ φ'(y_0),  dQ's part = dy_0 W_0'ᵀ                   (16'), (17)
                     dW_1' += xᵀ dy_1,  dW_0' += Qᵀ dy_0                                              (12')
      both           dE_0 = [(κ ⊙ A_0)ᵀ dy_0] + c η ⊙ ρ_0                                             (15), (18)
                     dE_1's part = [(κ ⊙ A_1)ᵀ dy_1] + c η ⊙ ρ_1 + (dE_0 ⊙ φ'(Z_0)) W_1               (15), (18), (19)
    who comes last   dE_1, the sum of its parts; dr and dZ_1 from it; dt, dγ, dβ                      (20), (25)
    finish n         dX = [(κ ⊙ dB_1)ᵀ x] + c η ⊙ E_1 dW_1'ᵀ + dZ_1 W_1ᵀ                              (16), (18), (21)
                     dZ_0 = dE_0 ⊙ D_0 ⊙ φ''(Z_0) + dX ⊙ φ'(Z_0)                                      (19), (21)
                     parts of dK = c η ⊙ E_0 dW_0'ᵀ + dZ_0 W_0ᵀ and of dQ = [dy_0 W_0ᵀ]               (18), (23)
                     dW_0 = dW_0' + Kᵀ dZ_0 + [Qᵀ dy_0]                                               (22), in place
                     dW_1 = dW_1' + Xᵀ dZ_1 + [xᵀ dy_1] + (dE_0 ⊙ φ'(Z_0))ᵀ E_1
    who comes last   dQ, dK, dη, dc and ds: the sums of the parts, and [(dB_0 ⊙ κ) K, (dB_0 ⊙ κ)ᵀ Q]  (16), (24)

where brackets hold what causal mini-batches alone have. Attention is computed twice, as `A` and as `Aᵀ`, so that no
product's result is transposed. One token alone answers with the weights after it, as do all of a mini-batch that is
not causal. While such a one is open, they answer with `W − s G'`: (12') goes to `dG'` as `−x̃ᵀ (s ⊙ dy)`, and `W` has it
as in (22). `dγ`, `dβ` and `ds` of a pair are added to by one program of each launch, so that every sum has one order,
whatever the groups are.

**Blocks.** Tokens are walked 16 at a time. With `G_b` the sums of gradients up to block b, a causal block's tokens
answer with `−s ⊙ (x̃ G_{b−1})` and, among themselves, with attention. Back, queries go from the first block to the
last, with `G` in registers: `dx −= s ⊙ (dy G_{b−1}ᵀ)`, `ds −= ⟨dy, x̃ G_{b−1}⟩`. Keys go from the last to the first:
block b sees `dG_b = c dW̃' − Σ_{i>b} x̃_iᵀ (s_i ⊙ dy_i)` where one block alone sees `c dW̃'`. What an open mini-batch had
before is the `G` of its first block, and its gradient the `dG` that is left behind it.

**Traffic.** `W_1` of n + 1 is not read: n, whose `W_1` is at hand, has taught it `c X̃ᵀ (η ⊙ E_1)`. So this is read and
written of one mini-batch, in sizes S of the weights. Forward again 2: `W` read, the next written. In the walk 3: `dW`
read and written, `W_0` of n + 1 and `W_1` of n read. The ends of a sequence add 1.5 (3 if it is not causal); a test
counts it. Beside it the parts, `5·(HIDDEN/h)·C·F` numbers written and read once more. Group size 0 keeps the weights
that open every mini-batch, so that this pass writes none.

A group of g mini-batches is `2 g + 1` launches, and the last finishes the first mini-batch: `N` more than forward's and
one. Room for each pair and each mini-batch of a group, and one more: `S + 3 C·HIDDEN + 3 C·F` numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt.ops.fused.layout import Problem, room_between_passes, room_for_tokens
from ttt.ops.triton.forms import Form
from ttt.ops.triton.mlp_run import BLOCK, SHIPPED, STAGES, Kept, Place, Sizes, Steps, dense, form
from ttt.ops.triton.mlp_walk import mlp_walk

_SPILLED: dict[tuple[int, int, bool, str], dict[int, int]] = {
    (128, 1, False, "ieee"): {80: 492, 90: 444, 100: 548},
    (128, 1, False, "tf32"): {80: 36, 90: 48, 100: 84},
    (128, 1, False, "bf16"): {80: 116, 90: 100, 100: 104},
    (128, 16, True, "ieee"): {80: 808, 90: 616, 100: 868},
    (128, 16, True, "tf32"): {80: 416, 90: 224, 100: 160},
    (128, 16, True, "bf16"): {80: 220, 90: 144, 100: 124},
    (128, 16, False, "ieee"): {80: 732, 90: 772, 100: 876},
    (128, 16, False, "tf32"): {80: 4, 90: 4, 100: 64},
    (128, 16, False, "bf16"): {80: 100, 90: 56, 100: 120},
    (128, 64, True, "ieee"): {80: 768, 90: 524, 100: 824},
    (128, 64, True, "tf32"): {80: 1468, 90: 364, 100: 736},
    (128, 64, True, "bf16"): {80: 2368, 90: 772, 100: 1272},
    (128, 64, False, "ieee"): {100: 52},
    (128, 64, False, "tf32"): {80: 68},
    (128, 64, False, "bf16"): {80: 128},
    (64, 1, False, "tf32"): {80: 4, 100: 28},
    (64, 1, False, "bf16"): {80: 36, 100: 8},
    (64, 16, True, "ieee"): {100: 20},
    (64, 16, True, "tf32"): {80: 4, 100: 40},
    (64, 16, True, "bf16"): {80: 20, 90: 4, 100: 116},
    (64, 16, False, "bf16"): {80: 56, 90: 52},
    (64, 64, True, "ieee"): {80: 12, 90: 32, 100: 76},
    (64, 64, True, "tf32"): {80: 312, 90: 8, 100: 60},
    (64, 64, True, "bf16"): {80: 512, 90: 152, 100: 280},
    (64, 64, False, "ieee"): {90: 8},
}
"""Bytes that a thread of the walk may spill, by F, C, whether it is causal, precision and architecture; others
spill none.

It has up to five tiles of weights and their gradients at once, and of the factors of its products, whose inner width is
F, each warp has a part in registers. What spills stays in the cache of the multiprocessor. A causal mini-batch of 64
tokens at F 128 carries sums of gradients beside the weights.
"""
_SPILLED_OPEN: dict[int, int] = {80: 108, 90: 20}
"""The same of an open mini-batch at F 128, C 16."""
_SPILLED_BEGUN: dict[int, int] = {80: 116, 100: 4}
"""The same of one that is not causal and open, at F 64, C 64."""


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
    walk = _Walk(problem, saved, d_answers, d_following)
    n, group_size = walk.steps.dims.steps, walk.group_size
    for start in range((n - 1) // group_size * group_size, -1, -group_size):
        walk.back(start, min(start + group_size, n))
    walk.launch(-1)
    return walk.gradients()


class _Walk:
    """The walk from the last mini-batch to the first, and the gradients that it has found so far."""

    def __init__(self, problem: Problem, saved: list[Tensor], d_answers: Tensor, d_following: list[Tensor]) -> None:
        self.problem, self.steps, self.saved = problem, Steps(problem), saved
        dims, sizes, like = self.steps.dims, self.steps.sizes, problem.q_BHNCF
        self.group_size = min(problem.group_size or dims.steps, dims.steps)
        # A group's first mini-batch is finished when the group before it has been run.
        self.kept = Kept.room(dims, min(self.group_size + 1, dims.steps), like)
        self.again = room_between_passes(dims._replace(steps=self.group_size), 1, like) if problem.group_size else saved
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
        """`dE_0`, `dy_0` and `dZ_1`, as beginning a mini-batch leaves them for finishing it."""
        self.parts = [
            parts(sizes.width), parts(sizes.width, 2), parts(sizes.width),
            parts(BLOCK if self.steps.causal else 0, 2), parts(4, 2),
        ]  # fmt: skip
        self.tickets = torch.zeros(dims.pairs, dtype=torch.int32, device=like.device)

    def opening(self, n: int) -> Place:
        """The weights that opened a mini-batch of the group at hand, or of a group's first."""
        if not n:
            return self.steps.given
        if n % (self.problem.group_size or 1) == 0:
            return Place.joined(self.saved, n // (self.problem.group_size or 1) - 1)
        return Place.joined(self.again, n % self.group_size - 1)

    def back(self, start: int, stop: int) -> None:
        """Run the mini-batches of a group again, and go back through them as far as all that begins there."""
        last_update = stop - 1 if self.problem.group_size else start
        self.steps.run(
            start, stop, lambda n: self.opening(min(n, stop - 1)),
            last_update=last_update, kept=self.kept, d_answers=self.d_answers,
        )  # fmt: skip
        for n in range(stop - 1, start - 1, -1):
            self.launch(n)

    def launch(self, n: int) -> None:
        """Finish mini-batch n + 1, and begin n."""
        steps, sizes, dims = self.steps, self.steps.sizes, self.steps.dims
        begin, finish = n >= 0, n + 1 < dims.steps
        first, second = self.opening(n + finish), self.opening(n + (not begin))
        mlp_walk[(dims.pairs, sizes.tiles)](
            steps.q, steps.k, steps.target, steps.rate, steps.gamma, steps.beta, steps.scale, steps.last,
            self.d_answers, first.w0, second.w1, *self.next[:4], *self.d_weights[:4],
            *steps.before[:4], *self.d_before[:4], *self.kept, *self.left, *self.parts, self.tickets,
            *self.d_tokens, self.d_gamma, self.d_beta, self.d_scale, self.d_push,
            n, dims.steps, dims.heads, dims.pairs, len(self.kept.hidden), first.bias, second.bias,
            **steps.strides, **steps.shapes, EPS=steps.eps, LEAST=steps.least, PRECISION=steps.precision,
            CAUSAL=steps.causal, FINISH=finish, BEGIN=begin, CLOSES=steps.closes, OPENED=steps.opened,
            num_warps=sizes.warps, num_stages=STAGES,
        )  # fmt: skip
        if finish or not steps.causal:
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
        sizes = Sizes.of_shape(width, 4 * width, size, causal=causal)
        name = f"F {width}, C {size}, {'causal' if causal else 'non-causal'}, {precision}"
        constants = {**middle, "CAUSAL": causal, "PRECISION": precision}
        spilled = _SPILLED.get((width, size, causal, precision), 0)
        found.append(form(f"MLP walk, {name}", mlp_walk, sizes, constants, spilled))
    sizes = Sizes.of_shape(128, 512, 16, causal=True)
    opened = {**middle, "BEGIN": False, "CLOSES": False, "OPENED": True, "CAUSAL": True, "PRECISION": "tf32"}
    found.append(form("MLP walk, F 128, C 16, open, tf32", mlp_walk, sizes, opened, _SPILLED_OPEN))
    sizes = Sizes.of_shape(64, 256, 64, causal=False)
    last = {**middle, "FINISH": False, "CAUSAL": False, "PRECISION": "tf32"}
    found.append(form("MLP walk, F 64, C 64, non-causal, begun only, tf32", mlp_walk, sizes, last))
    opened = {**last, "CLOSES": False, "OPENED": True}
    return [
        *found,
        form("MLP walk, F 64, C 64, non-causal, open, begun only, tf32", mlp_walk, sizes, opened, _SPILLED_BEGUN),
    ]
