"""The operation `ttt::minibatches`: the order of its mini-batches, its registration, and the functions that call it.

Shape letters: see `ttt.ops.fused`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ttt.ops.constants import BLOCK, Precision
from ttt.ops.fused.backward import Sums, backward_chunk
from ttt.ops.fused.forward import forward_chunk
from ttt.ops.fused.layout import (
    Block,
    Common,
    Kept,
    Problem,
    join,
    joined,
    parted,
    room_between_passes,
    room_for_tokens,
)
from ttt.ops.fused.pages import in_large_pages
from ttt.ops.fused.registration import Answered, Gradients, register, wants_gradient
from ttt.ops.fused.rooms import BackwardScratch, BackwardViews, ForwardViews, Scratch

Weights = tuple[Tensor, ...]
Views = TypeVar("Views")

# --- forward ---


def _run_forward(problem: Problem, *, keep: bool) -> Answered:
    """Answer all mini-batches: lay out one block after the other, and run each in chunks."""
    q, group_size = problem.q_BHNCF, problem.group_size
    common = Common.of(problem)
    dims = common.dims
    answers = room_for_tokens(q)
    shown, queries = answers.permute(2, 0, 1, 3, 4), q.movedim(2, 0)
    everything = keep and not group_size
    saved = room_between_passes(dims, group_size, q) if keep else []
    block_size = dims.block(min(group_size or BLOCK, dims.steps))
    chunk = dims.chunk(q.device, block_size, keep=everything)
    scratch = Scratch(dims, chunk, q)
    block = Block.room(dims, block_size, q)
    kept = Kept.of(saved, dims) if everything else Kept.room(dims, chunk, q, keep=False)
    in_large_pages(saved)
    opening = [w[0] for w in kept.weights_MPJO]
    join(problem.weights, opening)
    views_of = _views(lambda block, kept: ForwardViews(dims, block, kept, scratch), block, kept, again=not everything)
    places = _Places(common, kept, everything=everything)
    for first, stop in _parts(0, dims.steps, group_size or dims.steps):
        if keep and first:
            for x, w in zip(saved, opening, strict=True):
                x[first // group_size - 1] = w[:, : x.shape[2]]
        for start, end in _parts(first, stop, block_size):
            block.part(0, end - start).lay_out(problem, common, start)
            for a, b in _parts(start, end, chunk):
                views = views_of(a - start, b - start, a if everything else 0)
                normed = forward_chunk(common, views, places.after(b, views), keep=everything)
                torch.add(queries[a:b], normed.unflatten(1, (dims.batch, dims.heads)), out=shown[a:b])
    return answers, parted(dims, places.last), saved


class _Places:
    """Where forward writes weights: those after each chunk, and what the operation returns.

    Args:
        common: of the problem.
        kept: of all mini-batches, or of one chunk.
        everything: whether it is of all.
    """

    def __init__(self, common: Common, kept: Kept, *, everything: bool) -> None:
        dims = common.dims
        self._kept_MPJO = kept.weights_MPJO
        self._in_place = common.closes and not everything
        self._follow = everything and not dims.dual
        self._steps = dims.steps
        apart = not common.closes or (everything and dims.dual)
        place = 0 if self._in_place else -1
        self.last = [torch.empty_like(w[0]) if apart else w[place] for w in kept.weights_MPJO]
        """The weights after the last mini-batch, or the sums of one that stays open."""

    def after(self, stop: int, views: ForwardViews) -> list[Tensor] | None:
        """Where the chunk that ends at a mini-batch writes; None if the weights after it are among those kept.

        In place these are the very tensors that the chunk's updates begin with, so that nothing copies them first.
        """
        if self._follow:
            return None
        if self._in_place:
            return [w[0] for w in views.weights_PJO]
        return self.last if stop == self._steps else [w[stop] for w in self._kept_MPJO]


def _views(make: Callable[[Block, Kept], Views], block: Block, kept: Kept, *, again: bool) -> Callable[..., Views]:
    """Return a function that makes the views of mini-batches `a … b` of the block, with memory in `kept` from `row` on.

    With `again` it makes them once for each place. If everything is kept, no place is used twice.
    """
    dual = block.coefficient_MPCC.shape[-1] > 0

    def at(a: int, b: int, row: int) -> Views:
        return make(block.part(a, b), kept.part(row, row + b - a, dual=dual))

    return functools.cache(at) if again else at


def _parts(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]


# --- backward ---


class _Backward:
    """One backward pass over all mini-batches: the last block first, and in each block the last chunk first."""

    def __init__(self, problem: Problem, saved: list[Tensor], d_following: list[Tensor]) -> None:
        self.problem, self.saved = problem, saved
        self.common = Common.of(problem)
        dims, q = self.common.dims, problem.q_BHNCF
        self.sums = Sums(self.common, joined(dims, d_following))
        self.block_size = min(problem.group_size or BLOCK, dims.steps)
        self.chunk = dims.chunk(q.device, self.block_size, keep=True)
        self.block = Block.room(dims, self.block_size, q)
        again = problem.group_size > 0
        self.kept = Kept.room(dims, self.block_size, q) if again else Kept.of(saved, dims)
        if again:
            in_large_pages(self.kept.flat())
        # The views hold tensors, not this object: a reference cycle would keep the memory until garbage collection.
        scratch = Scratch(dims, self.chunk, q)
        scratch_back = BackwardScratch(dims, self.chunk, scratch)
        self.views_of = _views(
            lambda block, kept: ForwardViews(dims, block, kept, scratch), self.block, self.kept, again=again
        )
        self.views_back_of = _views(
            lambda block, kept: BackwardViews(dims, block, kept, scratch_back), self.block, self.kept, again=again
        )

    def run(self, d_answers: Tensor) -> Gradients:
        """All gradients, in the order of the schema."""
        problem, common, sums = self.problem, self.common, self.sums
        dims, pushes_NP11 = common.dims, common.constants.pushes_NP11
        shape = dims.batch, dims.heads
        d_tokens = [room_for_tokens(x) for x in problem[:4]]
        shown = [x.permute(2, 0, 1, 3, 4) for x in d_tokens]
        d_pushes = torch.empty_like(pushes_NP11)
        d_answers = d_answers.movedim(2, 0)
        for start in range((dims.steps - 1) // self.block_size * self.block_size, -1, -self.block_size):
            stop = min(start + self.block_size, dims.steps)
            self.block.part(0, stop - start).lay_out(problem, common, start)
            if problem.group_size:
                self._recompute(start, stop)
            for a, b in reversed(_parts(start, stop, self.chunk)):
                views = self.views_back_of(a - start, b - start, a - start if problem.group_size else a)
                d_chunk = d_answers[a:b].reshape(b - a, dims.pairs, dims.size, -1)
                found = backward_chunk(common, views, pushes_NP11[a:b], d_chunk, sums)
                for whole, part in zip(shown, found[:4], strict=True):
                    whole[a:b] = part.unflatten(1, shape)
                d_pushes[a:b] = found.pushes_MP11
        d_q, d_k, d_target, d_rate = d_tokens
        of_state = parted(dims, sums.weights_PJO), parted(dims, sums.gradients_PJO)
        return (d_q, d_k, d_target, d_rate, *self._summed(d_pushes), *of_state)

    def _recompute(self, start: int, stop: int) -> None:
        """Run a group forward again from the weights that opened it."""
        group, weights_MPJO = start // self.problem.group_size, self.kept.weights_MPJO
        opening = [w[0] for w in weights_MPJO]
        if start:
            for x, w in zip(self.saved, opening, strict=True):
                w[:, : x.shape[2]] = x[group - 1]
                w[:, x.shape[2] :] = 0
        else:
            join(self.problem.weights, opening)
        for a, b in _parts(start, stop, self.chunk):
            to = [w[b - start] for w in weights_MPJO] if b < stop and self.common.dims.dual else None
            forward_chunk(self.common, self.views_of(a - start, b - start, a - start), to, keep=True)

    def _summed(self, d_pushes_NP11: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of what all tokens share, in the shapes of the inputs: `dγ`, `dβ`, `ds`, `ds_C`."""
        problem, sums, dims = self.problem, self.sums, self.common.dims
        shape = dims.batch, dims.heads
        d_gamma, d_beta = (
            x.view(*shape, 1, -1).sum_to_size(norm.shape)
            for x, norm in ((sums.gamma_P1F, problem.gamma_H1F), (sums.beta_P1F, problem.beta_H1F))
        )
        d_scale = sums.scale_PC1.view(*shape, -1).sum(1).sum_to_size(problem.scale_BC.shape)
        d_last = -d_pushes_NP11.view(dims.steps, *shape).sum(2)
        if problem.last_NB is not None:
            d_last = d_last.sum_to_size(problem.last_NB.shape)
        return d_gamma, d_beta, d_scale, d_last


