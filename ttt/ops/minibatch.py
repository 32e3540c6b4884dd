"""A sequence as mini-batches: full ones through the scan, those that a piece leaves open or finds open beside it.

A stream's state is the weights that opened its current mini-batch, the gradients summed over the tokens read of it,
and how many those are. Streams of a batch may stand at different places; nothing here waits for the device to know
where.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt.ops.fused import fused_minibatch, fused_scan
from ttt.ops.linear import linear_minibatch, linear_model
from ttt.ops.mlp import gelu, gelu_gradient, mlp_minibatch, mlp_model
from ttt.ops.norm import inner_loss, inner_loss_gradient, layer_norm
from ttt.ops.reference import reference
from ttt.ops.scan import scan
from ttt.ops.select import Implementation, forced_implementation, implementation

Weights = tuple[Tensor, ...]


class Stream(NamedTuple):
    """The state of B streams."""

    weights: Weights
    """What opened the current mini-batch: `W [B,H,in,out]`, `b [B,H,1,out]`, in turn."""
    gradients: Weights | None = None
    """`Σ_j η_j ∇ℓ_j(W)` over the tokens read of it, in the same shapes; None where no stream has read any."""
    count_B: Tensor | None = None
    """How many tokens those are, int64, 0 … C−1; None with `gradients`."""


class Inner(NamedTuple):
    """What a layer's inner learning is made of, apart from the sequence and the state."""

    gamma_H1F: Tensor
    beta_H1F: Tensor
    scale_C: Tensor
    """Step size by position in the mini-batch: `max(1/i + δ_i, 0)`, or 1/C everywhere where not causal."""
    causal: bool
    eps: float

    @property
    def mini_batch_size(self) -> int:
        """`C`."""
        return self.scale_C.shape[0]


class Tokens(NamedTuple):
    """What the tokens of a sequence bring, `[B,H,T,F]`, and their rates `[B,H,T,1]`."""

    q: Tensor
    k: Tensor
    target: Tensor
    rate: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """The function of each."""
        return Tokens(*(function(x) for x in self))


def _minibatch(weights: Weights) -> Callable[..., tuple[Tensor, Weights]]:
    return linear_minibatch if len(weights) == 2 else mlp_minibatch


def _chosen(weights: Weights, tokens: Tokens, mini_batches: int | None = None) -> Implementation:
    q = tokens.q
    widest = max(w.shape[-1] for w in weights)
    return implementation(
        device_type=q.device.type,
        dtypes={x.dtype for x in (*tokens, *weights)},
        mini_batches=mini_batches,
        numbers=q.shape[0] * q.shape[1] * q.shape[-2] * widest,
    )


def _answer(
    weights: Weights, gradients: Weights | None, tokens: Tokens, inner: Inner, scale_BC: Tensor
) -> tuple[Tensor, Weights]:
    """One mini-batch and the gradients that it sums, by step sizes `[B,C]` or `[1,C]`."""
    norms = inner.gamma_H1F, inner.beta_H1F
    if _chosen(weights, tokens) == "fused":
        return fused_minibatch(weights, gradients, *tokens, *norms, scale_BC, causal=inner.causal, eps=inner.eps)
    minibatch = _minibatch(weights)
    return minibatch(
        weights, gradients, *tokens, *norms, scale_BC[:, None, :, None], causal=inner.causal, eps=inner.eps
    )


def _move(weights: Weights, gradients: Weights, scale: Tensor, where: Tensor | None = None) -> Weights:
    """The weights that open the next mini-batch, `W − s_C G`; only for rows `where [B]` is true."""
    if where is not None:
        scale = torch.where(where, scale, 0)[:, None, None, None]
    return tuple(w - scale * g for w, g in zip(weights, gradients, strict=True))


