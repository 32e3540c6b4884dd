"""One token of each stream, in place, as Triton kernels: what `ttt.ops.decode` computes, from the same memory.

The open mini-batch is kept as factors, as there: of a token each layer's input `x_j` and what it teaches, `u_j`, in
slot `count mod K`; and where a stream began inside a mini-batch, a base `G` beside them. An MLP takes three launches.
The first two have a program for each row and head and tile of the hidden width, the last one for each row and head:

    keys      z_k = k W1 + b1,  z_q = q W1 + b1;   a part of gelu(z_k) W2;   the first tile: q·x_j of layer 1
    errors    E of the summed parts (every tile sums them in the same order);  u2 = η E
              u1 = (u2 W2ᵀ) gelu'(z_k);   y = z_q − s (q G1 + g_b1 + Σ_j (q·x_j) u_j)
              parts of gelu(y) (W2 − s G2) and of gelu(y)·x_j of layer 2;   slots are written;
              if the mini-batch closes: W1 −= s_C (G1 + X1ᵀ U1), W2 −= s_C (G2 + X2ᵀ U2), and the same of b1
    answers   the sum of the parts, − s (g_b2 + Σ_j (gelu(y)·x_j) u_j);  q + LN;  b2, and the count

So a token reads W1 once and W2 twice: 1.5 times the state. A closing mini-batch, once in C tokens, reads and writes it
once more. A linear inner model takes one launch with a program for each row and head, which holds W in registers, and a
small one for the counts.

Which rows read, close, or have a base is decided on the device, from `rows_B`, `count_B` and `based_B`: a program of a
row that pauses ends at once. The host reads nothing and every tensor stays where it is, so that the launches can be
captured in a CUDA graph. No program reads what another one of its launch writes.

Products of a vector and a matrix are sums, exact in the type of the weights. Only the closing update is a `tl.dot`.
None of this has run on a GPU; it is proven in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt.ops.factors import Factors, slots_for
from ttt.ops.minibatch import Inner, Stream
from ttt.ops.rows import Tokens
from ttt.ops.triton.forms import Form
from ttt.ops.triton.mlp_parts import gelu_parts, gelu_slope, normalised, projected

TILE = 32
"""Hidden units of a program: at F 128 two tiles of 4,096 numbers, 64 registers of each of 128 threads."""
BASED = tl.constexpr(1 << 20)
"""Added to a row's place if it has a base; C is smaller."""


@triton.jit
def _error(z, target, gamma, beta, rate, F: tl.constexpr, EPS: tl.constexpr):
    """`u = η E` of one token, `[F]`."""
    unit, inverse = normalised(z[None, :], F, EPS)
    r = gamma[None, :] * (gamma[None, :] * unit + beta[None, :] - target[None, :])
    return rate * tl.sum(inverse * projected(r, unit, F), 0)


@triton.jit
def _slots(held, p, rows, columns, K: tl.constexpr, WIDTH: tl.constexpr):
    """Where slots lie in `[P,K,WIDTH]`."""
    return held + (p.to(tl.int64) * K + rows) * WIDTH + columns


@triton.jit
def _move(weight, base, sums, at, scale, closes, based):
    """Where factors are full: add their sum `X^T U` and the base to the weights, or the sum to the base."""
    tl.debug_barrier()  # what this program reads of the tile, every thread has read
    g = tl.load(base + at, mask=based, other=0)
    if closes:
        tl.store(weight + at, tl.load(weight + at) - scale * (sums + g))
        tl.store(base + at, tl.zeros_like(sums), mask=based)
    else:
        tl.store(base + at, sums + g)


