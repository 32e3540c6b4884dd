# mypy: allow-untyped-defs, allow-incomplete-defs
"""The MLP's forward step as a kernel: finish one mini-batch, begin the next. `mlp_forward` says how steps follow.

Symbols and numbers in parentheses: `docs/backward.md`, with the layers counted from 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.mlp_parts import (
    coefficients,
    comes_last,
    first_bias,
    first_tile,
    gelu_parts,
    gelu_slope,
    is_tile,
    load_column,
    load_tokens,
    normalised,
    place,
    product,
    projected,
    second_bias,
    second_tile,
    store_tokens,
    summed_tiles,
)

_NEVER_SPECIALISED = ["n", "steps", "slots", "from_bias", "to_bias", "scale_b", "last_n", "last_b", "norm_b", "norm_h"]


@triton.jit(do_not_specialize=_NEVER_SPECIALISED)
def mlp_step(
    q, k, target, rate, gamma, beta, scale, last,
    from_w0, from_b0, from_w1, from_b1, to_w0, to_b0, to_w1, to_b1, before_w0, before_b0, before_w1, before_b1,
    hidden, output, asked, pulled, answered, key_parts, answer_parts, tickets, answers,
    n, steps, heads, pairs, slots, from_bias, to_bias, scale_b, last_n, last_b, norm_b, norm_h,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, FINISH: tl.constexpr, BEGIN: tl.constexpr,
    UPDATE: tl.constexpr, CLOSES: tl.constexpr, OPENED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Finish mini-batch n − 1 and begin n, for one tile of one pair.

    `q`, `k`, `target` and `answers` are tokens in the memory order `[B,N,C,H,F]`, `rate` `[B,N,C,H]`.

    `from_*` are the weights that opened n − 1 (n, if there is nothing to finish), `to_*` receive those that open n, or
    the sums of a mini-batch that stays open, and may be the same; without `UPDATE` they hold these weights already.
    `from_bias` or `to_bias` is 1 if biases are the last rows of their weights, so that pairs lie that much further
    apart. `before_*` are, with `OPENED`, the sums so far of the only mini-batch.

    `hidden` holds `Z_0 [slots,P,C,HIDDEN]` and `output` `Z_1 [slots,P,C,F]`, in the slot n modulo `slots`; with `KEEP`
    so do `asked` `y_0`, `pulled` `D_0` and `answered` `y_1`, and nothing is answered. `key_parts` and `answer_parts`
    are the tiles' parts of `Z_1` and `y_1`, `[tiles,P,C,F]`, which the program that comes last sums. `tickets [P]`
    begin at 0.
    """
    p, tile = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, F)[None, :]
    w0_at, b0_at = first_tile(p, tile, from_bias, F, HIDDEN, TILE), first_bias(p, tile, from_bias, F, HIDDEN, TILE)
    w1_at, b1_at = second_tile(p, tile, from_bias, F, HIDDEN, TILE), second_bias(p, from_bias, F, HIDDEN)
    w0, b0 = tl.load(from_w0 + w0_at), tl.load(from_b0 + b0_at)
    w1, b1 = tl.load(from_w1 + w1_at), tl.load(from_b1 + b1_at, mask=is_tile(tile, 0, F), other=0)
    if FINISH:
        g0, c0, g1, c1 = _finish(
            w0, b0, w1, b1, q, k, target, rate, gamma, beta, scale, before_w0, before_b0, before_w1, before_b1,
            hidden, asked, pulled, output, answer_parts, n - 1, p, tile, steps, heads, pairs, slots,
            scale_b, norm_b, norm_h, F, HIDDEN, TILE, C, ROWS, EPS, PRECISION, CAUSAL, UPDATE, OPENED, KEEP,
        )  # fmt: skip
        w0_at, b0_at = first_tile(p, tile, to_bias, F, HIDDEN, TILE), first_bias(p, tile, to_bias, F, HIDDEN, TILE)
        w1_at, b1_at = second_tile(p, tile, to_bias, F, HIDDEN, TILE), second_bias(p, to_bias, F, HIDDEN)
        if UPDATE:  # (8)
            if CLOSES:
                push = -tl.load(last + (n - 1) * last_n + (p // heads) * last_b)
                w0, b0, w1, b1 = w0 + push * g0, b0 + push * c0, w1 + push * g1, b1 + push * c1
            else:
                w0, b0, w1, b1 = g0, c0, g1, c1
            tl.store(to_w0 + w0_at, w0)
            tl.store(to_b0 + b0_at, b0)
            tl.store(to_w1 + w1_at, w1)
            tl.store(to_b1 + b1_at, b1, mask=is_tile(tile, 0, F))
        elif BEGIN:
            w0, b0 = tl.load(to_w0 + w0_at), tl.load(to_b0 + b0_at)
            w1, b1 = tl.load(to_w1 + w1_at), tl.load(to_b1 + b1_at, mask=is_tile(tile, 0, F), other=0)
    if BEGIN:
        _begin(
            w0, b0, w1, b1, k, hidden, key_parts, n, p, tile, steps, heads, pairs, slots,
            F, HIDDEN, TILE, C, ROWS, PRECISION,
        )  # fmt: skip
    if comes_last(tickets, p, HIDDEN // TILE):
        if FINISH:
            _answer(
                q, gamma, beta, answer_parts, answered, answers, n - 1, p, steps, heads, pairs, slots, norm_b, norm_h,
                F, HIDDEN // TILE, C, ROWS, EPS, KEEP,
            )  # fmt: skip
        if BEGIN:
            z = summed_tiles(key_parts, p, pairs, HIDDEN // TILE, C, ROWS, F)
            tl.store(output + place(n % slots, p, pairs, rows, columns, C, F), z, mask=rows < C)


@triton.jit
def _begin(
    w0, b0, w1, b1, k, hidden, key_parts, n, p, tile, steps, heads, pairs, slots,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys' way through a tile (1): `Z_0`, and its part of `Z_1`. The first tile's part has the bias."""
    rows, across, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, TILE)[None, :], tl.arange(0, F)[None, :]
    keys = load_tokens(k, n, p, steps, heads, C, ROWS, F)
    z = product(keys, w0, PRECISION) + b0[None, :]
    tl.store(hidden + place(n % slots, p, pairs, rows, tile * TILE + across, C, HIDDEN), z, mask=rows < C)
    value, _ = gelu_parts(z)
    part = product(value, w1, PRECISION) + b1[None, :]
    at = place(tile, p, pairs, rows, columns, C, F)
    tl.store(key_parts + at, part, mask=rows < C)


@triton.jit
def _finish(
    w0, b0, w1, b1, q, k, target, rate, gamma, beta, scale, before_w0, before_b0, before_w1, before_b1,
    hidden, asked, pulled, output, answer_parts, n, p, tile, steps, heads, pairs, slots,
    scale_b, norm_b, norm_h,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, UPDATE: tl.constexpr, OPENED: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """The errors of mini-batch n (5) to (7), and a tile's part of its answers (9), (10).

    Returns:
        Its sums `Σ_j η_j ∇ℓ_j`, those before it included, of `W_0`, `b_0`, `W_1` and `b_1`; zeros if neither the
        update nor the answers need them.
    """
    rows, across, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, TILE)[None, :], tl.arange(0, F)[None, :]
    # The inner loss, in every tile again.
    z = tl.load(output + place(n % slots, p, pairs, rows, columns, C, F), mask=rows < C, other=0)
    norm_at = (p // heads) * norm_b + (p % heads) * norm_h + columns
    width = tl.load(gamma + norm_at)
    unit, inverse = normalised(z, F, EPS)
    r = width * (width * unit + tl.load(beta + norm_at) - load_tokens(target, n, p, steps, heads, C, ROWS, F))
    error1 = tl.where(rows < C, inverse * projected(r, unit, F), 0)
    # The hidden layer's tile.
    tile_at = place(n % slots, p, pairs, rows, tile * TILE + across, C, HIDDEN)
    hidden_z = tl.load(hidden + tile_at, mask=rows < C, other=0)
    value, gate = gelu_parts(hidden_z)
    d = product(error1, tl.trans(w1), PRECISION)
    if KEEP:
        tl.store(pulled + tile_at, d, mask=rows < C)
    error0 = d * gelu_slope(hidden_z, value, gate)
    eta = load_column(rate, n, p, steps, heads, C, ROWS)
    s = tl.load(scale + (p // heads) * scale_b + tl.arange(0, ROWS), mask=tl.arange(0, ROWS) < C, other=0)
    keys = load_tokens(k, n, p, steps, heads, C, ROWS, F)
    g0, c0, g1, c1 = tl.zeros_like(w0), tl.zeros_like(b0), tl.zeros_like(w1), tl.zeros_like(b1)
    if OPENED:
        g0 += tl.load(before_w0 + first_tile(p, tile, 0, F, HIDDEN, TILE))
        c0 += tl.load(before_b0 + first_bias(p, tile, 0, F, HIDDEN, TILE))
        g1 += tl.load(before_w1 + second_tile(p, tile, 0, F, HIDDEN, TILE))
        c1 += tl.load(before_b1 + second_bias(p, 0, F, HIDDEN), mask=is_tile(tile, 0, F), other=0)
    queries = load_tokens(q, n, p, steps, heads, C, ROWS, F)
    if CAUSAL:  # dual form
        kappa, _ = coefficients(eta, s, CAUSAL, ROWS)
        y = product(queries, w0, PRECISION) + b0[None, :]
        y += product((product(queries, tl.trans(keys), PRECISION) + 1) * kappa, error0, PRECISION)
        if OPENED:
            y -= s[:, None] * (product(queries, g0, PRECISION) + c0[None, :])
        asking, _ = gelu_parts(y)
        part = product(asking, w1, PRECISION) + b1[None, :]
        seen = product(asking, tl.trans(value), PRECISION) + (tile == 0).to(w1.dtype)
        part += product(seen * kappa, error1, PRECISION)
        if OPENED:
            part -= s[:, None] * (product(asking, g1, PRECISION) + c1[None, :])
    if UPDATE or not CAUSAL:
        g0 += product(tl.trans(keys * eta[:, None]), error0, PRECISION)
        c0 += tl.sum(error0 * eta[:, None], 0)
        g1 += product(tl.trans(value), error1 * eta[:, None], PRECISION)
        c1 += tl.where(tile == 0, tl.sum(error1 * eta[:, None], 0), 0)
    if not CAUSAL:  # all answer with the same weights, those of the first position's step
        step = tl.load(scale + (p // heads) * scale_b)
        y = product(queries, w0 - step * g0, PRECISION) + (b0 - step * c0)[None, :]
        asking, _ = gelu_parts(y)
        part = product(asking, w1 - step * g1, PRECISION) + (b1 - step * c1)[None, :]
    if KEEP:
        tl.store(asked + tile_at, y, mask=rows < C)
    at = place(tile, p, pairs, rows, columns, C, F)
    tl.store(answer_parts + at, part, mask=rows < C)
    return g0, c0, g1, c1


@triton.jit
def _answer(
    q, gamma, beta, answer_parts, answered, answers, n, p, steps, heads, pairs, slots, norm_b, norm_h,
    F: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Sum the tiles' parts of mini-batch n's answers, and write `z` (11); or, with `KEEP`, only `y_1`."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, F)[None, :]
    y = summed_tiles(answer_parts, p, pairs, TILES, C, ROWS, F)
    if KEEP:
        tl.store(answered + place(n % slots, p, pairs, rows, columns, C, F), y, mask=rows < C)
    else:
        norm_at = (p // heads) * norm_b + (p % heads) * norm_h + columns
        unit, _ = normalised(y, F, EPS)
        z = load_tokens(q, n, p, steps, heads, C, ROWS, F) + unit * tl.load(gamma + norm_at) + tl.load(beta + norm_at)
        store_tokens(answers, z, n, p, steps, heads, C, ROWS, F)
