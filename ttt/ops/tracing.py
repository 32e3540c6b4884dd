"""What the inner learning does to its own loss: token by token, and by mini-batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.minibatch import Inner, Stream, Weights, answer_minibatch, learn
from ttt.ops.mlp import mlp_model, move
from ttt.ops.norm import inner_loss
from ttt.ops.rows import Rows, Tokens


class InnerTrace(NamedTuple):
    """The inner loss of each token at three weights: means over heads, `[B,T]`; NaN for tokens that do not count.

    Source: TTT-LM (arXiv 2407.04620), its figure of the inner loss by token.
    """

    w0: Tensor
    """`ℓ(W₀; x_t)`: at the weights with which the stream started."""
    before: Tensor
    """`ℓ(W_{t−1}; x_t)`: at the weights that answered the token before.

    If the update is not causal, `W_{t−1}` are the weights that opened the token's mini-batch."""
    after: Tensor
    """`ℓ(W_t; x_t)`: at the weights that answer the token itself.

    If the update is not causal, `W_t` are the weights after the token's whole mini-batch."""


@torch.no_grad()
def trace(tokens: Tokens, stream: Stream, inner: Inner, *, start: Weights, mask_BT: Tensor | None = None) -> InnerTrace:
    """The inner loss of each token of a sequence, or of a piece of one, at `W₀`, `W_{t−1}` and `W_t`.

    `learn` itself makes the weights: a key as the query is answered with `k + LN(f_W(k))`, which leaves the loss. The
    slot of a token answers its own key with `W_t`, and the key of the next token with what is `W_{t−1}` for that one.
    So a mini-batch that is open before or after the piece counts as it does in `learn`, in each row by itself, and a
    sequence in pieces gives the numbers of the whole.

    Args:
        tokens: as in `learn`; the queries play no part.
        stream: the state before the first token.
        inner: norms, step sizes, kind of update.
        start: `W₀`, what the stream had when it started, in the form of `Stream.weights`; it is not `stream.weights`
            if the stream has read anything.
        mask_BT: as in `learn`; the token before a token, and the one after it, are those that count.

    Raises:
        ValueError: as `learn` does.
    """
    if mask_BT is not None:
        return _masked_trace(Rows.of(tokens, mask_BT), mask_BT, stream, inner, start)
    losses = _losses(tokens, stream, inner, start)
    return InnerTrace(*(loss_BHT.mean(1) for loss_BHT in losses))


def _masked_trace(rows: Rows, mask_BT: Tensor, stream: Stream, inner: Inner, start: Weights) -> InnerTrace:
    """`trace` of the counted tokens of each row, without the gaps between them, put back in their places.

    Tokens of zero rate fill the ends of the rows; nothing that counts comes after them.
    """
    places = torch.arange(mask_BT.shape[1], device=mask_BT.device)[None]
    losses = _losses(rows.at(places), stream, inner, start)
    found = (loss_BHT.mean(1).gather(1, rows.place_BT) for loss_BHT in losses)
    return InnerTrace(*(loss_BT.masked_fill(~mask_BT, torch.nan) for loss_BT in found))


def _losses(tokens: Tokens, stream: Stream, inner: Inner, start: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of `trace`, `[B,H,T]`."""
    distance = 1 if inner.causal else inner.mini_batch_size
    first = tokens.map(lambda x: x[:, :, :distance])
    before = [_loss(effective_weights(stream, inner.scale_C), first, inner)]
    if tokens.k.shape[2] > distance:
        before.append(_loss_ahead(tokens, stream, inner, distance)[:, :, :-distance])
    return _loss(start, tokens, inner), torch.cat(before, dim=2), _loss_ahead(tokens, stream, inner, 0)


def effective_weights(stream: Stream, scale_C: Tensor) -> Weights:
    """The weights that answered the last token of each stream: with the step of an open mini-batch taken."""
    if stream.gradients is None or stream.count_B is None:
        return stream.weights
    scale_B = torch.where(stream.count_B > 0, scale_C[(stream.count_B - 1).clamp_min(0)], 0)
    return tuple(w - scale_B[:, None, None, None] * g for w, g in zip(stream.weights, stream.gradients, strict=True))


def _loss(weights: Weights, tokens: Tokens, inner: Inner) -> Tensor:
    """The inner loss of every token at the same weights, `[B,H,T]`."""
    z = mlp_model(weights, tokens.k, inner.precision)
    return inner_loss(z, tokens.target, inner.gamma_H1F, inner.beta_H1F, eps=inner.eps)


def _loss_ahead(tokens: Tokens, stream: Stream, inner: Inner, distance: int) -> Tensor:
    """The loss of the token that is `distance` after each slot, at the weights that answer the slot, `[B,H,T]`.

    The last `distance` slots have no such token; they hold no meaningful numbers.
    """
    key, target = (x.roll(-distance, dims=2) for x in (tokens.k, tokens.target))
    answer, _ = learn(tokens._replace(q=key), stream, inner, group_size=0)
    return 0.5 * (answer - key - target).square().sum(dim=-1)


class MinibatchTrace(NamedTuple):
    """The inner loss of each mini-batch before and after its step: means over streams, heads and tokens, `[N]`.

    With a mask they are means over the tokens that count, NaN for a mini-batch that no stream reaches.
    """

    before: Tensor
    """The loss at the weights that opened the mini-batch."""
    after: Tensor
    """The loss of the same tokens after the mini-batch's step."""


@torch.no_grad()
def trace_minibatches(tokens: Tokens, stream: Stream, inner: Inner, *, mask_BT: Tensor | None = None) -> MinibatchTrace:
    """The inner loss before and after each mini-batch's step; the last mini-batch may be incomplete.

    Mini-batches are counted from the first token, with a mask from the first that counts in each row. If one is open in
    `stream`, the count starts with its weights, as if it opened here. Arguments as in `learn`.
    """
    rows, weights = Rows.of(tokens, mask_BT), stream.weights
    before: list[Tensor] = []
    after: list[Tensor] = []
    for places_T in torch.arange(tokens.q.shape[2], device=tokens.q.device).split(inner.mini_batch_size):
        part = rows.at(places_T[None])
        read_BT = (places_T < rows.length_B[:, None]).expand(len(part.q), -1)
        _, gradients = answer_minibatch(weights, None, part, inner, inner.scale_C[None, : len(places_T)])
        last_B = inner.scale_C[(read_BT.sum(1) - 1).clamp_min(0)]
        moved = move(weights, gradients, last_B[:, None, None, None])
        for losses, at in ((before, weights), (after, moved)):
            losses.append(_mean(_loss(at, part, inner), read_BT))
        weights = moved
    return MinibatchTrace(torch.stack(before), torch.stack(after))


def _mean(loss_BHT: Tensor, read_BT: Tensor) -> Tensor:
    """The mean over heads and the tokens that were read; NaN if none was."""
    return torch.where(read_BT, loss_BHT.mean(1), 0).sum() / read_BT.sum()
