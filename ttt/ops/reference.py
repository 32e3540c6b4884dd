"""The definition of a TTT layer's inner learning, token by token: slow and obvious; the rest is tested against it.

It shares nothing with the fast forms: inner gradients come from autograd, rows are processed one by one, and the
weights of every token are computed. The inner model's output for a token may be a constant vector, for example for a
token of zeros if biases are zero. Its layer norm is then β, with derivative 0 by definition, both in the inner loss and
in the answer (`ttt.ops.norm` says why).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = tuple[Tensor, ...]


def _layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return gamma * (x - mean) / torch.sqrt(variance + eps) + beta


def _with_a_direction(x: Tensor) -> Tensor:
    """`x`, with the gradient of its constant vectors stopped."""
    return torch.where((x == x[..., :1]).all(-1, keepdim=True), x.detach(), x)


def _inner_model(weights: Weights, x: Tensor) -> Tensor:
    """The inner model with the weights of one row, `W [H,in,out]` and `b [H,1,out]`: `x [H,F]` to `[H,F]`."""
    for index in range(0, len(weights), 2):
        x = torch.einsum("hi,hio->ho", x, weights[index]) + weights[index + 1].squeeze(-2)
        if index + 2 < len(weights):
            x = F.gelu(x, approximate="tanh")
    return x


class _Rule(NamedTuple):
    """Everything that the inner learning needs apart from the tokens and the state."""

    gamma_HF: Tensor
    beta_HF: Tensor
    mini_batch_size: int
    causal: bool
    eps: float
    offset_C: Tensor | None

    def answer(self, weights: Weights, query_HF: Tensor) -> Tensor:
        """`z [H,F]` of a token with its own weights."""
        normed = _with_a_direction(_inner_model(weights, query_HF))
        return query_HF + _layer_norm(normed, self.gamma_HF, self.beta_HF, self.eps)

    def gradient(self, weights: Weights, k_HF: Tensor, target_HF: Tensor, rate_H: Tensor) -> Weights:
        """`η ∇ℓ(W)` of one token."""
        # New leaves for each token: the gradient is that of this token's loss alone.
        probe = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in weights)
        made = _inner_model(probe, k_HF)
        normed = _with_a_direction(made)
        loss_H = 0.5 * ((_layer_norm(normed, self.gamma_HF, self.beta_HF, self.eps) - target_HF) ** 2).sum(-1)
        (error,) = torch.autograd.grad(loss_H.sum(), normed, create_graph=True)
        silent = (made == made[..., :1]).all(-1) & (error == 0).all(-1)
        error = torch.where(silent[:, None], 0, rate_H[:, None] * error)
        return torch.autograd.grad(made, probe, error, create_graph=True)

    def moved(self, weights: Weights, summed: Weights, i: int) -> Weights:
        """The weights with which token i (from 1) of a mini-batch answers."""
        if not self.causal:
            return tuple(x - s / self.mini_batch_size for x, s in zip(weights, summed, strict=True))
        offset = self.offset_C[i - 1] if self.offset_C is not None else 0.0
        scale = torch.clamp_min(torch.as_tensor(1.0 / i + offset, dtype=weights[0].dtype), 0.0)
        return tuple(x - scale * s for x, s in zip(weights, summed, strict=True))


def _read_row(
    rule: _Rule, tokens: list[Tensor], mask: list[bool], weights: Weights, summed: Weights, i: int
) -> tuple[Tensor, Weights, Weights, int]:
    """Read one stream from its state before the first token; returns answers `[H,T,F]` and the state after the last."""
    counted = [t for t, counts in enumerate(mask) if counts]
    answers = [torch.zeros_like(tokens[0][:, 0]) for _ in mask]
    waiting: list[int] = []  # tokens of a non-causal mini-batch, answered when it is complete
    for t in counted:
        _, k_HF, target_HF, rate_H = (x[:, t] for x in tokens)
        gradient = rule.gradient(weights, k_HF, target_HF, rate_H)
        summed = tuple(s + g for s, g in zip(summed, gradient, strict=True))
        i += 1
        own = rule.moved(weights, summed, i)
        closes = i == rule.mini_batch_size or (not rule.causal and t == counted[-1])
        waiting.append(t)
        if rule.causal or closes:
            for answered in waiting:
                answers[answered] = rule.answer(own, tokens[0][:, answered])
            waiting = []
        if closes:
            weights, summed, i = own, tuple(torch.zeros_like(x) for x in own), 0
    return torch.stack(answers, dim=1), weights, summed, i


def reference(
    q_BHTF: Tensor,
    k_BHTF: Tensor,
    target_BHTF: Tensor,
    rate_BHT: Tensor,
    weights: Weights,
    gamma_HF: Tensor,
    beta_HF: Tensor,
    *,
    mini_batch_size: int,
    causal: bool,
    eps: float,
    offset_C: Tensor | None = None,
    gradients: Weights | None = None,
    count: list[int] | None = None,
    mask: list[list[bool]] | None = None,
) -> tuple[Tensor, Weights, Weights, list[int]]:
    """Answers and final state of B streams, straight from the equations.

    Every gradient of a mini-batch is taken at the weights `W` that opened it. Causal: token i (from 1) of a mini-batch
    answers with `W − s_i Σ_{j≤i} η_j ∇ℓ_j(W)`, `s_i = max(1/i + δ_i, 0)`, and the next mini-batch opens with the
    weights of i = C. Non-causal: every token answers with `W − (1/C) Σ_j η_j ∇ℓ_j(W)`, and the next mini-batch opens
    with the same weights, even if the sequence ends before C tokens.

    Args:
        q_BHTF: queries; `k_BHTF` keys; `target_BHTF` `v − k`; `rate_BHT` `η`.
        k_BHTF: see above.
        target_BHTF: see above.
        rate_BHT: see above.
        weights: fast weights of the B streams, flat, `W [B,H,in,out]`, `b [B,H,1,out]`; they opened the mini-batch of
            which `count` tokens have been read.
        gamma_HF: scale of the inner layer norm.
        beta_HF: shift of the inner layer norm.
        mini_batch_size: `C`.
        causal: see above.
        eps: of the inner layer norm.
        offset_C: `δ`; None is 0.
        gradients: `Σ_j η_j ∇ℓ_j(W)` of the tokens already read of the open mini-batch; None is 0.
        count: how many tokens of it have been read, for each stream; None is 0.
        mask: for each stream, which tokens count; the others are passed over, as if they were not there. None means
            all.

    Returns:
        `z [B,H,T,F]`, zeros for tokens that do not count, and weights, gradients and counts after the last token.
    """
    rule = _Rule(gamma_HF, beta_HF, mini_batch_size, causal, eps, offset_C)
    gradients = gradients or tuple(torch.zeros_like(w) for w in weights)
    rows = []
    for row in range(q_BHTF.shape[0]):
        tokens = [x[row] for x in (q_BHTF, k_BHTF, target_BHTF, rate_BHT)]
        opened, summed = (tuple(x[row] for x in group) for group in (weights, gradients))
        counted = mask[row] if mask else [True] * q_BHTF.shape[2]
        rows.append(_read_row(rule, tokens, counted, opened, summed, count[row] if count else 0))
    z, ends, sums, counts = zip(*rows, strict=True)
    stacked_weights = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    stacked_gradients = tuple(torch.stack(parts) for parts in zip(*sums, strict=True))
    return torch.stack(z), stacked_weights, stacked_gradients, list(counts)
