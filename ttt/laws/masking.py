"""Part of law 5: a token that a mask leaves out does not exist for a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt.laws.bench import Bench, distance
from ttt.laws.parts import random_tokens, rotary_of
from ttt.layer import TTTLayer
from ttt.state import TTTState


@torch.no_grad()
def masked_tokens(layer: TTTLayer, bench: Bench) -> float:
    """How far a batch with padding and holes is from its counted tokens alone, each row by itself.

    The tokens that do not count hold NaN, so that one that reaches an answer or a state is infinitely far away. The
    streams have read before, and of two or more the last has no token that counts.
    """
    x, angles = random_tokens(layer, bench)
    read = 2 * layer.config.mini_batch_size if not layer.config.causal else bench.tokens // 2
    _, state = layer(x[:, :read], rotary=rotary_of(angles, slice(0, read)))
    x, angles = x[:, read:], None if angles is None else angles[read:]
    mask = _ragged(x)
    padded = torch.where(mask[..., None], x, math.nan)
    y, after = layer(padded, state, rotary=rotary_of(angles, slice(None)), mask=mask)
    found, worst = after.opened().tensors(), 0.0
    for row, counted in enumerate(mask):
        answers, alone = torch.zeros_like(y[row]), _row(state, row)
        if counted.any():
            own = None if angles is None else angles[counted]
            read_alone, alone = layer(x[row : row + 1, counted], alone, rotary=rotary_of(own, slice(None)))
            answers[counted] = read_alone[0]
        expected = alone.opened().tensors()
        away = (distance(found[name][row].float(), expected[name][0].float()) for name in expected)
        worst = max(worst, distance(y[row], answers), *away)
    return worst


def _ragged(x: Tensor) -> Tensor:
    """A mask with a hole in every three tokens, and one token more of padding on the left in each row."""
    tokens, rows = torch.arange(x.shape[1], device=x.device), torch.arange(len(x), device=x.device)[:, None]
    mask = ((tokens + rows) % 3 > 0) & (tokens >= rows)
    if len(x) > 1:
        mask[-1] = False
    return mask


def _row(state: TTTState, row: int) -> TTTState:
    return TTTState.from_tensors({name: tensor[row : row + 1] for name, tensor in state.tensors().items()})
