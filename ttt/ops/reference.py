"""The definition of a TTT layer's inner learning, token by token: slow, obvious, and what the rest is tested against.

Nothing here is shared with the fast forms: inner gradients come from autograd, rows are processed one by one, and
the weights of every token are really made. What the inner model makes of a token may be one value throughout, as it is
of zeros where biases are zero: a layer norm of that answers with β, and is given the derivative 0 there by definition,
in what a token teaches as in what it is answered (`ttt.ops.norm` says why).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = tuple[Tensor, ...]


def _layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return gamma * (x - mean) / torch.sqrt(variance + eps) + beta


def _with_a_direction(x: Tensor) -> Tensor:
    """`x`, whose vectors of one value get no gradient."""
    return torch.where((x == x[..., :1]).all(-1, keepdim=True), x.detach(), x)


def _inner_model(weights: Weights, x: Tensor) -> Tensor:
    """`x [H,F]` to `[H,F]` by the weights of one row, `W [H,in,out]`, `b [H,1,out]`."""
    for index in range(0, len(weights), 2):
        x = torch.einsum("hi,hio->ho", x, weights[index]) + weights[index + 1].squeeze(-2)
        if index + 2 < len(weights):
            x = F.gelu(x, approximate="tanh")
    return x


def _answer(weights: Weights, query: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return query + _layer_norm(_with_a_direction(_inner_model(weights, query)), gamma, beta, eps)


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
) -> tuple[Tensor, Weights, Weights, list[int]]:
    """Answers and final state of B streams, straight from the equations.

    Every gradient of a mini-batch is taken at the weights `W` that opened it. Causal: its token i (from 1) answers
    with `W − s_i Σ_{j≤i} η_j ∇ℓ_j(W)`, `s_i = max(1/i + δ_i, 0)`, and the next one opens with the weights of
    i = C. Non-causal: every token answers with `W − (1/C) Σ_j η_j ∇ℓ_j(W)`, and so does the next mini-batch open,
    also where the sequence ends before C tokens.

    Args:
        q_BHTF: queries; `k_BHTF` keys; `target_BHTF` `v − k`; `rate_BHT` `η`.
        k_BHTF: see above.
        target_BHTF: see above.
        rate_BHT: see above.
        weights: of the B streams, flat, `W [B,H,in,out]`, `b [B,H,1,out]`; they open the mini-batch that `count`
            tokens have been read of.
        gamma_HF: scale of the inner layer norm.
        beta_HF: shift of the inner layer norm.
        mini_batch_size: `C`.
        causal: see above.
        eps: of the inner layer norm.
        offset_C: `δ`; None is 0.
        gradients: `Σ_j η_j ∇ℓ_j(W)` of the tokens already read of the open mini-batch; None is 0.
        count: how many those are, for each stream; None is 0.

    Returns:
        `z [B,H,T,F]`, and weights, gradients and counts after the last token.
    """
    batch, _, length, _ = q_BHTF.shape
    rows_z, rows_weights, rows_gradients, counts = [], [], [], []
    for row in range(batch):
        w = tuple(weight[row] for weight in weights)
        summed = tuple(g[row] for g in gradients) if gradients else tuple(torch.zeros_like(x) for x in w)
        i = count[row] if count else 0
        answers: list[Tensor] = []
        waiting: list[Tensor] = []  # queries of a non-causal mini-batch, answered when it is complete
        for t in range(length):
            k, target, rate = k_BHTF[row, :, t], target_BHTF[row, :, t], rate_BHT[row, :, t]
            # One leaf for each use: the gradient is that of this token's loss at W alone.
            probe = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in w)
            made = _inner_model(probe, k)
            normed = _with_a_direction(made)
            loss_H = 0.5 * ((_layer_norm(normed, gamma_HF, beta_HF, eps) - target) ** 2).sum(-1)
            (error,) = torch.autograd.grad(loss_H.sum(), normed, create_graph=True)
            silent = (made == made[..., :1]).all(-1) & (error == 0).all(-1)
            error = torch.where(silent[:, None], 0, rate[:, None] * error)
            gradient = torch.autograd.grad(made, probe, error, create_graph=True)
            summed = tuple(s + g for s, g in zip(summed, gradient, strict=True))
            i += 1
            query = q_BHTF[row, :, t]
            if causal:
                offset = offset_C[i - 1] if offset_C is not None else 0.0
                scale = torch.clamp_min(torch.as_tensor(1.0 / i + offset, dtype=k.dtype), 0.0)
                own = tuple(x - scale * s for x, s in zip(w, summed, strict=True))
                answers.append(_answer(own, query, gamma_HF, beta_HF, eps))
                closes = i == mini_batch_size
            else:
                waiting.append(query)
                own = tuple(x - s / mini_batch_size for x, s in zip(w, summed, strict=True))
                closes = i == mini_batch_size or t == length - 1
                if closes:
                    answers += [_answer(own, q, gamma_HF, beta_HF, eps) for q in waiting]
                    waiting = []
            if closes:
                w, summed, i = own, tuple(torch.zeros_like(x) for x in own), 0
        rows_z.append(torch.stack(answers, dim=1))
        rows_weights.append(w)
        rows_gradients.append(summed)
        counts.append(i)
    stacked_weights = tuple(torch.stack(parts) for parts in zip(*rows_weights, strict=True))
    stacked_gradients = tuple(torch.stack(parts) for parts in zip(*rows_gradients, strict=True))
    return torch.stack(rows_z), stacked_weights, stacked_gradients, counts
