"""Mini-batches of a linear or MLP inner model as one differentiable operation, its backward derived by hand."""

from ttt.ops.fused.operator import fused_minibatch, fused_scan

__all__ = ["fused_minibatch", "fused_scan"]
