"""Registers an implementation of mini-batches with PyTorch: one operation for the compiler and for autograd.

An implementation is two functions of a `Problem`, one for each pass. Whatever it keeps between the passes goes through
`save_for_backward`, so that checkpoints, offloading and other hooks find it.

Shape letters: see `ttt.ops.fused`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from ttt.ops.autocast import no_autocast
from ttt.ops.fused.layout import Problem, room_for_tokens
from ttt.ops.precision import multiplying
from ttt.ops.replay import replayed

_INPUTS = (
    "Tensor q, Tensor k, Tensor target, Tensor rate, Tensor gamma, Tensor beta, Tensor scale, Tensor? last, "
    "Tensor[] weights, Tensor[] gradients"
)
_SETTINGS = "bool causal, float eps, int group_size, str precision"
_SCHEMA = f"({_INPUTS}, {_SETTINGS}, bool keep) -> (Tensor, Tensor[], Tensor[])"
_BACKWARD_SCHEMA = (
    f"(Tensor d_answers, Tensor[] d_following, {_INPUTS}, Tensor[] kept, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[])"
)

Answered = tuple[Tensor, list[Tensor], list[Tensor]]
"""`z [B,H,N,C,F]`, the weights after the last mini-batch (or the sums of one that stays open), and the kept tensors."""
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]
"""The gradients of all tensors of a `Problem`, in its order."""


def register(
    name: str,
    forward: Callable[..., Answered],
    backward: Callable[[Problem, list[Tensor], Tensor, list[Tensor]], Gradients],
    room_between_passes: Callable[[Problem], list[Tensor]],
    *,
    refusal: str,
) -> tuple[Callable[..., Answered], Callable[..., Gradients]]:
    """Register `ttt::<name>` and `ttt::<name>_backward`.

    Args:
        name: of the operation.
        forward: called as `forward(problem, keep=…)`; autocast is off, and products are in the problem's precision.
        backward: called as `backward(problem, kept, d_answers, d_following)`, with the same settings.
        room_between_passes: allocates tensors of the shapes and types that `forward` keeps.
        refusal: what to say where a gradient of a gradient is asked for.

    Returns:
        The two passes as they are registered.
    """
    # Registered part by part: `custom_op` would import the compiler at the first call, which takes some seconds.
    library.define(f"ttt::{name}", _SCHEMA)
    library.define(f"ttt::{name}_backward", _BACKWARD_SCHEMA)

    def compute(*inputs: Any) -> Answered:
        problem, keep = Problem(*inputs[:-1]), inputs[-1]
        q, precision = problem.q_BHNCF, problem.precision
        with no_autocast(q), multiplying(q, precision):  # `learn` may be called with other settings
            return forward(problem, keep=keep)

    def compute_backward(d_answers: Tensor, d_following: list[Tensor], *inputs: Any) -> Gradients:
        problem, kept = _parted_inputs(inputs)
        q, precision = problem.q_BHNCF, problem.precision
        with no_autocast(q), multiplying(q, precision):  # and so may backward
            return backward(problem, kept, d_answers, d_following)

    def run(*inputs: Any) -> Answered:
        return replayed(f"ttt::{name}", compute, *inputs)

    def run_backward(*inputs: Any) -> Gradients:
        return replayed(f"ttt::{name}_backward", compute_backward, *inputs)

    def shapes(*inputs: Any) -> Answered:
        problem, keep = Problem(*inputs[:-1]), inputs[-1]
        kept = room_between_passes(problem) if keep else []
        return room_for_tokens(problem.q_BHNCF), [w.new_empty(w.shape) for w in problem.weights], kept

    library.impl(f"ttt::{name}", "default", run)
    library.impl(f"ttt::{name}_backward", "default", run_backward)
    library.register_fake(f"ttt::{name}", shapes)
    library.register_fake(f"ttt::{name}_backward", _shapes_of_gradients)
    operation = getattr(torch.ops.ttt, f"{name}_backward")

    def differentiate(ctx: Any, d_answers: Tensor | None, d_following: list[Tensor | None], _: Any) -> tuple[Any, ...]:
        return _differentiate(operation, ctx, d_answers, d_following)

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(refusal)

    library.register_autograd(f"ttt::{name}", differentiate, setup_context=_save)
    library.register_autograd(f"ttt::{name}_backward", refuse)
    return run, run_backward


def wants_gradient(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether a backward may follow, for which tensors must be kept."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *weights))


def _parted_inputs(inputs: tuple[Any, ...]) -> tuple[Problem, list[Tensor]]:
    """The problem and the kept tensors; the schema has the kept ones between tensors and settings."""
    return Problem(*inputs[:10], *inputs[11:]), inputs[10]


def _shapes_of_gradients(d_answers: Tensor, d_following: list[Tensor], *inputs: Any) -> tuple[Any, ...]:
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    problem, _ = _parted_inputs(inputs)
    q, last = problem.q_BHNCF, problem.last_NB
    return (
        *(room_for_tokens(x) for x in problem[:4]),
        *(like(x) for x in problem[4:7]),
        q.new_empty((q.shape[2], q.shape[0])) if last is None else like(last),
        [like(w) for w in problem.weights],
        [like(g) for g in problem.gradients],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Answered) -> None:
    problem, kept = Problem(*inputs[:-1]), output[2]
    weights, gradients = problem.weights, problem.gradients
    ctx.save_for_backward(*problem[:8], *weights, *gradients, *kept)
    ctx.counts = len(weights), len(gradients), len(kept)
    ctx.settings = problem[10:]
    # Kept tensors get no gradient; do not allocate zeros for it.
    ctx.set_materialize_grads(False)


def _differentiate(
    operation: Any, ctx: Any, d_answers: Tensor | None, d_following: list[Tensor | None]
) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)  # read once: under a checkpoint each tensor is available one time
    tensors, weights, gradients, kept = (list(itertools.islice(saved, count)) for count in (8, *ctx.counts))
    *d_inputs, d_last, d_weights, d_gradients = operation(
        torch.zeros_like(tensors[0]) if d_answers is None else d_answers,
        [torch.zeros_like(w) if d is None else d for d, w in zip(d_following, weights, strict=True)],
        *(*tensors, weights, gradients, kept, *ctx.settings),
    )
    unasked = (None,) * (len(ctx.settings) + 1)
    return (*d_inputs, None if tensors[-1] is None else d_last, d_weights, d_gradients, *unasked)
