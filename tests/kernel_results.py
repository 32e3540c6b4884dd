"""What an implementation of the scan makes of a sequence, with the gradients of all it was given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.rows import Tokens

Found = tuple[list[Tensor], list[Tensor]]
"""Outputs, final state included; and the gradients of the leaves."""


def learned(
    name: str,
    tokens: Tokens,
    state: Sequence[Tensor],
    inner: Inner,
    leaves: Sequence[Tensor],
    *,
    group_size: int,
    counts: tuple[int, ...],
    lengths: tuple[int, ...],
) -> Found:
    """Read a sequence by the implementation of this name.

    Args:
        name: what `TTT_OPS` is set to.
        tokens: `[B,H,T,F]`.
        state: weights, and behind them as many summed gradients if there are `counts`.
        inner: norms, step sizes, kind of update.
        leaves: whose gradients are taken, of a sum that weighs every number of the outputs differently.
        group_size: of the scan.
        counts: tokens that each row has read of its open mini-batch; empty: every row begins.
        lengths: how many tokens of each row count; empty: all.
    """
    weights = len(state) // 2 if counts else len(state)
    stream = Stream(tuple(state[:weights]), tuple(state[weights:]) or None, torch.tensor(counts) if counts else None)
    mask = torch.arange(tokens.q.shape[2]) < torch.tensor(lengths)[:, None] if lengths else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTT_OPS", name)
        z, end = learn(tokens, stream, inner, group_size=group_size, mask_BT=mask)
        outputs = [z, *end.weights, *(end.gradients or ())]
        total = sum((weighed(x) for x in outputs), torch.zeros((), dtype=z.dtype))
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    return outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def weighed(x: Tensor) -> Tensor:
    """A sum that weighs every number differently."""
    return (x * torch.linspace(0.3, 1.7, x.numel(), dtype=x.dtype).view_as(x)).sum()


def distances(found: Found, expected: Found) -> list[float]:
    """How far each result is from the expected one, relative to its length."""
    pairs = zip(itertools.chain(*found), itertools.chain(*expected), strict=True)
    return [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]


def furthest(found: Found, expected: Found) -> float:
    """The largest of the distances; NaN if one is, which Python's `max` would pass over."""
    return torch.tensor(distances(found, expected)).max().item()
