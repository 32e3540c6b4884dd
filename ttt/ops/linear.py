"""TTT-Linear: the inner model `f_W(x) = x W1 + b1`, which is an MLP of one layer.

There is no arithmetic of its own. With one layer the dual form of `ttt.ops.mlp` comes to this: with
`g = ∂ℓ/∂(K W + b)` the answers are `Z̄ = Q W + b − s ⊙ (((Q Kᵀ + 1) ⊙ mask ⊙ ηᵀ) g + Q G_W + G_b)`. The 1 is the
bias's share, and `G` what the mini-batch had summed before.

Source: TTT-LM (arXiv 2407.04620), section 2.5 and appendix A.
"""

from __future__ import annotations

from ttt.ops.mlp import mlp_minibatch as linear_minibatch
from ttt.ops.mlp import mlp_model as linear_model

__all__ = ["linear_minibatch", "linear_model"]
