"""Normalisations and the gradient of the inner loss."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """`γ (x − μ) / √(σ² + ε) + β` over the last dimension, with the biased variance.

    Args:
        x: `[…, F]`.
        gamma: scale, broadcastable to `x`.
        beta: shift, broadcastable to `x`.
        eps: inside the root.
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return gamma * (centred * torch.rsqrt(variance + eps)) + beta


def inner_loss(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """`½ ‖LN(z) − target‖²` for each token: `[…, F]` to `[…]`, with `z = f_W(k)` and `target = v − k`.

    Source: TTT-LM (arXiv 2407.04620), section 2.7, with the layer norm and residual of its equation for f.
    """
    return 0.5 * (layer_norm(z, gamma, beta, eps=eps) - target).square().sum(dim=-1)


def inner_loss_gradient(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """The gradient of `inner_loss` with respect to `z`, `[…, F]`, in closed form.

    With `x̂ = (z − μ) / σ` and `g = (γ x̂ + β − target) γ`: `(g − mean(g) − x̂ mean(g x̂)) / σ`.
    """
    centred = z - z.mean(dim=-1, keepdim=True)
    inverse_deviation = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    normalised = centred * inverse_deviation
    gradient = (gamma * normalised + beta - target) * gamma
    gradient = (
        gradient - gradient.mean(dim=-1, keepdim=True) - normalised * (gradient * normalised).mean(dim=-1, keepdim=True)
    )
    return gradient * inverse_deviation


def normalize_target(target: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """`γ (t − μ) / (std(t) + ε) + β` over the last dimension: the normalised target `v − k`, `[…, F]`.

    Unlike the inner layer norm it has the unbiased standard deviation and ε outside the root, as published in
    TTT-Video (`ln_reconstruction_target` of its `ttt/models/ssm/ttt_layer.py`).
    """
    mean = target.mean(dim=-1, keepdim=True)
    # Not torch.std: its gradient at a constant target is NaN, and padding is constant.
    width = target.shape[-1]
    variance = (target - mean).square().sum(dim=-1, keepdim=True) / max(width - 1, 1)
    positive = variance > 0
    deviation = torch.where(positive, torch.where(positive, variance, 1).sqrt(), 0)
    return gamma * ((target - mean) / (deviation + eps)) + beta


def rms_norm(x: Tensor, *, eps: float) -> Tensor:
    """`x / √(mean(x²) + ε)` over the last dimension, without parameters."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
