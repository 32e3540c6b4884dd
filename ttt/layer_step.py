"""A layer's reading of one token of each stream: the same numbers as its `forward`'s, in as few operations as may be.

One token costs a layer four products of D² numbers, which the memory limits, and the inner learning of
`ttt.ops.decode`. Each further operation takes some microseconds however small it is, so that a hundred of them weigh as
much as the projections. So queries and keys are treated as one tensor here, and what depends on the config alone is
computed once. What depends on parameters is derived anew for each token: they may change between two.

No gradient flows here. Every function is called under `torch.no_grad()`, with autocast off.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt.config import TTTConfig
from ttt.layer_sharing import Sharing, held
from ttt.ops.constants import Precision
from ttt.ops.minibatch import Inner
from ttt.ops.norm import normalize, normalize_target, rms_norm
from ttt.ops.rotary import rotary_angles
from ttt.ops.rows import Tokens

Rotary = tuple[Tensor, Tensor]


class Layer(Protocol):
    """What of a `TTTLayer` reads one token."""

    config: TTTConfig
    head_width: int
    sharing: Sharing
    precision: Precision
    post_norm: nn.LayerNorm

    @property
    def ttt_norm_weight(self) -> Tensor:
        """Of the inner model's norm, `[H,F]`."""
        ...

    @property
    def learnable_ttt_lr_weight(self) -> Tensor:
        """`[H,1,D]`."""
        ...

    @property
    def learnable_ttt_lr_bias(self) -> Tensor:
        """`[H,1]`."""
        ...

    @property
    def learnable_token_idx(self) -> Tensor:
        """Of step sizes, `[C]`; there if the config says so."""
        ...

    def project(self, name: str, x: Tensor) -> Tensor:
        """One of the four projections of `[…,D]`."""
        ...

    def norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`γ` and `β` of the inner model's norm, `[H,1,F]`."""
        ...

    def scale(self, dtype: torch.dtype) -> Tensor:
        """The step size by position, `[C]`."""
        ...


def token_of(layer: Layer, x: Tensor, kept_out: Tensor | None, count: Tensor | None, rotary: Rotary | None) -> Tokens:
    """Query, key, target and rate of one token of each stream.

    Args:
        layer: whose.
        x: tokens `[B,1,D]`.
        kept_out: those that are skipped, `[B,1,1]`; None if the layer does not look for them.
        count: how many tokens the streams have read of their open mini-batches, `[B]`; None means none.
        rotary: as in `TTTLayer.forward`.
    """
    config, width = layer.config, layer.head_width
    dtype = torch.promote_types(x.dtype, torch.float32)
    if kept_out is not None:
        x = torch.where(kept_out, 0, x)
    x_BD = layer.sharing.entering(x).squeeze(1)
    wide_BD = x_BD.to(dtype)
    if config.input_norm == "rms":
        wide_BD = rms_norm(wide_BD, eps=config.ln_eps)
        x_BD = wide_BD.to(x.dtype)
    k_BHF, q_BHF, v_BHF = (
        layer.project(name, x_BD).to(dtype).view(x.shape[0], -1, width) for name in ("k_proj", "q_proj", "v_proj")
    )
    both_BH2F = torch.stack((k_BHF, q_BHF), 2)
    if config.normalize_qk:
        both_BH2F = normalize(both_BH2F)
    angle = _angle(layer, count, rotary, dtype)
    if angle is not None:
        pairs = torch.view_as_complex(both_BH2F.view(*both_BH2F.shape[:-1], -1, 2))
        both_BH2F = torch.view_as_real(pairs * angle).view(both_BH2F.shape)
    k_BH1F, q_BH1F = both_BH2F.split(1, 2)
    target_BH1F = v_BHF.unsqueeze(2) - k_BH1F
    if config.normalize_target:
        gamma, beta = layer.norm(dtype)
        target_BH1F = normalize_target(target_BH1F, gamma, beta, eps=config.target_eps)
    weight, bias = held(layer.learnable_ttt_lr_weight).to(dtype), held(layer.learnable_ttt_lr_bias).to(dtype)
    rate_BH = F.linear(wide_BD, weight.squeeze(1), bias.squeeze(1)).sigmoid_().mul_(config.base_lr / width)
    rate_BH11 = rate_BH.view(*rate_BH.shape, 1, 1)
    if kept_out is not None:
        rate_BH11 = torch.where(kept_out.unsqueeze(1), 0, rate_BH11)
    return layer.sharing.to_heads(Tokens(q_BH1F, k_BH1F, target_BH1F, rate_BH11))


def inner_of(layer: Layer, dtype: torch.dtype) -> Inner:
    """What the inner learning needs beside the token and the state."""
    config = layer.config
    gamma_H1F, beta_H1F = (layer.sharing.heads(x) for x in layer.norm(dtype))
    if layer.ttt_norm_weight.device.type != "cpu":
        scale_C = layer.scale(dtype)
    else:
        scale_C = _steps(config.mini_batch_size, dtype)
        if config.learnable_token_idx:
            scale_C = (scale_C + layer.sharing.entering(layer.learnable_token_idx).to(dtype)).clamp_min_(0)
    return Inner(gamma_H1F, beta_H1F, scale_C, config.causal, config.ln_eps, layer.precision)


def _angle(layer: Layer, count: Tensor | None, rotary: Rotary | None, dtype: torch.dtype) -> Tensor | None:
    """`cos + i sin` of the angles by which pairs turn, broadcastable to `[B,H,2,F/2]`; None if they do not."""
    config = layer.config
    if config.rope == "none":
        return None
    if rotary is not None:
        cos, sin = (layer.sharing.angles(angle).to(dtype) for angle in rotary)
        return torch.complex(cos, sin)
    if count is None:  # a mini-batch of one token has the position 0 alone
        return None
    if count.device.type != "cpu":
        return torch.complex(*rotary_angles(count, layer.head_width, theta=config.rope_theta, dtype=dtype))[
            :, None, None
        ]
    table_CF = _table(config.mini_batch_size, layer.head_width, config.rope_theta, dtype)
    counts = count.tolist()
    if min(counts) == max(counts):
        return table_CF.select(0, counts[0])
    return table_CF[count].view(-1, 1, 1, table_CF.shape[1])


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _table(size: int, width: int, theta: float, dtype: torch.dtype) -> Tensor:
    """`cos + i sin` by position in the mini-batch, `[C,F/2]`, on the CPU; not to be written to."""
    positions = torch.arange(size, device="cpu")
    return torch.complex(*rotary_angles(positions, width, theta=theta, dtype=dtype))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _steps(size: int, dtype: torch.dtype) -> Tensor:
    """`1/i` for the positions i from 1, `[C]`, on the CPU; not to be written to."""
    return 1 / torch.arange(1, size + 1, dtype=dtype, device="cpu")


def answer_of(layer: Layer, z_BH1F: Tensor, x: Tensor, kept_out: Tensor | None) -> Tensor:
    """`W_o · LN(z)` in the type of `x [B,1,D]`; zeros for tokens that are skipped."""
    z_BD = layer.sharing.to_tokens(z_BH1F).reshape(x.shape[0], -1)
    norm = layer.post_norm
    gamma, beta = held(norm.weight).to(z_BD.dtype), held(norm.bias).to(z_BD.dtype)
    normed = layer.sharing.layer_norm(z_BD, gamma, beta, eps=norm.eps)
    y = layer.project("o_proj", normed.to(x.dtype)).unsqueeze(1)
    return y if kept_out is None else torch.where(kept_out, 0, y)