def _run_backward(problem: Problem, saved: list[Tensor], d_answers: Tensor, d_following: list[Tensor]) -> Gradients:
    return _Backward(problem, saved, d_following).run(d_answers)


RUN, RUN_BACKWARD = register(
    "minibatches",
    _run_forward,
    _run_backward,
    lambda problem: room_between_passes(problem.dims, problem.group_size, problem.q_BHNCF),
    refusal="the fused scan has no second derivative; set TTT_OPS=generic and scan_checkpoint_group_size: 0 for one",
)
"""The operation's two passes as they are registered."""


# --- the functions that call it ---


def fused_scan(
    weights: Weights,
    q_BHNCF: Tensor,
    k_BHNCF: Tensor,
    target_BHNCF: Tensor,
    rate_BHNC1: Tensor,
    gamma_H1F: Tensor,
    beta_H1F: Tensor,
    scale_C: Tensor,
    closed_NB: Tensor | None = None,
    *,
    causal: bool,
    eps: float,
    group_size: int,
    precision: Precision = "ieee",
) -> tuple[Tensor, Weights]:
    """Answer N closed mini-batches, each learning for the next: `ttt.ops.mlp.mlp_scan`, fused.

    Arguments and results are the same as for `mlp_scan`.

    Raises:
        RuntimeError: in backward, if a gradient of a gradient is asked for.
    """
    last_NB = scale_C[-1:, None] if closed_NB is None else torch.where(closed_NB, scale_C[-1], 0)
    inputs = (q_BHNCF, k_BHNCF, target_BHNCF, rate_BHNC1, gamma_H1F, beta_H1F, scale_C[None], last_NB)
    group_size = 0 if group_size >= q_BHNCF.shape[2] else group_size
    keep = wants_gradient(inputs, weights)
    z, following, _ = torch.ops.ttt.minibatches(*inputs, list(weights), [], causal, eps, group_size, precision, keep)
    return z, tuple(following)


def fused_minibatch(
    weights: Weights,
    gradients: Weights | None,
    q_BHCF: Tensor,
    k_BHCF: Tensor,
    target_BHCF: Tensor,
    rate_BHC1: Tensor,
    gamma_H1F: Tensor,
    beta_H1F: Tensor,
    scale_BC: Tensor,
    *,
    causal: bool,
    eps: float,
    precision: Precision = "ieee",
) -> tuple[Tensor, Weights]:
    """Answer the queries of one mini-batch that may be open on either side: `ttt.ops.mlp.mlp_minibatch`, fused.

    Arguments and results are the same as for `mlp_minibatch`, except the step sizes, `[B,C]` or `[1,C]`.
    """
    tokens = tuple(x.unsqueeze(2) for x in (q_BHCF, k_BHCF, target_BHCF, rate_BHC1))
    inputs = (*tokens, gamma_H1F, beta_H1F, scale_BC)
    before = list(gradients or ())
    keep = wants_gradient(inputs, (*weights, *before))
    z, summed, _ = torch.ops.ttt.minibatches(*inputs, None, list(weights), before, causal, eps, 0, precision, keep)
    return z.squeeze(2), tuple(summed)