def _scan_full(
    weights: Weights, cells: Tokens, inner: Inner, group_size: int, closed_NB: Tensor | None = None
) -> tuple[Tensor, Weights]:
    """Scan over mini-batches `[B,H,N,C,F]`; those rows that do not fill one leave it as it was (`closed_NB`)."""
    eps, causal, scale_C = inner.eps, inner.causal, inner.scale_C
    if _chosen(weights, cells, cells.q.shape[2]) == "fused":
        last_NB = scale_C[-1:, None] if closed_NB is None else torch.where(closed_NB, scale_C[-1], 0)
        norms = inner.gamma_H1F, inner.beta_H1F
        z, weights = fused_scan(
            weights, *cells, *norms, scale_C, last_NB, causal=causal, eps=eps, group_size=group_size
        )
        return z.flatten(2, 3), weights
    minibatch = _minibatch(weights)

    def step(carry: Weights, x: dict[str, Any], gamma: Tensor, beta: Tensor, scale_C: Tensor) -> tuple[Weights, Tensor]:
        scale_C1 = scale_C[:, None]
        z, gradients = minibatch(carry, None, *x["tokens"], gamma, beta, scale_C1, causal=causal, eps=eps)
        return _move(carry, gradients, scale_C[-1], x.get("closed")), z

    columns: dict[str, Any] = {"tokens": cells.map(lambda x: x.movedim(2, 0))}
    if closed_NB is not None:
        columns["closed"] = closed_NB
    weights, z_NBHCF = scan(
        step,
        weights,
        columns,
        consts=(inner.gamma_H1F, inner.beta_H1F, inner.scale_C),
        group_size=group_size,
    )
    return z_NBHCF.movedim(0, 2).flatten(2, 3), weights


def learn(tokens: Tokens, stream: Stream, inner: Inner, *, group_size: int) -> tuple[Tensor, Stream]:
    """Answer a sequence or a piece of one, learning from it on the way.

    In pieces of any lengths the answers and the final state are those of the whole (causal). A non-causal mini-batch
    closes where the sequence ends, as if tokens of zero rate filled it: its pieces are multiples of C.

    Args:
        tokens: `[B,H,T,F]` and rates `[B,H,T,1]`, in the type that the fast weights have.
        stream: the state before the first token.
        inner: norms, step sizes, kind of update.
        group_size: `scan_checkpoint_group_size`; memory and time only.

    Returns:
        `z [B,H,T,F]` and the state after the last token.

    Raises:
        ValueError: a non-causal layer is given an open mini-batch, or `TTT_OPS` asks for what cannot run.
    """
    if not inner.causal and stream.count_B is not None:
        raise ValueError("a non-causal mini-batch is never left open; this state comes from a causal layer")
    if forced_implementation() == "reference":
        return _learn_by_definition(tokens, stream, inner)
    if not inner.causal:
        return _learn_from_boundary(tokens, stream.weights, inner, group_size)
    if stream.gradients is None or stream.count_B is None:
        return _learn_from_boundary(tokens, stream.weights, inner, group_size)
    if tokens.q.shape[2] == 1:
        return _learn_one(tokens, stream.weights, stream.gradients, stream.count_B, inner)
    return _learn_from_anywhere(tokens, stream.weights, stream.gradients, stream.count_B, inner, group_size)


def _learn_by_definition(tokens: Tokens, stream: Stream, inner: Inner) -> tuple[Tensor, Stream]:
    """Token by token, for whoever doubts the rest."""
    if tokens.q.is_meta:
        raise ValueError("TTT_OPS=reference computes on real tensors, not on the device meta; unset it")
    offset_C = inner.scale_C - 1 / torch.arange(1, inner.mini_batch_size + 1).to(inner.scale_C)
    with contextlib.nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
        z, weights, gradients, counts = reference(
            *tokens[:3],
            tokens.rate.squeeze(-1),
            stream.weights,
            inner.gamma_H1F.squeeze(1),
            inner.beta_H1F.squeeze(1),
            mini_batch_size=inner.mini_batch_size,
            causal=inner.causal,
            eps=inner.eps,
            offset_C=offset_C if inner.causal else None,
            gradients=stream.gradients,
            count=None if stream.count_B is None else stream.count_B.tolist(),
        )
    if not torch.is_grad_enabled():
        z, weights, gradients = z.detach(), *(tuple(x.detach() for x in group) for group in (weights, gradients))
    if stream.count_B is None and not any(counts):
        return z, Stream(weights)
    return z, Stream(weights, gradients, torch.tensor(counts, device=z.device))


def _learn_from_boundary(tokens: Tokens, weights: Weights, inner: Inner, group_size: int) -> tuple[Tensor, Stream]:
    """Every row opens a mini-batch with the first token."""
    length, size = tokens.q.shape[2], inner.mini_batch_size
    rest = length % size
    parts = []
    if length >= size:
        full = tokens.map(lambda x: x[:, :, : length - rest].unflatten(2, (-1, size)))
        z, weights = _scan_full(weights, full, inner, group_size)
        parts.append(z)
    if not rest:
        return parts[0], Stream(weights)
    z, gradients = _answer(
        weights, None, tokens.map(lambda x: x[:, :, length - rest :]), inner, inner.scale_C[None, :rest]
    )
    parts.append(z)
    if not inner.causal:
        return torch.cat(parts, dim=2), Stream(_move(weights, gradients, inner.scale_C[-1]))
    count = torch.full((z.shape[0],), rest, dtype=torch.int64, device=z.device)
    return torch.cat(parts, dim=2), Stream(weights, gradients, count)


