"""A sequence as mini-batches: full ones go through the scan; one that a piece finds or leaves open runs outside it.

A stream's state is the weights that opened its current mini-batch, the gradients summed over the tokens read of that
mini-batch, and their count. Streams of a batch may be at different positions, and of a batch with a mask they read
different numbers of tokens. Nothing here waits for the device to learn these numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.constants import Precision
from ttt.ops.fused import fused_minibatch, fused_scan
from ttt.ops.mlp import mlp_minibatch, mlp_scan, move
from ttt.ops.reference import reference
from ttt.ops.rows import Rows, Tokens
from ttt.ops.select import Implementation, forced_implementation, implementation
from ttt.ops.triton.operator import triton_minibatch, triton_scan

Weights = tuple[Tensor, ...]


class Stream(NamedTuple):
    """The state of B streams."""

    weights: Weights
    """The weights that opened the current mini-batch: `W [B,H,in,out]` and `b [B,H,1,out]` of each layer in turn."""
    gradients: Weights | None = None
    """`Σ_j η_j ∇ℓ_j(W)` over the tokens read of it, in the same shapes; None if no stream has read any."""
    count_B: Tensor | None = None
    """How many tokens have been read of it, int64, 0 … C−1; None if `gradients` is None."""


class Inner(NamedTuple):
    """Everything that a layer's inner learning needs apart from the sequence and the state."""

    gamma_H1F: Tensor
    beta_H1F: Tensor
    scale_C: Tensor
    """Step size by position in the mini-batch: `max(1/i + δ_i, 0)` if the update is causal, else 1/C."""
    causal: bool
    eps: float
    precision: Precision = "ieee"
    """In what the operands of the inner model's products are multiplied."""

    @property
    def mini_batch_size(self) -> int:
        """`C`."""
        return self.scale_C.shape[0]

    @property
    def learned(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors `γ`, `β` and `s`, in the order in which a scan takes them."""
        return self.gamma_H1F, self.beta_H1F, self.scale_C


def _chosen(weights: Weights, tokens: Tokens, mini_batches: int | None = None) -> Implementation:
    q = tokens.q
    widths = (q.shape[-1], *(w.shape[-1] for w in weights[::2]))
    return implementation(
        device_type=q.device.type,
        dtypes={x.dtype for x in (*tokens, *weights)},
        mini_batches=mini_batches,
        numbers=q.shape[0] * q.shape[1] * q.shape[-2] * max(widths),
        widths=widths,
        size=q.shape[-2],
    )


def answer_minibatch(
    weights: Weights, gradients: Weights | None, tokens: Tokens, inner: Inner, scale_BC: Tensor
) -> tuple[Tensor, Weights]:
    """Answer one mini-batch that may be open, with step sizes `[B,C]` or `[1,C]`; also return its summed gradients."""
    norms = inner.gamma_H1F, inner.beta_H1F
    chosen = _chosen(weights, tokens)
    if chosen in ("fused", "triton"):
        answered = fused_minibatch if chosen == "fused" else triton_minibatch
        return answered(
            weights, gradients, *tokens, *norms, scale_BC, causal=inner.causal, eps=inner.eps, precision=inner.precision
        )
    return mlp_minibatch(
        weights,
        gradients,
        *tokens,
        *norms,
        scale_BC[:, None, :, None],
        causal=inner.causal,
        eps=inner.eps,
        precision=inner.precision,
    )


def _scan_for(weights: Weights, cells: Tokens) -> Callable[..., tuple[Tensor, Weights]]:
    """The implementation that scans closed mini-batches, `[B,H,N,C,F]`."""
    chosen = _chosen(weights, cells, cells.q.shape[2])
    return fused_scan if chosen == "fused" else triton_scan if chosen == "triton" else mlp_scan


def learn(
    tokens: Tokens, stream: Stream, inner: Inner, *, group_size: int, mask_BT: Tensor | None = None
) -> tuple[Tensor, Stream]:
    """Answer a sequence or a piece of one, learning from it on the way.

    If the update is causal, a sequence in pieces of any length gives the same answers and final state as the whole. A
    non-causal mini-batch closes at the end of the sequence, as if tokens of zero rate filled it, so pieces must be
    multiples of C.

    A masked token does not exist for the learning: each row is read as if only its counted tokens stood there, one
    after the other. So a non-causal mini-batch closes at the end of the row's own tokens.

    Args:
        tokens: `[B,H,T,F]` and rates `[B,H,T,1]`, in the type of the fast weights.
        stream: the state before the first token.
        inner: norms, step sizes, kind of update.
        group_size: `scan_checkpoint_group_size`; it changes memory and time only.
        mask_BT: bool, true for tokens that count; None means all. What the others hold reaches nothing, NaN neither.

    Returns:
        `z [B,H,T,F]`, zeros for tokens that do not count, and the state after the last token.

    Raises:
        ValueError: the update is not causal and a mini-batch is open, or `TTT_OPS` names an implementation that cannot
            run here.
    """
    if not inner.causal and stream.count_B is not None:
        raise ValueError("a non-causal mini-batch is never left open; this state comes from a causal layer")
    if forced_implementation() == "reference":
        return _learn_by_definition(tokens, stream, inner, mask_BT)
    opened = stream.gradients is not None and stream.count_B is not None and inner.causal
    if not opened and mask_BT is None:
        return _learn_from_boundary(tokens, stream.weights, inner, group_size)
    if opened and tokens.q.shape[2] == 1:
        return _learn_one(tokens, stream, inner, mask_BT)
    rows = Rows.of(tokens, mask_BT)
    z, after = (_learn_from_anywhere if opened else _learn_rows_from_boundary)(rows, stream, inner, group_size)
    return z, after if mask_BT is None else _read_by(rows.length_B > 0, after, stream)


def _learn_by_definition(tokens: Tokens, stream: Stream, inner: Inner, mask_BT: Tensor | None) -> tuple[Tensor, Stream]:
    """`learn` token by token, by `ttt.ops.reference`."""
    if tokens.q.is_meta:
        raise ValueError("TTT_OPS=reference computes on real tensors, not on the device meta; unset it")
    if inner.precision != "ieee":
        raise ValueError(f"TTT_OPS=reference rounds no operands to {inner.precision}; unset it, or write ieee")
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
            mask=None if mask_BT is None else mask_BT.tolist(),
        )
    if not torch.is_grad_enabled():
        z, weights, gradients = z.detach(), *(tuple(x.detach() for x in group) for group in (weights, gradients))
    if stream.count_B is None and not any(counts):
        return z, Stream(weights)
    return z, Stream(weights, gradients, torch.tensor(counts, device=z.device))


def _learn_from_boundary(tokens: Tokens, weights: Weights, inner: Inner, group_size: int) -> tuple[Tensor, Stream]:
    """`learn` if the first token opens a mini-batch in every row."""
    length, size = tokens.q.shape[2], inner.mini_batch_size
    rest = length % size
    parts = []
    if length >= size:
        full = tokens.map(lambda x: x[:, :, : length - rest].unflatten(2, (-1, size)))
        z, weights = _scan_for(weights, full)(
            weights,
            *full,
            *inner.learned,
            causal=inner.causal,
            eps=inner.eps,
            precision=inner.precision,
            group_size=group_size,
        )
        parts.append(z.flatten(2, 3))
    if not rest:
        return parts[0], Stream(weights)
    z, gradients = answer_minibatch(
        weights, None, tokens.map(lambda x: x[:, :, length - rest :]), inner, inner.scale_C[None, :rest]
    )
    parts.append(z)
    if not inner.causal:
        return torch.cat(parts, dim=2), Stream(move(weights, gradients, inner.scale_C[-1]))
    count = torch.full((z.shape[0],), rest, dtype=torch.int64, device=z.device)
    return torch.cat(parts, dim=2), Stream(weights, gradients, count)


def _learn_one(tokens: Tokens, stream: Stream, inner: Inner, mask_B1: Tensor | None) -> tuple[Tensor, Stream]:
    """`learn` for one token of each row; rows may be at different positions of their mini-batches."""
    assert stream.count_B is not None
    if mask_B1 is not None:
        read = mask_B1[:, None, :, None]
        tokens = tokens.map(lambda x: torch.where(read, x, 0))
    scale = inner.scale_C[stream.count_B][:, None]
    z, gradients = answer_minibatch(stream.weights, stream.gradients, tokens, inner, scale)
    count_B = stream.count_B + (1 if mask_B1 is None else mask_B1[:, 0])
    closed = count_B == inner.mini_batch_size
    weights = move(stream.weights, gradients, inner.scale_C[-1], closed)
    after = Stream(weights, _zero_where(closed, gradients), torch.where(closed, 0, count_B))
    if mask_B1 is None:
        return z, after
    return torch.where(read, z, 0), _read_by(mask_B1[:, 0], after, stream)


def _learn_from_anywhere(rows: Rows, stream: Stream, inner: Inner, group_size: int) -> tuple[Tensor, Stream]:
    """`learn` if rows may be at different positions of their mini-batches: each row is laid out from its own.

    Row b first continues its open mini-batch. Then it fills as many more as it can, which go through the scan. Its last
    tokens, the tail, stay in an open mini-batch. No part is wider than the piece, even if a mini-batch is.
    """
    weights, count_B = stream.weights, stream.count_B
    assert count_B is not None
    length, size = rows.tokens.q.shape[2], inner.mini_batch_size
    width = min(length, size)
    slots = torch.arange(width, device=count_B.device)
    room_B = size - count_B

    first = rows.at(torch.where(slots < room_B[:, None], slots, length))
    first_scale = inner.scale_C[(count_B[:, None] + slots).clamp_max(size - 1)]
    z, first_gradients = answer_minibatch(weights, stream.gradients, first, inner, first_scale)
    closed_B = room_B <= rows.length_B
    weights = move(weights, first_gradients, inner.scale_C[-1], closed_B)

    cells = (length - 1) // size  # as many as a row whose open mini-batch lacks one token can fill
    parts, index_BT, weights, tail_gradients = _learn_onwards(
        rows, room_B, weights, inner, cells=cells, tail=width, group_size=group_size
    )
    index_BT = torch.where(index_BT < 0, rows.place_BT, width + index_BT)
    open_gradients = tuple(
        torch.where(closed_B[:, None, None, None], t, f) for t, f in zip(tail_gradients, first_gradients, strict=True)
    )
    after = Stream(weights, open_gradients, (count_B + rows.length_B) % size)
    return rows.answers([z, *parts], index_BT), after


def _learn_rows_from_boundary(rows: Rows, stream: Stream, inner: Inner, group_size: int) -> tuple[Tensor, Stream]:
    """`learn` if the first token opens a mini-batch in every row, and rows have different numbers of tokens."""
    length, size = rows.tokens.q.shape[2], inner.mini_batch_size
    start_B = torch.zeros_like(rows.length_B)
    if inner.causal and size > 1:
        parts, index_BT, weights, gradients = _learn_onwards(
            rows,
            start_B,
            stream.weights,
            inner,
            cells=length // size,
            tail=min(length, size - 1),
            group_size=group_size,
        )
        return rows.answers(parts, index_BT), Stream(weights, gradients, rows.length_B % size)
    # Every mini-batch closes, so that all go through the scan; zero rates fill a row's last one.
    cells = -(-length // size)
    z, weights = _scan_rows(rows, start_B, -(-rows.length_B // size), stream.weights, inner, cells, group_size)
    return rows.answers([z], rows.place_BT), Stream(weights)


def _learn_onwards(
    rows: Rows, start_B: Tensor, weights: Weights, inner: Inner, *, cells: int, tail: int, group_size: int
) -> tuple[list[Tensor], Tensor, Weights, Weights]:
    """Read each row from its place `start` on, where a mini-batch opens.

    No row fills more than `cells` mini-batches, nor has more than `tail` tokens after them.

    Returns:
        Answers of the filled mini-batches and of the tails; where in them a token has its own, negative before `start`;
        the weights that opened the tails; the tails' summed gradients.
    """
    size = inner.mini_batch_size
    full_B = (rows.length_B - start_B).clamp_min(0) // size
    parts: list[Tensor] = []
    if cells:
        z, weights = _scan_rows(rows, start_B, full_B, weights, inner, cells, group_size)
        parts.append(z)
    tail_B = start_B + full_B * size
    slots = torch.arange(tail, device=start_B.device)
    z, gradients = answer_minibatch(weights, None, rows.at(tail_B[:, None] + slots), inner, inner.scale_C[None, :tail])
    after_start, in_tail = rows.place_BT - start_B[:, None], rows.place_BT - tail_B[:, None]
    return [*parts, z], torch.where(in_tail < 0, after_start, cells * size + in_tail), weights, gradients


def _scan_rows(
    rows: Rows, start_B: Tensor, closed_B: Tensor, weights: Weights, inner: Inner, cells: int, group_size: int
) -> tuple[Tensor, Weights]:
    """Scan `cells` mini-batches of each row from its place `start` on, of which the first `closed_B[b]` close."""
    size = inner.mini_batch_size
    places = start_B[:, None] + torch.arange(cells * size, device=start_B.device)
    grid = rows.at(places).map(lambda x: x.unflatten(2, (cells, size)))
    closed_NB = torch.arange(cells, device=start_B.device)[:, None] < closed_B
    z, weights = _scan_for(weights, grid)(
        weights,
        *grid,
        *inner.learned,
        closed_NB,
        causal=inner.causal,
        eps=inner.eps,
        precision=inner.precision,
        group_size=group_size,
    )
    return z.flatten(2, 3), weights


def _read_by(rows_B: Tensor, after: Stream, before: Stream) -> Stream:
    """`after` for the rows that read a token; the others keep their state bit for bit, whatever it holds."""
    still = ~rows_B[:, None, None, None]
    weights = tuple(torch.where(still, b, a) for a, b in zip(after.weights, before.weights, strict=True))
    if after.gradients is None:
        return Stream(weights)
    if before.gradients is None:
        return Stream(weights, _zero_where(~rows_B, after.gradients), after.count_B)
    gradients = tuple(torch.where(still, b, a) for a, b in zip(after.gradients, before.gradients, strict=True))
    return Stream(weights, gradients, after.count_B)


def _zero_where(rows: Tensor, tensors: Weights) -> Weights:
    return tuple(torch.where(rows[:, None, None, None], 0, x) for x in tensors)
