"""The tokens of open mini-batches as factors of their summed gradients; `ttt.ops.decode` says what for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.precision import multiplying

Weights = tuple[Tensor, ...]

MOST_SLOTS = 16
"""Of mini-batches of more tokens, so many are kept as factors at a time; see `slots_for`."""


class Factors(NamedTuple):
    """Tokens of the open mini-batches of B streams, layer by layer.

    The token at place i of its mini-batch, from 0, is in slot `i mod K`. Slots that hold no token of it teach zeros.
    """

    inputs: Weights
    """`x`, the inputs of each layer, `[B,H,K,in]`; of a slot without a token any finite numbers."""
    taught: Weights
    """`u = η E`, the rate times the inner loss's gradient at each layer's outputs, `[B,H,K,out]`."""
    based_B: Tensor
    """Which streams have tokens in the base, the matrices of `Stream.gradients`, bool; that of the others is zeros."""

    @property
    def slots(self) -> int:
        """`K`."""
        return self.inputs[0].shape[2]


def slots_for(mini_batch_size: int) -> int:
    """How many tokens factors hold, K: all C, but at most 16.

    A larger mini-batch adds its factors to the base whenever they are full, so that they never outgrow the gradient by
    much: 16 tokens take a sixth of its numbers in an MLP at F 128, half in a linear model at F 64, and are more than it
    only in linear models with F below 32, which are small.
    """
    return min(mini_batch_size, MOST_SLOTS)


def no_factors(weights: Weights, mini_batch_size: int) -> Factors:
    """Factors without tokens, for streams with these weights, in memory of their own."""
    slots, matrices = slots_for(mini_batch_size), weights[::2]

    def room(w: Tensor, width: int) -> Tensor:
        return torch.zeros(*w.shape[:2], slots, width, dtype=w.dtype, device=w.device)

    return Factors(
        tuple(room(w, w.shape[-2]) for w in matrices),
        tuple(room(w, w.shape[-1]) for w in matrices),
        torch.zeros(weights[0].shape[0], dtype=torch.bool, device=weights[0].device),
    )


def summed_gradients(gradients: Weights, factors: Factors) -> Weights:
    """The gradients summed over all tokens of the open mini-batches, in the shapes of the weights."""
    summed = list(gradients)
    with multiplying(summed[0], "ieee"):
        for layer, (x, u) in enumerate(zip(factors.inputs, factors.taught, strict=True)):
            summed[2 * layer] = summed[2 * layer] + x.mT @ u
    return tuple(summed)