def _learn_one(
    tokens: Tokens, weights: Weights, gradients: Weights, count_B: Tensor, inner: Inner
) -> tuple[Tensor, Stream]:
    """One token for each row, wherever it stands in its mini-batch."""
    scale = inner.scale_C[count_B][:, None]
    z, gradients = _answer(weights, gradients, tokens, inner, scale)
    count_B = count_B + 1
    closed = count_B == inner.mini_batch_size
    weights = _move(weights, gradients, inner.scale_C[-1], closed)
    gradients = _zero_where(closed, gradients)
    return z, Stream(weights, gradients, torch.where(closed, 0, count_B))


@torch.no_grad()
def learn_one_(tokens: Tokens, stream: Stream, inner: Inner, rows_B: Tensor | None = None) -> Tensor:
    """`learn` for one token of each row, written to the tensors of `stream`: streaming without growth.

    The token's own gradient is summed before it is answered, so that the answer is `x (W − s_i G)` with nothing
    added, and every update is one pass over what it changes. No gradient flows through it.

    Args:
        tokens: `[B,H,1,F]` and rates `[B,H,1,1]`.
        stream: every tensor with memory of its own; gradients and count may be missing where C is 1.
        inner: norms, step sizes, kind of update.
        rows_B: rows that read their token; the others' state stays as it is, bit for bit. None is all of them.

    Returns:
        `z [B,H,1,F]`; what it holds in rows that read nothing is of no use.
    """
    weights, summed = stream.weights, stream.gradients
    q, k, target, rate = tokens
    depth = len(weights) // 2
    read = None if rows_B is None else rows_B[:, None, None, None]
    inputs, outputs = [k], []
    for layer in range(depth):
        outputs.append(inputs[layer] @ weights[2 * layer] + weights[2 * layer + 1])
        if layer + 1 < depth:
            inputs.append(gelu(outputs[layer]))
    error = inner_loss_gradient(outputs[-1], target, inner.gamma_H1F, inner.beta_H1F, eps=inner.eps)
    taught = [rate * error]
    for layer in range(depth - 1, 0, -1):
        error = error @ weights[2 * layer].mT * gelu_gradient(outputs[layer - 1])
        taught.insert(0, rate * error)
    if read is not None:  # both factors: a row that is paused may hold anything
        inputs = [torch.where(read, x, 0) for x in inputs]
        taught = [torch.where(read, u, 0) for u in taught]

    if summed is None or stream.count_B is None:
        scale = inner.scale_C[-1]
        for layer in range(depth):
            weights[2 * layer].addcmul_(inputs[layer].mT, taught[layer] * -scale)
            weights[2 * layer + 1].sub_(taught[layer] * scale)
    else:
        for layer in range(depth):
            summed[2 * layer].addcmul_(inputs[layer].mT, taught[layer])
            summed[2 * layer + 1].add_(taught[layer])
        scale = inner.scale_C[stream.count_B][:, None, None, None]
    x = q
    for layer in range(depth):
        y = x @ weights[2 * layer] + weights[2 * layer + 1]
        if summed is not None:
            y = y - scale * (x @ summed[2 * layer] + summed[2 * layer + 1])
        x = gelu(y) if layer + 1 < depth else y
    z = q + layer_norm(x, inner.gamma_H1F, inner.beta_H1F, eps=inner.eps)

    if summed is not None and stream.count_B is not None:
        stream.count_B.add_(1 if rows_B is None else rows_B)
        closed = stream.count_B == inner.mini_batch_size
        taken = torch.where(closed, -inner.scale_C[-1], 0)[:, None, None, None]
        for w, g in zip(weights, summed, strict=True):
            w.addcmul_(g, taken)
            g.masked_fill_(closed[:, None, None, None], 0)
        stream.count_B.masked_fill_(closed, 0)
    return z


