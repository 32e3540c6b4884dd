"""Normalisations and the gradient of the inner loss.

A normalisation answers with a direction, and if there is none, at a vector of zeros or of one value throughout, it
answers as its formula says, and its derivative is taken to be 0. The formula's own is `1/ε` or `1/√ε` there, between
1e3 and 1e12: no property of the data, but of the number that keeps a division from being one by zero. Zero tokens
(padding, dropped text) stand exactly there while biases are zero, and through a few mini-batches these factors
multiply. Everywhere else derivatives are the formulas' own. `torch.where` in front of a formula does that: what it
leaves out gets no gradient, be that finite or not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NORMALIZE_EPS = 1e-12
"""Length below which `normalize` divides by this instead; that of `torch.nn.functional.normalize`."""


def normalize(x: Tensor) -> Tensor:
    """`x / max(‖x‖, ε)` over the last dimension: `torch.nn.functional.normalize`, with derivative 0 if ‖x‖ < ε.

    Numbers are the same bit for bit, in float32 and float64; narrower types are computed in float32, where ε is not 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    short = torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True) < NORMALIZE_EPS
    # The formula does not see short vectors, so that its second derivative is finite too.
    unit = F.normalize(torch.where(short, 1, wide), dim=-1, eps=NORMALIZE_EPS)
    return torch.where(short, wide.detach() / NORMALIZE_EPS, unit).to(x.dtype)


def is_constant(x: Tensor) -> Tensor:
    """Which vectors are one value throughout but for rounding, `[…, F]` to `[…, 1]`; never one with a NaN in it."""
    least, most = x.detach().aminmax(dim=-1, keepdim=True)
    return most - least <= 4 * torch.finfo(x.dtype).eps * torch.maximum(least.abs(), most.abs())


def _followed(x: Tensor) -> Tensor:
    """`x`, whose constant vectors get no gradient; for a layer norm."""
    return torch.where(is_constant(x), x.detach(), x) if x.requires_grad else x


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """`γ (x − μ) / √(σ² + ε) + β` over the last dimension, with the biased variance.

    Args:
        x: `[…, F]`; a constant vector gets no gradient.
        gamma: scale, broadcastable to `x`.
        beta: shift, broadcastable to `x`.
        eps: inside the root.
    """
    x = _followed(x)
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return gamma * (centred * torch.rsqrt(variance + eps)) + beta


def outer_layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """`layer_norm` by PyTorch's own operation, for whole vectors `[…, D]` with `γ [D]` and `β [D]`."""
    return F.layer_norm(_followed(x), x.shape[-1:], gamma, beta, eps=eps)


def inner_loss(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """`½ ‖LN(z) − target‖²` for each token: `[…, F]` to `[…]`, with `z = f_W(k)` and `target = v − k`.

    Source: TTT-LM (arXiv 2407.04620), section 2.7, with the layer norm and residual of its equation for f.
    """
    return 0.5 * (layer_norm(z, gamma, beta, eps=eps) - target).square().sum(dim=-1)


def inner_loss_gradient(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """The gradient of `inner_loss` with respect to `z`, `[…, F]`, in closed form.

    With `x̂ = (z − μ) / σ` and `g = (γ x̂ + β − target) γ`: `(g − mean(g) − x̂ mean(g x̂)) / σ`. It is what a token
    teaches, a number of the forward pass, so that a constant `z` too has the formula's, `1/σ = 1/√ε`. Its own
    derivative with respect to such a `z` is 0: the formula's, `γ²/ε`, is a curvature at which no rate of the
    literature makes a stable step. It is linear in β and the target, so that their derivatives are the formula's,
    unless such a `z` teaches nothing at all, as a token of zeros: then they are 0 too.
    """
    followed = _followed(z)
    silent = is_constant(z) if followed is not z else None
    z = followed
    centred = z - z.mean(dim=-1, keepdim=True)
    inverse_deviation = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    normalised = centred * inverse_deviation
    gradient = (gamma * normalised + beta - target) * gamma
    gradient = (
        gradient - gradient.mean(dim=-1, keepdim=True) - normalised * (gradient * normalised).mean(dim=-1, keepdim=True)
    )
    error = gradient * inverse_deviation
    return error if silent is None else torch.where(silent & is_zero(error), 0, error)


def is_zero(x: Tensor) -> Tensor:
    """Which vectors are zero, `[…, F]` to `[…, 1]`."""
    return (x == 0).all(dim=-1, keepdim=True)


def normalize_target(target: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """`γ (t − μ) / (std(t) + ε) + β` over the last dimension: the normalised target `v − k`, `[…, F]`.

    Unlike the inner layer norm it has the unbiased standard deviation and ε outside the root, as published in
    TTT-Video (`ln_reconstruction_target` of its `ttt/models/ssm/ttt_layer.py`).
    """
    target = _followed(target)
    mean = target.mean(dim=-1, keepdim=True)
    # Not torch.std: its gradient at a constant target is NaN, also where what follows is left out.
    width = target.shape[-1]
    variance = (target - mean).square().sum(dim=-1, keepdim=True) / max(width - 1, 1)
    positive = variance > 0
    deviation = torch.where(positive, torch.where(positive, variance, 1).sqrt(), 0)
    return gamma * ((target - mean) / (deviation + eps)) + beta


def rms_norm(x: Tensor, *, eps: float) -> Tensor:
    """`x / √(mean(x²) + ε)` over the last dimension, without parameters; a vector of zeros gets no gradient."""
    if x.requires_grad:
        x = torch.where(is_zero(x), x.detach(), x)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
