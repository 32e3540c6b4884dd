"""A layer's reading of a sequence, up to its inner learning: queries, keys, targets and rates of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.layer_held import Layer
from ttt.layer_inputs import nonfinite
from ttt.layer_sharing import held
from ttt.ops.norm import normalize, normalize_target, rms_norm
from ttt.ops.rotary import apply_rotary, rotary_angles
from ttt.ops.rows import Tokens
from ttt.state import TTTState

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of the angles by which pairs turn."""


def tokens_of(layer: Layer, x: Tensor, state: TTTState, rotary: Rotary | None, mask: Tensor | None = None) -> Tokens:
    """Queries, keys, targets and rates of the tokens; of those that do not count they have no meaning."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Backward needs zeros in both cases: NaN times zero would be NaN.
    if mask is not None:
        x = torch.where(mask[..., None], x, 0)
    kept_out = nonfinite(x) if layer.config.skip_nonfinite_tokens else None
    if kept_out is not None:
        x = torch.where(kept_out, 0, x)
    x = layer.sharing.entering(x)
    wide = x.to(dtype)
    if layer.config.input_norm == "rms":
        wide = rms_norm(wide, eps=layer.config.ln_eps)
        x = wide.to(x.dtype)

    def heads(name: str) -> Tensor:
        return layer.project(name, x).to(dtype).unflatten(-1, (-1, layer.head_width)).transpose(1, 2)

    q_BHTF, k_BHTF, v_BHTF = heads("q_proj"), heads("k_proj"), heads("v_proj")
    if layer.config.normalize_qk:
        q_BHTF, k_BHTF = normalize(q_BHTF), normalize(k_BHTF)
    if layer.config.rope == "mini_batch":
        rotary = _minibatch_rotary(layer, x.shape[1], state, mask, dtype)
    if rotary is not None:
        cos, sin = (layer.sharing.angles(angle).to(dtype) for angle in rotary)
        if mask is not None:
            cos, sin = (torch.where(mask[:, None, :, None], angle, 0) for angle in (cos, sin))
        q_BHTF, k_BHTF = apply_rotary(q_BHTF, cos, sin), apply_rotary(k_BHTF, cos, sin)
    target_BHTF = v_BHTF - k_BHTF
    if layer.config.normalize_target:
        gamma, beta = layer.norm(dtype)
        target_BHTF = normalize_target(target_BHTF, gamma, beta, eps=layer.config.target_eps)
    rate_BTH = F.linear(
        wide,
        held(layer.learnable_ttt_lr_weight).to(dtype).squeeze(1),
        held(layer.learnable_ttt_lr_bias).to(dtype).squeeze(1),
    )
    rate_BHT1 = rate_BTH.sigmoid().transpose(1, 2).unsqueeze(-1) * (layer.config.base_lr / layer.head_width)
    if kept_out is not None:
        rate_BHT1 = torch.where(kept_out.unsqueeze(1), 0, rate_BHT1)
    return layer.sharing.to_heads(Tokens(q_BHTF, k_BHTF, target_BHTF, rate_BHT1))


def _minibatch_rotary(layer: Layer, length: int, state: TTTState, mask: Tensor | None, dtype: torch.dtype) -> Rotary:
    """The angles by position in the mini-batch, where only tokens that count take a position."""
    positions = layer.sharing.own_tokens(
        torch.arange(layer.sharing.tokens(length), device=state.weights[0].device)
        if mask is None
        else (layer.sharing.all_tokens(mask).cumsum(1) - 1).clamp_min(0)[:, None]
    )
    if state.count is not None:
        positions = state.count[:, None, None] + positions
    positions = positions % layer.config.mini_batch_size
    return rotary_angles(positions, layer.head_width, theta=layer.config.rope_theta, dtype=dtype)
