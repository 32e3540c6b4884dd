"""One mini-batch of TTT-Linear in dual form: per-token weights are never materialised."""

from __future__ import annotations

from torch import Tensor

from ttt.ops.norm import inner_loss_gradient, layer_norm

Weights = tuple[Tensor, ...]


def linear_model(weights: Weights, x: Tensor) -> Tensor:
    """The inner model `f_W(x) = x W1 + b1`, `[B,H,C,F]` to `[B,H,C,F]`."""
    w, b = weights
    return x @ w + b


def linear_minibatch(
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
    """Answer the queries of a mini-batch and sum its gradients, all taken at the weights that opened it.

    Token i answers with `W − s_i (G + Σ_{j≤i} η_j ∇ℓ_j(W))` (causal) or with the sum over every j. With
    `g = ∂ℓ/∂(K W + b)` the answers are `Z̄ = Q W + b − s ⊙ (((Q Kᵀ + 1) ⊙ mask ⊙ ηᵀ) g + Q G_W + G_b)`: the 1 is
    the bias's share.

    Args:
        weights: `(W1 [B,H,F,F], b1 [B,H,1,F])`, which opened the mini-batch.
        gradients: `G`, what the mini-batch has summed before these tokens, in the shapes of `weights`; or None.
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
        `z [B,H,C,F]`, `q + LN(Z̄)`, and the summed gradients `G + Σ_j η_j ∇ℓ_j(W)` in the shapes of `weights`.

    Source: TTT-LM (arXiv 2407.04620), sections 2.5 and appendix A.
    """
    w, b = weights
    error_BHCF = inner_loss_gradient(k_BHCF @ w + b, target_BHCF, gamma_H1F, beta_H1F, eps=eps)
    taught_BHCF = rate_BHC1 * error_BHCF
    attention_BHCC = q_BHCF @ k_BHCF.mT + 1
    if causal:
        attention_BHCC = attention_BHCC.tril()
    step_BHCF = attention_BHCC @ taught_BHCF
    gradient_w = k_BHCF.mT @ taught_BHCF
    gradient_b = taught_BHCF.sum(dim=-2, keepdim=True)
    if gradients is not None:
        step_BHCF = step_BHCF + q_BHCF @ gradients[0] + gradients[1]
        gradient_w = gradient_w + gradients[0]
        gradient_b = gradient_b + gradients[1]
    answer_BHCF = q_BHCF @ w + b - scale_C1 * step_BHCF
    return q_BHCF + layer_norm(answer_BHCF, gamma_H1F, beta_H1F, eps=eps), (gradient_w, gradient_b)
