"""Inner models in dual form, by autograd: MLPs of any number of layers; a linear model has one.

Per-token weights are never materialised. `mlp_minibatch` runs one mini-batch, `mlp_scan` a sequence of mini-batches
that close.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.ops.constants import Precision
from ttt.ops.norm import inner_loss_gradient, layer_norm
from ttt.ops.precision import product
from ttt.ops.scan import scan

Weights = tuple[Tensor, ...]

_ROOT = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def gelu_gradient(x: Tensor) -> Tensor:
    """The derivative of `gelu`, elementwise, in differentiable operations."""
    squared = x.square()
    t = torch.tanh(_ROOT * x * (1 + _CUBIC * squared))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * _ROOT * (1 + 3 * _CUBIC * squared)


def mlp_model(weights: Weights, x: Tensor, precision: Precision = "ieee") -> Tensor:
    """The inner model: affine maps with GELU between them, `[B,H,C,F]` to `[B,H,C,F]`."""
    for index in range(0, len(weights), 2):
        x = product(x, weights[index], precision) + weights[index + 1]
        if index + 2 < len(weights):
            x = gelu(x)
    return x


def key_pass(
    weights: Weights,
    k_BHCF: Tensor,
    target_BHCF: Tensor,
    gamma_H1F: Tensor,
    beta_H1F: Tensor,
    *,
    eps: float,
    precision: Precision = "ieee",
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the keys forward through the inner model, and the inner loss's errors back.

    Returns:
        For each layer its input `X [B,H,C,in]`, and the gradient of the inner loss with respect to its output before
        GELU, `E [B,H,C,out]`. The gradient of the layer's weights is `Xᵀ (η ⊙ E)`.
    """
    depth = len(weights) // 2
    inputs, outputs = [k_BHCF], []
    for layer in range(depth):
        outputs.append(product(inputs[layer], weights[2 * layer], precision) + weights[2 * layer + 1])
        if layer + 1 < depth:
            inputs.append(gelu(outputs[layer]))
    errors = [inner_loss_gradient(outputs[-1], target_BHCF, gamma_H1F, beta_H1F, eps=eps)]
    for layer in range(depth - 1, 0, -1):
        pulled = product(errors[0], weights[2 * layer].mT, precision)
        errors.insert(0, pulled * gelu_gradient(outputs[layer - 1]))
    return inputs, errors


def mlp_minibatch(
    weights: Weights,
    gradients: Weights | None,
    q_BHCF: Tensor,
    k_BHCF: Tensor,
    target_BHCF: Tensor,
    rate_BHC1: Tensor,
    gamma_H1F: Tensor,
    beta_H1F: Tensor,
    scale_C1: Tensor,
    *,
    causal: bool,
    eps: float,
    precision: Precision = "ieee",
) -> tuple[Tensor, Weights]:
    """Answer the queries of a mini-batch and sum its gradients, all taken at the weights that opened it.

    Token i answers with `W − s_i (G + Σ_{j≤i} η_j ∇ℓ_j(W))` if the update is causal, else with the sum over every j.
    The dual form is applied layer by layer: the queries' dual answer at layer l gives their input to layer l + 1.

    Args:
        weights: `(W1, b1, W2, b2, …)` that opened the mini-batch; `W [B,H,in,out]`, `b [B,H,1,out]`.
        gradients: `G`, what the mini-batch has summed before these tokens, in the shapes of `weights`; or None.
        q_BHCF: queries.
        k_BHCF: keys.
        target_BHCF: `v − k`.
        rate_BHC1: `η`, the inner learning rate of each token and head; zero for a token that must not teach.
        gamma_H1F: scale of the inner layer norm.
        beta_H1F: shift of the inner layer norm.
        scale_C1: `s`, step size by position, broadcastable to `[B,H,C,1]`.
        causal: whether a token learns only from the tokens up to itself.
        eps: of the layer norm.
        precision: in what the operands of products are multiplied.

    Returns:
        `z [B,H,C,F]`, `q + LN(Z̄)`, and the summed gradients `G + Σ_j η_j ∇ℓ_j(W)` in the shapes of `weights`.

    Source: TTT-LM (arXiv 2407.04620), appendix A; TTT-Video (arXiv 2504.05298), its `ops/ttt_mlp.py`.
    """
    inputs, errors = key_pass(weights, k_BHCF, target_BHCF, gamma_H1F, beta_H1F, eps=eps, precision=precision)
    x = q_BHCF
    summed: list[Tensor] = []
    for layer, (given, error) in enumerate(zip(inputs, errors, strict=True)):
        pair = slice(2 * layer, 2 * layer + 2)
        before = None if gradients is None else gradients[pair]
        step, gradient = _dual_step(x, given, rate_BHC1 * error, before, causal=causal, precision=precision)
        summed += gradient
        w, b = weights[pair]
        x = product(x, w, precision) + b - scale_C1 * step
        if layer + 1 < len(inputs):
            x = gelu(x)
    return q_BHCF + layer_norm(x, gamma_H1F, beta_H1F, eps=eps), tuple(summed)


