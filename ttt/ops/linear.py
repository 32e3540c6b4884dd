"""TTT-Linear: the inner model `f_W(x) = x W1 + b1`, an MLP of one layer.

It needs no arithmetic of its own. For one layer, the dual form of `ttt.ops.mlp` is as follows: with
`g = ∂ℓ/∂(K W + b)` the answers are `Z̄ = Q W + b − s ⊙ (((Q Kᵀ + 1) ⊙ mask ⊙ ηᵀ) g + Q G_W + G_b)`. The 1 comes from
the bias; `G` is what the mini-batch has summed before these tokens.

Source: TTT-LM (arXiv 2407.04620), section 2.5 and appendix A.
"""

from __future__ import annotations

from ttt.ops.mlp import mlp_minibatch as linear_minibatch
from ttt.ops.mlp import mlp_model as linear_model

__all__ = ["linear_minibatch", "linear_model"]
