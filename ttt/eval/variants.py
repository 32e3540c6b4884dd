"""The scores of a clip: every way to weigh its streams, with every way to normalise, from one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.plugins.scoring import ScoreFacts, Scores

NORMALISED = ("mean", "sum", "continuation")
"""The values of `eval.score.normalise`."""


def clip_scores(scores: Scores, facts: ScoreFacts, *, begin: int) -> dict[str, float]:
    """Every score of one clip by `streams.normalise`; higher is likelier. Streams without a prediction have none.

    With the weights `w_k` of the streams and the losses `ℓ_kt` where something is predicted, the sum is `−Σ w_k ℓ_kt`,
    and the mean `−Σ w_k ℓ_kt / Σ w_k`. The continuation is the mean over the positions from `begin` on.

    Args:
        scores: of one clip, `[1,K,T]`.
        facts: names and weights of its streams.
        begin: where the clip differs from the other one of its pair.
    """
    losses = torch.where(scores.mask, scores.nll, 0)[0].double()
    counts = scores.mask[0].double()
    found: dict[str, float] = {}
    for name, weights in facts.weights.items():
        by_stream = torch.tensor(weights, dtype=torch.float64)[:, None]
        if not bool((by_stream * counts).any()):
            continue  # a stream that is masked: nothing is predicted there
        for normalised in NORMALISED:
            start = begin if normalised == "continuation" else 0
            total = float((by_stream * losses)[:, start:].sum())
            count = float((by_stream * counts)[:, start:].sum())
            found[f"{name}.{normalised}"] = -total if normalised == "sum" else -total / count if count else 0.0
    return found


def first_difference(one: Tensor, other: Tensor) -> int:
    """The first position at which two clips `[S,T]` differ, at most the last position of the shorter one."""
    length = min(one.shape[-1], other.shape[-1])
    same = (one[:, :length] == other[:, :length]).all(0)
    return min(int(same.long().cumprod(0).sum()), length - 1)