def _learn_from_anywhere(
    tokens: Tokens, weights: Weights, gradients: Weights, count_B: Tensor, inner: Inner, group_size: int
) -> tuple[Tensor, Stream]:
    """Rows stand anywhere in their mini-batches: each is laid out from its own place.

    Row b goes on with the mini-batch that it has open, then fills `full_B[b]` more, which go through the scan, and ends
    inside one, its tail, whose gradients stay open. No part is wider than the piece, however large a mini-batch is.
    """
    length, size = tokens.q.shape[2], inner.mini_batch_size
    width = min(length, size)
    slots = torch.arange(width, device=count_B.device)
    room_B = size - count_B
    full_B = (length - room_B).clamp_min(0) // size

    first = _gather_tokens(tokens, torch.where(slots < room_B[:, None], slots, length))
    first_scale = inner.scale_C[(count_B[:, None] + slots).clamp_max(size - 1)]
    z, first_gradients = _answer(weights, gradients, first, inner, first_scale)
    parts = [z]
    closed_B = room_B <= length
    weights = _move(weights, first_gradients, inner.scale_C[-1], closed_B)

    cells = (length - 1) // size  # as many as a row with one slot left can fill
    if cells:
        places = room_B[:, None] + torch.arange(cells * size, device=count_B.device)
        grid = _gather_tokens(tokens, places).map(lambda x: x.unflatten(2, (cells, size)))
        full_NB = torch.arange(cells, device=count_B.device)[:, None] < full_B
        z, weights = _scan_full(weights, grid, inner, group_size, full_NB)
        parts.append(z)

    tail_B = room_B + full_B * size
    tail = _gather_tokens(tokens, tail_B[:, None] + slots)
    z, tail_gradients = _answer(weights, None, tail, inner, inner.scale_C[None, :width])
    parts.append(z)
    open_gradients = tuple(
        torch.where(closed_B[:, None, None, None], t, f) for t, f in zip(tail_gradients, first_gradients, strict=True)
    )

    token = torch.arange(length, device=count_B.device)
    after_first, in_tail = token - room_B[:, None], token - tail_B[:, None]
    part = torch.where(in_tail < 0, width + after_first, width + cells * size + in_tail)
    part = torch.where(after_first < 0, token, part)[:, None, :, None]
    state = Stream(weights, open_gradients, (count_B + length) % size)
    return torch.cat(parts, dim=2).gather(2, part.expand_as(tokens.q)), state


def _gather_tokens(tokens: Tokens, index_BT: Tensor) -> Tokens:
    """Tokens by their place, `[B,T']`; a place outside the sequence gives some token at zero rate."""
    length = tokens.q.shape[2]
    inside = ((index_BT >= 0) & (index_BT < length))[:, None, :, None]
    index = index_BT.clamp(0, length - 1)[:, None, :, None]

    def take(x: Tensor) -> Tensor:
        return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))

    q, k, target, rate = tokens.map(take)
    return Tokens(q, k, target, torch.where(inside, rate, 0))


def _zero_where(rows: Tensor, tensors: Weights) -> Weights:
    return tuple(torch.where(rows[:, None, None, None], 0, x) for x in tensors)


class InnerTrace(NamedTuple):
    """How the inner loss moved, for each mini-batch: means over streams, heads and tokens, `[N]`."""

    before: Tensor
    """At the weights that opened the mini-batch."""
    after: Tensor
    """At those weights after its step, on the same tokens."""


@torch.no_grad()
def trace(tokens: Tokens, stream: Stream, inner: Inner) -> InnerTrace:
    """The inner loss before and after the step of each mini-batch (of its share, where the sequence ends inside).

    Mini-batches are counted from the first token: an open one in `stream` is continued as if it opened here, with
    its weights. Arguments as in `learn`.
    """
    weights, size = stream.weights, inner.mini_batch_size
    model = linear_model if len(weights) == 2 else mlp_model
    before: list[Tensor] = []
    after: list[Tensor] = []
    for start in range(0, tokens.q.shape[2], size):
        part = tokens.map(lambda x, start=start: x[:, :, start : start + size])  # type: ignore[misc]
        read = part.q.shape[2]
        _, gradients = _answer(weights, None, part, inner, inner.scale_C[None, :read])
        moved = _move(weights, gradients, inner.scale_C[read - 1])
        for losses, at in ((before, weights), (after, moved)):
            z = model(at, part.k)
            losses.append(inner_loss(z, part.target, inner.gamma_H1F, inner.beta_H1F, eps=inner.eps).mean())
        weights = moved
    return InnerTrace(torch.stack(before), torch.stack(after))
