"""What the inner learning does to its own loss: token by token, and by mini-batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.minibatch import Inner, Stream, Tokens, Weights, answer_minibatch, learn
from ttt.ops.mlp import mlp_model, move
from ttt.ops.norm import inner_loss


class InnerTrace(NamedTuple):
    """The inner loss of each token at three weights: means over heads, `[B,T]`.

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
def trace(tokens: Tokens, stream: Stream, inner: Inner, *, start: Weights) -> InnerTrace:
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

    Raises:
        ValueError: as `learn` does.
    """
    distance = 1 if inner.causal else inner.mini_batch_size
    first = tokens.map(lambda x: x[:, :, :distance])
    before = [_loss(effective_weights(stream, inner.scale_C), first, inner)]
    if tokens.k.shape[2] > distance:
        before.append(_loss_ahead(tokens, stream, inner, distance)[:, :, :-distance])
    losses = _loss(start, tokens, inner), torch.cat(before, dim=2), _loss_ahead(tokens, stream, inner, 0)
    return InnerTrace(*(loss_BHT.mean(1) for loss_BHT in losses))


def effective_weights(stream: Stream, scale_C: Tensor) -> Weights:
    """The weights that answered the last token of each stream: with the step of an open mini-batch taken."""
    if stream.gradients is None or stream.count_B is None:
        return stream.weights
    scale_B = torch.where(stream.count_B > 0, scale_C[(stream.count_B - 1).clamp_min(0)], 0)
    return tuple(w - scale_B[:, None, None, None] * g for w, g in zip(stream.weights, stream.gradients, strict=True))


def _loss(weights: Weights, tokens: Tokens, inner: Inner) -> Tensor:
    """The inner loss of every token at the same weights, `[B,H,T]`."""
    z = mlp_model(weights, tokens.k)
    return inner_loss(z, tokens.target, inner.gamma_H1F, inner.beta_H1F, eps=inner.eps)


def _loss_ahead(tokens: Tokens, stream: Stream, inner: Inner, distance: int) -> Tensor:
    """The loss of the token that is `distance` after each slot, at the weights that answer the slot, `[B,H,T]`.

    The last `distance` slots have no such token; they hold no meaningful numbers.
    """
    key, target = (x.roll(-distance, dims=2) for x in (tokens.k, tokens.target))
    answer, _ = learn(tokens._replace(q=key), stream, inner, group_size=0)
    return 0.5 * (answer - key - target).square().sum(dim=-1)


class MinibatchTrace(NamedTuple):
    """The inner loss of each mini-batch before and after its step: means over streams, heads and tokens, `[N]`."""

    before: Tensor
    """The loss at the weights that opened the mini-batch."""
    after: Tensor
    """The loss of the same tokens after the mini-batch's step."""


@torch.no_grad()
def trace_minibatches(tokens: Tokens, stream: Stream, inner: Inner) -> MinibatchTrace:
    """The inner loss before and after each mini-batch's step; the last mini-batch may be incomplete.

    Mini-batches are counted from the first token. If one is open in `stream`, the count starts with its weights, as if
    it opened here. Arguments as in `learn`.
    """
    weights, size = stream.weights, inner.mini_batch_size
    before: list[Tensor] = []
    after: list[Tensor] = []
    for start in range(0, tokens.q.shape[2], size):
        part = tokens.map(lambda x, start=start: x[:, :, start : start + size])  # type: ignore[misc]
        read = part.q.shape[2]
        _, gradients = answer_minibatch(weights, None, part, inner, inner.scale_C[None, :read])
        moved = move(weights, gradients, inner.scale_C[read - 1])
        for losses, at in ((before, weights), (after, moved)):
            losses.append(_loss(at, part, inner).mean())
        weights = moved
    return MinibatchTrace(torch.stack(before), torch.stack(after))
