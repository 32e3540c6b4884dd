"""What the kernels keep between forward and backward: the weights that open mini-batches or groups; imports no Triton."""

from __future__ import annotations

from torch import Tensor

from ttt.ops.fused.layout import Problem


def kept_openings(problem: Problem) -> int:
    """G, how many openings are kept: of all mini-batches for group sizes 0 and 1, else of all groups but the first.

    The first group's weights are an input.
    """
    steps, group_size = problem.dims.steps, problem.group_size
    return steps if group_size < 2 else -(-steps // group_size) - 1


def room_for_carries(problem: Problem) -> list[Tensor]:
    """Allocate what is kept: `W [G,P,I,O]` and `b [G,P,1,O]` for each layer in turn."""
    kept, pairs = kept_openings(problem), problem.dims.pairs
    return [w.new_empty((kept, pairs, *w.shape[2:])) for w in problem.weights]
