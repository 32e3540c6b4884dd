"""The operation `ttt::triton_minibatches`: its registration, and the functions that call it.

It computes what `ttt::minibatches` computes. Importing this module imports no Triton; the first call does.

Shape letters: see `ttt.ops.fused`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.constants import Precision
from ttt.ops.fused.layout import Problem, room_between_passes
from ttt.ops.fused.registration import Answered, Gradients, register, wants_gradient

Weights = tuple[Tensor, ...]


def _forward(problem: Problem, *, keep: bool) -> Answered:
    if problem.dims.depth == 1:
        from ttt.ops.triton.linear import linear_forward

        return linear_forward(problem, keep=keep)
    from ttt.ops.triton.mlp_forward import mlp_forward

    return mlp_forward(problem, keep=keep)


def _backward(problem: Problem, saved: list[Tensor], d_answers: Tensor, d_following: list[Tensor]) -> Gradients:
    if problem.dims.depth == 1:
        from ttt.ops.triton.linear_backward import linear_backward

        return linear_backward(problem, saved, d_answers, d_following)
    from ttt.ops.triton.mlp_backward import mlp_backward

    return mlp_backward(problem, saved, d_answers, d_following)


def _room_between_passes(problem: Problem) -> list[Tensor]:
    """The weights that open groups after the first: every mini-batch's, if the group size is 0."""
    return room_between_passes(problem.dims, problem.group_size or 1, problem.q_BHNCF)


register(
    "triton_minibatches",
    _forward,
    _backward,
    _room_between_passes,
    refusal="the kernels have no second derivative; set TTT_OPS=generic and scan_checkpoint_group_size: 0 for one",
)


def triton_scan(
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
    """Answer N closed mini-batches, each learning for the next: `ttt.ops.mlp.mlp_scan` in Triton.

    Arguments and results are the same as for `mlp_scan`.

    Raises:
        RuntimeError: in backward, if a gradient of a gradient is asked for.
    """
    last_NB = scale_C[-1:, None] if closed_NB is None else torch.where(closed_NB, scale_C[-1], 0)
    inputs = (q_BHNCF, k_BHNCF, target_BHNCF, rate_BHNC1, gamma_H1F, beta_H1F, scale_C[None], last_NB)
    group_size = 0 if group_size >= q_BHNCF.shape[2] else group_size
    keep = wants_gradient(inputs, weights)
    z, following, _ = torch.ops.ttt.triton_minibatches(
        *inputs, list(weights), [], causal, eps, group_size, precision, keep
    )
    return z, tuple(following)


def triton_minibatch(
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
    """Answer one mini-batch that may be open on either side: `ttt.ops.fused.fused_minibatch` in Triton.

    Arguments and results are the same as for `fused_minibatch`.
    """
    tokens = tuple(x.unsqueeze(2) for x in (q_BHCF, k_BHCF, target_BHCF, rate_BHC1))
    inputs = (*tokens, gamma_H1F, beta_H1F, scale_BC)
    before = list(gradients or ())
    keep = wants_gradient(inputs, (*weights, *before))
    z, summed, _ = torch.ops.ttt.triton_minibatches(
        *inputs, None, list(weights), before, causal, eps, 0, precision, keep
    )
    return z.squeeze(2), tuple(summed)