def _dual_step(
    x: Tensor, given: Tensor, taught: Tensor, gradients: Weights | None, *, causal: bool, precision: Precision
) -> tuple[Tensor, Weights]:
    """How one layer's update changes its answers to the queries `x`; also returns the layer's summed gradients."""
    attention_BHCC = product(x, given.mT, precision) + 1
    if causal:
        attention_BHCC = attention_BHCC.tril()
    step = product(attention_BHCC, taught, precision)
    gradient_w, gradient_b = _gradient(given, taught, precision)
    if gradients is not None:
        step = step + product(x, gradients[0], precision) + gradients[1]
        gradient_w = gradient_w + gradients[0]
        gradient_b = gradient_b + gradients[1]
    return step, (gradient_w, gradient_b)


def _gradient(given: Tensor, taught: Tensor, precision: Precision) -> Weights:
    """The summed gradients of one layer's weights and biases, of its inputs and `η ⊙ E`."""
    return product(given.mT, taught, precision), taught.sum(dim=-2, keepdim=True)


def move(weights: Weights, gradients: Weights, scale: Tensor, where: Tensor | None = None) -> Weights:
    """The weights that open the next mini-batch, `W − s_C G`; a row for which `where [B]` is false keeps its `W`."""
    if where is not None:
        scale = torch.where(where, scale, 0)[:, None, None, None]
    return tuple(w - scale * g for w, g in zip(weights, gradients, strict=True))


def mlp_scan(
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
    """Answer N closed mini-batches, each learning for the next: `W_{n+1} = W_n − s_C G_n`.

    Args:
        weights: `(W1, b1, …)` that open the first mini-batch, `W [B,H,in,out]` and `b [B,H,1,out]`.
        q_BHNCF: queries.
        k_BHNCF: keys.
        target_BHNCF: `v − k`.
        rate_BHNC1: `η`, the inner learning rates.
        gamma_H1F: scale of the inner layer norm.
        beta_H1F: shift of the inner layer norm.
        scale_C: `s`, step size by position.
        closed_NB: which rows' mini-batches close; the others do not change the weights. None means all.
        causal: whether a token learns only from the tokens up to itself; if not, steps are of one size, the last of
            `scale_C`, and a mini-batch that does not close teaches its own queries nothing.
        eps: of the layer norm.
        group_size: mini-batches that backward recomputes at a time; 0, or at least N, keeps everything.
        precision: in what the operands of products are multiplied.

    Returns:
        `z [B,H,N,C,F]` and the weights after the last mini-batch.
    """

    def step(carry: Weights, x: dict[str, Any], gamma: Tensor, beta: Tensor, scale_C: Tensor) -> tuple[Weights, Tensor]:
        q, k, target, rate = x["tokens"]
        if not causal:  # every token answers with the weights after the mini-batch
            inputs, errors = key_pass(carry, k, target, gamma, beta, eps=eps, precision=precision)
            pairs = (_gradient(given, rate * error, precision) for given, error in zip(inputs, errors, strict=True))
            moved = move(carry, tuple(itertools.chain(*pairs)), scale_C[-1], x.get("closed"))
            return moved, q + layer_norm(mlp_model(moved, q, precision), gamma, beta, eps=eps)
        z, gradients = mlp_minibatch(
            carry, None, q, k, target, rate, gamma, beta, scale_C[:, None], causal=causal, eps=eps, precision=precision
        )
        return move(carry, gradients, scale_C[-1], x.get("closed")), z

    tokens = (q_BHNCF, k_BHNCF, target_BHNCF, rate_BHNC1)
    columns: dict[str, Any] = {"tokens": tuple(x.movedim(2, 0) for x in tokens)}
    if closed_NB is not None:
        columns["closed"] = closed_NB
    weights, z_NBHCF = scan(step, weights, columns, consts=(gamma_H1F, beta_H1F, scale_C), group_size=group_size)
    return z_NBHCF.movedim(0, 2), weights
