"""One mini-batch of TTT-MLP in dual form, for inner models of any number of layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.ops.norm import inner_loss_gradient, layer_norm

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


def mlp_model(weights: Weights, x: Tensor) -> Tensor:
    """The inner model: affine maps with GELU between, `[B,H,C,F]` to `[B,H,C,F]`."""
    for index in range(0, len(weights), 2):
        x = x @ weights[index] + weights[index + 1]
        if index + 2 < len(weights):
            x = gelu(x)
    return x


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
) -> tuple[Tensor, Weights]:
    """`ttt.ops.linear.linear_minibatch` for an MLP: the dual form applied layer by layer.

    Layer l of the per-token MLP maps `X̄_l` to `Z̄_l = X̄_l W_l + b_l − s ⊙ (((X̄_l X_lᵀ + 1) ⊙ mask ⊙ ηᵀ) g_l + …)`,
    where `X_l` is what the keys give as its input and `g_l` the inner gradient at its output.

    Args:
        weights: `(W1, b1, W2, b2, …)`, each `W [B,H,in,out]` and `b [B,H,1,out]`.
        gradients: what the mini-batch has summed before these tokens, in the shapes of `weights`; or None.
        q_BHCF: queries.
        k_BHCF: keys.
        target_BHCF: `v − k`.
        rate_BHC1: `η`, the inner learning rate of each token and head; zero for a token that must not teach.
        gamma_H1F: scale of the inner layer norm.
        beta_H1F: shift of the inner layer norm.
        scale_C1: `s`, step size by position, broadcastable to `[B,H,C,1]`.
        causal: whether a token learns only from those up to itself.
        eps: of the layer norm.

    Returns:
        `z [B,H,C,F]` and the summed gradients in the shapes of `weights`.

    Source: TTT-LM (arXiv 2407.04620), appendix A; TTT-Video (arXiv 2504.05298), its `ops/ttt_mlp.py`.
    """
    depth = len(weights) // 2
    # What the keys give: the input of every layer, its output before GELU, then the gradients backwards.
    inputs, outputs = [k_BHCF], []
    for layer in range(depth):
        outputs.append(inputs[layer] @ weights[2 * layer] + weights[2 * layer + 1])
        if layer + 1 < depth:
            inputs.append(gelu(outputs[layer]))
    errors = [inner_loss_gradient(outputs[-1], target_BHCF, gamma_H1F, beta_H1F, eps=eps)]
    for layer in range(depth - 1, 0, -1):
        errors.insert(0, errors[0] @ weights[2 * layer].mT * gelu_gradient(outputs[layer - 1]))

    x = q_BHCF
    summed: list[Tensor] = []
    for layer in range(depth):
        w, b = weights[2 * layer], weights[2 * layer + 1]
        taught = rate_BHC1 * errors[layer]
        attention_BHCC = x @ inputs[layer].mT + 1
        if causal:
            attention_BHCC = attention_BHCC.tril()
        step = attention_BHCC @ taught
        gradient_w = inputs[layer].mT @ taught
        gradient_b = taught.sum(dim=-2, keepdim=True)
        if gradients is not None:
            step = step + x @ gradients[2 * layer] + gradients[2 * layer + 1]
            gradient_w = gradient_w + gradients[2 * layer]
            gradient_b = gradient_b + gradients[2 * layer + 1]
        summed += [gradient_w, gradient_b]
        x = x @ w + b - scale_C1 * step
        if layer + 1 < depth:
            x = gelu(x)
    return q_BHCF + layer_norm(x, gamma_H1F, beta_H1F, eps=eps), tuple(summed)