@triton.jit
def mlp_keys(
    q, k, w1, b1, w2, x1, count_b, rows_b, based_b, hidden, asked, seen, parts, places, heads,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`hidden`, `asked` `[P,HIDDEN]`: `z_k`, `z_q`. `seen [P,SLOTS]`: `q·x_j`. `parts [P,tiles,F]`: of `gelu(z_k) W2`.

    `places [P]` tells the other launches where the row stands: its count, −1 if it pauses; plus `BASED` with a base.
    """
    p, tile = tl.program_id(0), tl.program_id(1)
    row = p // heads
    count = tl.load(count_b + row).to(tl.int32)
    place = count + BASED * tl.load(based_b + row).to(tl.int32)
    if ROWS:
        place = tl.where(tl.load(rows_b + row) != 0, place, -1)
    if tile == 0:
        tl.store(places + p, place)
    if place >= 0:
        f, columns = tl.arange(0, F), tile * TILE + tl.arange(0, TILE)
        query, key = tl.load(q + p * F + f), tl.load(k + p * F + f)
        w = tl.load(w1 + p.to(tl.int64) * F * HIDDEN + f[:, None] * HIDDEN + columns[None, :])
        b = tl.load(b1 + p * HIDDEN + columns)
        z_k, z_q = tl.sum(key[:, None] * w, 0) + b, tl.sum(query[:, None] * w, 0) + b
        tl.store(hidden + p * HIDDEN + columns, z_k)
        tl.store(asked + p * HIDDEN + columns, z_q)
        value, _ = gelu_parts(z_k)
        w = tl.load(w2 + p.to(tl.int64) * F * HIDDEN + columns[:, None] * F + f[None, :])
        tl.store(parts + (p * (HIDDEN // TILE) + tile) * F + f, tl.sum(value[:, None] * w, 0))
        if tile == 0:
            j, slot = tl.arange(0, SLOTS), count % K
            x = tl.load(_slots(x1, p, j[:, None], f[None, :], K, F), mask=(j < slot)[:, None], other=0)
            x = tl.where((j == slot)[:, None], key[None, :], x)
            tl.store(seen + p * SLOTS + j, tl.sum(x * query[None, :], 1))


@triton.jit
def mlp_errors(
    q, k, target, rate, gamma, beta, scale, w1, b1, w2, b2, g1, c1, g2, c2, x1, u1, x2, u2,
    hidden, asked, seen, parts, answered, hidden_seen, places, heads,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    C: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """`answered [P,tiles,F]`: parts of `gelu(y) (W2 − s G2)`; `hidden_seen [P,tiles,SLOTS]`: of `gelu(y)·x_j`."""
    p, tile = tl.program_id(0), tl.program_id(1)
    place = tl.load(places + p)
    if place >= 0:
        based, count = place >= BASED, place % BASED
        slot, head = count % K, p % heads
        f, columns, j = tl.arange(0, F), tile * TILE + tl.arange(0, TILE), tl.arange(0, SLOTS)
        first_at = p.to(tl.int64) * F * HIDDEN + f[:, None] * HIDDEN + columns[None, :]
        second_at = p.to(tl.int64) * F * HIDDEN + columns[:, None] * F + f[None, :]
        # The inner loss's error, and the way back through W2.
        z = tl.load(b2 + p * F + f)
        for other in range(HIDDEN // TILE):
            z += tl.load(parts + (p * (HIDDEN // TILE) + other) * F + f)
        gamma_F, beta_F = tl.load(gamma + head * F + f), tl.load(beta + head * F + f)
        taught2 = _error(z, tl.load(target + p * F + f), gamma_F, beta_F, tl.load(rate + p), F, EPS)
        w = tl.load(w2 + second_at)
        z_k = tl.load(hidden + p * HIDDEN + columns)
        value, gate = gelu_parts(z_k)
        taught1 = tl.sum(w * taught2[None, :], 1) * gelu_slope(z_k, value, gate)
        # The query through both layers.
        s = tl.load(scale + count)
        errors = tl.load(_slots(u1, p, j[:, None], columns[None, :], K, HIDDEN), mask=(j < slot)[:, None], other=0)
        errors = tl.where((j == slot)[:, None], taught1[None, :], errors)
        bias = tl.load(c1 + p * HIDDEN + columns) + taught1
        step = bias + tl.sum(tl.load(seen + p * SLOTS + j)[:, None] * errors, 0)
        if based:
            step += tl.sum(tl.load(q + p * F + f)[:, None] * tl.load(g1 + first_at), 0)
        y, _ = gelu_parts(tl.load(asked + p * HIDDEN + columns) - s * step)
        answer = tl.sum(y[:, None] * w, 0)
        if based:
            answer -= s * tl.sum(y[:, None] * tl.load(g2 + second_at), 0)
        tl.store(answered + (p * (HIDDEN // TILE) + tile) * F + f, answer)
        inputs = tl.load(_slots(x2, p, j[None, :], columns[:, None], K, HIDDEN), mask=(j < slot)[None, :], other=0)
        inputs = tl.where((j == slot)[None, :], value[:, None], inputs)
        tl.store(hidden_seen + (p * (HIDDEN // TILE) + tile) * SLOTS + j, tl.sum(inputs * y[:, None], 0))
        # What the token leaves behind.
        key, closes, last = tl.load(k + p * F + f), count + 1 == C, tl.load(scale + C - 1)
        if (slot + 1 == K) | closes:
            x = tl.load(_slots(x1, p, j[None, :], f[:, None], K, F), mask=(j < slot)[None, :], other=0)
            x = tl.where((j == slot)[None, :], key[:, None], x)
            _move(w1, g1, tl.dot(x, errors, input_precision="ieee"), first_at, last, closes, based)
            u = tl.load(_slots(u2, p, j[:, None], f[None, :], K, F), mask=(j < slot)[:, None], other=0)
            u = tl.where((j == slot)[:, None], taught2[None, :], u)
            _move(w2, g2, tl.dot(inputs, u, input_precision="ieee"), second_at, last, closes, based)
            tl.store(_slots(u1, p, j[:, None], columns[None, :], K, HIDDEN), tl.zeros_like(errors), (j < K)[:, None])
        else:
            tl.store(_slots(u1, p, slot, columns, K, HIDDEN), taught1)
            tl.store(_slots(x2, p, slot, columns, K, HIDDEN), value)
        if closes:
            at = p * HIDDEN + columns
            tl.store(b1 + at, tl.load(b1 + at) - last * bias)
            bias = tl.zeros_like(bias)
        tl.store(c1 + p * HIDDEN + columns, bias)
        if tile == 0:  # no tile of this launch reads these
            tl.store(_slots(x1, p, slot, f, K, F), key)
            tl.store(_slots(u2, p, slot, f, K, F), taught2)
            tl.store(c2 + p * F + f, tl.load(c2 + p * F + f) + taught2)


@triton.jit
def mlp_answers(
    q, gamma, beta, scale, b2, c2, u2, answered, hidden_seen, answers, places, count_b, based_b, heads,
    F: tl.constexpr, TILES: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """`answers [P,F]`; and where a mini-batch closes, the second bias."""
    p = tl.program_id(0)
    place = tl.load(places + p)
    if place >= 0:
        count = place % BASED
        slot, head, closes = count % K, p % heads, count + 1 == C
        f, j = tl.arange(0, F), tl.arange(0, SLOTS)
        bias, summed = tl.load(b2 + p * F + f), tl.load(c2 + p * F + f)
        z, seen = bias, tl.zeros([SLOTS], bias.dtype)
        for tile in range(TILES):
            z += tl.load(answered + (p * TILES + tile) * F + f)
            seen += tl.load(hidden_seen + (p * TILES + tile) * SLOTS + j)
        u_at = _slots(u2, p, j[:, None], f[None, :], K, F)
        u = tl.load(u_at, mask=(j <= slot)[:, None], other=0)
        z -= tl.load(scale + count) * (summed + tl.sum(seen[:, None] * u, 0))
        unit, _ = normalised(z[None, :], F, EPS)
        normed = tl.load(gamma + head * F + f) * tl.sum(unit, 0) + tl.load(beta + head * F + f)
        tl.store(answers + p * F + f, tl.load(q + p * F + f) + normed)
        if (slot + 1 == K) | closes:
            tl.debug_barrier()
            tl.store(u_at, tl.zeros_like(u), mask=(j < K)[:, None])
        if closes:
            tl.store(b2 + p * F + f, bias - tl.load(scale + C - 1) * summed)
            tl.store(c2 + p * F + f, tl.zeros_like(summed))
        if head == 0:
            _count(count_b + p // heads, based_b + p // heads, place, K, C)


@triton.jit
def _count(count_b, based_b, place, K: tl.constexpr, C: tl.constexpr):
    """Count a row's token."""
    count, based = place % BASED, place >= BASED
    closes = count + 1 == C
    tl.store(count_b, tl.where(closes, 0, count + 1).to(tl.int64))
    tl.store(based_b, ((based | ((count + 1) % K == 0)) & (closes == 0)).to(tl.int8))


@triton.jit
def linear_token(
    q, k, target, rate, gamma, beta, scale, w1, b1, g1, c1, x1, u1, count_b, rows_b, based_b, answers, heads,
    F: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All of one row and head but the count."""
    p = tl.program_id(0)
    row, head = p // heads, p % heads
    reads = tl.load(rows_b + row) != 0 if ROWS else True
    if reads:
        count, based = tl.load(count_b + row).to(tl.int32), tl.load(based_b + row) != 0
        slot, closes = count % K, count + 1 == C
        f, j = tl.arange(0, F), tl.arange(0, SLOTS)
        at = p.to(tl.int64) * F * F + f[:, None] * F + f[None, :]
        query, key, w = tl.load(q + p * F + f), tl.load(k + p * F + f), tl.load(w1 + at)
        b = tl.load(b1 + p * F + f)
        gamma_F, beta_F = tl.load(gamma + head * F + f), tl.load(beta + head * F + f)
        z = tl.sum(key[:, None] * w, 0) + b
        taught = _error(z, tl.load(target + p * F + f), gamma_F, beta_F, tl.load(rate + p), F, EPS)
        x = tl.load(_slots(x1, p, j[None, :], f[:, None], K, F), mask=(j < slot)[None, :], other=0)
        x = tl.where((j == slot)[None, :], key[:, None], x)
        u_at = _slots(u1, p, j[:, None], f[None, :], K, F)
        u = tl.load(u_at, mask=(j < slot)[:, None], other=0)
        u = tl.where((j == slot)[:, None], taught[None, :], u)
        summed = tl.load(c1 + p * F + f) + taught
        step = summed + tl.sum(tl.sum(x * query[:, None], 0)[:, None] * u, 0)
        if based:
            step += tl.sum(query[:, None] * tl.load(g1 + at), 0)
        y = tl.sum(query[:, None] * w, 0) + b - tl.load(scale + count) * step
        unit, _ = normalised(y[None, :], F, EPS)
        tl.store(answers + p * F + f, query + gamma_F * tl.sum(unit, 0) + beta_F)
        last = tl.load(scale + C - 1)
        if (slot + 1 == K) | closes:
            _move(w1, g1, tl.dot(x, u, input_precision="ieee"), at, last, closes, based)
            tl.store(u_at, tl.zeros_like(u), mask=(j < K)[:, None])
        else:
            tl.store(_slots(x1, p, slot, f, K, F), key)
            tl.store(_slots(u1, p, slot, f, K, F), taught)
        if closes:
            tl.store(b1 + p * F + f, b - last * summed)
            summed = tl.zeros_like(summed)
        tl.store(c1 + p * F + f, summed)


@triton.jit
def linear_counts(count_b, rows_b, based_b, K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    """The rows' counts, after every head has read them."""
    row = tl.program_id(0)
    reads = tl.load(rows_b + row) != 0 if ROWS else True
    if reads:
        count, based = tl.load(count_b + row).to(tl.int32), tl.load(based_b + row).to(tl.int32)
        _count(count_b + row, based_b + row, count + BASED * based, K, C)


def triton_learn_one_(tokens: Tokens, stream: Stream, inner: Inner, rows_B: Tensor | None, factors: Factors) -> Tensor:
    """`ttt.ops.decode.learn_one_` for open mini-batches with factors, C > 1.

    Raises:
        ValueError: the kernels have no form for these widths.
    """
    assert stream.gradients is not None
    assert stream.count_B is not None
    weights, width = stream.weights, tokens.q.shape[-1]
    hidden = None if len(weights) == 2 else weights[0].shape[-1]
    if len(weights) > 4 or width & (width - 1) or width < 16 or (hidden is not None and hidden % TILE):
        raise ValueError(
            f"TTT_OPS=triton decodes with inner models of one or two layers, heads of 16, 32, 64, … and a hidden width "
            f"that {TILE} divides, not of the widths {[w.shape[-2] for w in weights[::2]] + [width]}; unset it"
        )
    q, k, target, rate = (x.contiguous() for x in tokens)
    gamma, beta, scale = (x.contiguous() for x in inner.learned)
    answers, heads = torch.empty_like(q), q.shape[1]
    rows = factors.based_B if rows_B is None else rows_B.contiguous()  # without rows nothing is read of it
    slots = {"K": factors.slots, "SLOTS": max(16, triton.next_power_of_2(factors.slots))}
    flags = stream.count_B, rows.view(torch.int8), factors.based_B.view(torch.int8)
    learned = gamma, beta, scale
    once = {"C": inner.mini_batch_size, "EPS": inner.eps}
    pairs = q.shape[0] * heads
    if hidden is None:
        (x1,), (u1,), reads = factors.inputs, factors.taught, {"ROWS": rows_B is not None}
        linear_token[(pairs,)](
            q, k, target, rate, *learned, *weights, *stream.gradients, x1, u1, *flags, answers, heads,
            F=width, **slots, **once, **reads, num_warps=_warps(width), num_stages=2,
        )  # fmt: skip
        linear_counts[(q.shape[0],)](
            *flags, K=factors.slots, C=inner.mini_batch_size, **reads, num_warps=1, num_stages=2
        )
        return answers
    tiles = hidden // TILE

    def room(*shape: int) -> Tensor:
        return q.new_empty(pairs, *shape)

    own, asked, seen = room(hidden), room(hidden), room(slots["SLOTS"])
    parts, answered, hidden_seen = room(tiles, width), room(tiles, width), room(tiles, slots["SLOTS"])
    places = torch.empty(pairs, dtype=torch.int32, device=q.device)
    (w1, b1, w2, b2), (g1, c1, g2, c2) = weights, stream.gradients
    (x1, x2), (u1, u2) = factors.inputs, factors.taught
    shape = {"F": width, "HIDDEN": hidden, "TILE": TILE}
    mlp_keys[(pairs, tiles)](
        q, k, w1, b1, w2, x1, *flags, own, asked, seen, parts, places, heads, **shape, **slots,
        ROWS=rows_B is not None, num_stages=2,
    )  # fmt: skip
    mlp_errors[(pairs, tiles)](
        q, k, target, rate, *learned, w1, b1, w2, b2, g1, c1, g2, c2, x1, u1, x2, u2,
        own, asked, seen, parts, answered, hidden_seen, places, heads,
        **shape, **slots, **once, num_warps=_warps(width), num_stages=2,
    )  # fmt: skip
    mlp_answers[(pairs,)](
        q, *learned, b2, c2, u2, answered, hidden_seen, answers, places, stream.count_B, flags[2], heads,
        F=width, TILES=tiles, **slots, **once, num_stages=2,
    )  # fmt: skip
    return answers


def _warps(width: int) -> int:
    """So many that a tile takes 64 registers of a thread or fewer."""
    return 8 if width > 64 else 4


def forms() -> list[Form]:
    """Every kernel at F 64 and 128, with C 16 and 64."""
    found = []
    for width, size in itertools.product((64, 128), (16, 64)):
        mlp, linear = (f"decode, {kind}, F {width}, C {size}" for kind in ("MLP", "linear"))
        held, once = {"K": slots_for(size), "SLOTS": 16}, {"C": size, "EPS": 1e-6}
        shape, reads, warps = {"F": width, "HIDDEN": 4 * width, "TILE": TILE}, {"ROWS": True}, _warps(width)
        found += [
            _form(f"{mlp}: keys", mlp_keys, {**shape, **held, **reads}, 4),
            _form(f"{mlp}: errors", mlp_errors, {**shape, **held, **once}, warps),
            _form(f"{mlp}: answers", mlp_answers, {"F": width, "TILES": 4 * width // TILE, **held, **once}, 4),
            _form(linear, linear_token, {"F": width, **held, **once, **reads}, warps, spilled_bytes=width // 128 * 8),
        ]
    return [*found, _form("decode, linear: counts", linear_counts, {"K": 16, "C": 16, "ROWS": True}, 1)]


def _form(name: str, kernel: Any, constants: dict[str, Any], num_warps: int, spilled_bytes: int = 0) -> Form:
    types = {"heads": "i32", "places": "*i32", "count_b": "*i64", "rows_b": "*i8", "based_b": "*i8"}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
    aligned = frozenset(name for name, kind in signature.items() if kind == "*fp32")
    return Form(name, kernel, signature, constants, num_warps=num_warps, spilled_bytes=spilled_bytes, aligned=aligned)
