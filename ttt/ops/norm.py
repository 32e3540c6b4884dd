"""Normalisations and the gradient of the inner loss.

A normalisation returns a direction. A vector of zeros, or of one value throughout, has none: the value there is that of
the formula, but the derivative is set to 0. The formula's derivative would be `1/ε` or `1/√ε`, between 1e3 and 1e12,
which says nothing about the data: it comes from the constant that avoids a division by zero. Zero tokens (padding,
dropped text) are exactly there while biases are zero, and these factors multiply through a few mini-batches. Everywhere
else the derivatives are those of the formulas. To get this, `torch.where` replaces such vectors before the formula: an
input that it replaces gets no gradient, finite or not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NORMALIZE_EPS = 1e-12
"""If a length is below this, `normalize` divides by this instead, as `torch.nn.functional.normalize` does."""


def normalize(x: Tensor) -> Tensor:
    """`x / max(‖x‖, ε)` over the last dimension, with derivative 0 if ‖x‖ < ε.

    In float32 and float64 the values are those of `torch.nn.functional.normalize`, bit for bit. Narrower types are
    computed in float32, because ε would round to 0 in them.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not wide.requires_grad:  # the same values in few operations, as a token of a stream needs them
        return F.normalize(wide, dim=-1, eps=NORMALIZE_EPS).to(x.dtype)
    short = torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True) < NORMALIZE_EPS
    # Replace short vectors before the formula, so that its second derivative is finite too.
    unit = F.normalize(torch.where(short, 1, wide), dim=-1, eps=NORMALIZE_EPS)
    return torch.where(short, wide.detach() / NORMALIZE_EPS, unit).to(x.dtype)


def is_constant(x: Tensor) -> Tensor:
    """Which vectors hold one value throughout, up to rounding, `[…, F]` to `[…, 1]`; false for a vector with a NaN."""
    x = x.detach()
    least, most = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)  # `aminmax` is far slower on a CPU
    return most - least <= 4 * torch.finfo(x.dtype).eps * torch.maximum(least.abs(), most.abs())


def _followed(x: Tensor) -> Tensor:
    """`x`, with the gradient of its constant vectors stopped; for a layer norm."""
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
    """`layer_norm` for whole vectors `[…, D]` with `γ [D]` and `β [D]`, by PyTorch's own operation."""
    return F.layer_norm(_followed(x), x.shape[-1:], gamma, beta, eps=eps)


def inner_loss(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """`½ ‖LN(z) − target‖²` for each token: `[…, F]` to `[…]`, with `z = f_W(k)` and `target = v − k`.

    Source: TTT-LM (arXiv 2407.04620), section 2.7, with the layer norm and residual of its equation for f.
    """
    return 0.5 * (layer_norm(z, gamma, beta, eps=eps) - target).square().sum(dim=-1)


def inner_loss_gradient(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """The gradient of `inner_loss` with respect to `z`, `[…, F]`, in closed form.

    With `x̂ = (z − μ) / σ` and `g = (γ x̂ + β − target) γ`: `(g − mean(g) − x̂ mean(g x̂)) / σ`.

    This gradient is what a token teaches, a value of the forward pass, so it follows the formula for a constant `z`
    too, with `1/σ = 1/√ε`. Its derivative with respect to a constant `z` is 0: the formula would give `γ²/ε`, a
    curvature at which no learning rate of the literature makes a stable step. Its derivatives with respect to β and
    the target, in which it is linear, follow the formula, except if the gradient at a constant `z` is zero, as for a
    token of zeros: then they are 0 too.
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
    """Which vectors are zero, `[…, F]` to `[…, 1]`; false for a vector with a NaN."""
    return x.detach().abs().amax(dim=-1, keepdim=True) == 0  # on a CPU far faster than to ask each number


def normalize_target(target: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    """`γ (t − μ) / (std(t) + ε) + β` over the last dimension: the normalised target `v − k`, `[…, F]`.

    Unlike the inner layer norm it takes the unbiased standard deviation and adds ε outside the root, as published in
    TTT-Video (`ln_reconstruction_target` of its `ttt/models/ssm/ttt_layer.py`).
    """
    target = _followed(target)
    mean = target.mean(dim=-1, keepdim=True)
    # Not torch.std: its gradient at a constant target is NaN, even if the result is masked out later.
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
