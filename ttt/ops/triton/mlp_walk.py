# mypy: allow-untyped-defs, allow-incomplete-defs
"""The MLP's backward step as a kernel: finish the way back of one mini-batch, begin that of the one before.

Symbols and numbers in parentheses: `docs/backward.md`, with the layers counted from 0. `mlp_backward` says how steps
follow each other. No product's result is transposed: what is needed so is computed so, or read from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.mlp_parts import (
    coefficients,
    comes_last,
    first_bias,
    first_tile,
    gelu_bend,
    gelu_parts,
    gelu_slope,
    is_constant,
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
    token_rows,
)

_NEVER_SPECIALISED = ["n", "steps", "slots", "begun_bias", "bias", "scale_b", "last_n", "last_b", "norm_b", "norm_h"]


@triton.jit(do_not_specialize=_NEVER_SPECIALISED)
def mlp_walk(
    q, k, target, rate, gamma, beta, scale, last, d_answers,
    begun_w1, w0, w1, next_w0, next_b0, next_w1, next_b1, to_w0, to_b0, to_w1, to_b1,
    before_w0, before_b0, before_w1, before_b1, d_before_w0, d_before_b0, d_before_w1, d_before_b1,
    hidden, output, asked, pulled, answered, d_error, d_asked, d_output,
    error_parts, query_parts, key_parts, seen_parts, row_parts, tickets,
    d_q, d_k, d_target, d_rate, d_gamma, d_beta, d_scale, d_push,
    n, steps, heads, pairs, slots, begun_bias, bias, scale_b, last_n, last_b, norm_b, norm_h,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, FINISH: tl.constexpr,
    BEGIN: tl.constexpr, CLOSES: tl.constexpr, OPENED: tl.constexpr,
):  # fmt: skip
    """Finish mini-batch n + 1 and begin n, for one tile of one pair; the program that comes last sums what they leave.

    Tokens, `hidden` to `answered` and `before_*` are those of `mlp_step`; `begun_w1` is the `W_1` that opened n, `w0`
    and `w1` opened n + 1; `begun_bias` and `bias` are 1 if a bias is the last row of each pair's. `next_*` hold `dW'`
    of n + 1 (of n, if there is nothing to finish) and may be `to_*`, which receive its `dW`, the `dW'` of n.

    What beginning leaves for finishing lies in two slots, by the mini-batch modulo 2: `d_error` `dE_0` and `d_asked`
    `dy_0` `[2,P,C,HIDDEN]`, `d_output` `dE_1` `[2,P,C,F]`, the tiles' parts of `dB_0` `[2,tiles,P,C,C]`, and of `dη`
    through `κ`, of `ds` and of `d(cη)` `[2,tiles,P,C,4]`. The tiles' parts of `dE_1`, `dQ` and `dK`, `[tiles,P,C,F]`,
    are summed in the launch that makes them. `tickets [P]` begin at 0.
    """
    p, tile = tl.program_id(0), tl.program_id(1)
    w0_at, b0_at = first_tile(p, tile, 0, F, HIDDEN, TILE), first_bias(p, tile, 0, F, HIDDEN, TILE)
    w1_at, b1_at = second_tile(p, tile, 0, F, HIDDEN, TILE), second_bias(p, 0, F, HIDDEN)
    only = is_tile(tile, 0, F)
    next0, nextb0, next1, nextb1 = next_w0 + w0_at, next_b0 + b0_at, next_w1 + w1_at, next_b1 + b1_at
    if FINISH:
        d_w0, d_b0, d_w1, d_b1 = _finish(
            next0, nextb0, next1, nextb1, w0 + first_tile(p, tile, bias, F, HIDDEN, TILE),
            w1 + second_tile(p, tile, bias, F, HIDDEN, TILE),
            q, k, target, rate, gamma, beta, scale, last, d_answers, before_w0,
            d_before_w0, d_before_b0, d_before_w1, d_before_b1, hidden, asked, pulled, output, answered,
            d_error, d_asked, d_output, query_parts, key_parts, d_target, d_gamma, d_beta,
            n + 1, p, tile, steps, heads, pairs, slots, scale_b, last_n, last_b, norm_b, norm_h,
            F, HIDDEN, TILE, C, ROWS, EPS, LEAST, PRECISION, CAUSAL, CLOSES, OPENED,
        )  # fmt: skip
        tl.store(to_w0 + w0_at, d_w0)
        tl.store(to_b0 + b0_at, d_b0)
        tl.store(to_w1 + w1_at, d_w1)
        tl.store(to_b1 + b1_at, d_b1, mask=only)
    elif BEGIN:
        d_w0, d_b0, d_w1, d_b1 = tl.load(next0), tl.load(nextb0), tl.load(next1), tl.load(nextb1, only, 0)
    if BEGIN:
        _begin(
            d_w0, d_b0, d_w1, d_b1, begun_w1 + second_tile(p, tile, begun_bias, F, HIDDEN, TILE),
            q, k, target, rate, gamma, beta, scale, last, d_answers, before_w0, before_b0, before_w1, before_b1,
            hidden, asked, pulled, output, answered, d_error, d_asked, error_parts, seen_parts, row_parts,
            n, p, tile, steps, heads, pairs, slots, scale_b, last_n, last_b, norm_b, norm_h,
            F, HIDDEN, TILE, C, ROWS, EPS, LEAST, PRECISION, CAUSAL, CLOSES, OPENED,
        )  # fmt: skip
    if comes_last(tickets, p, HIDDEN // TILE):
        if FINISH:
            _tokens_back(
                q, k, rate, scale, last, d_answers, query_parts, key_parts, seen_parts, row_parts, d_q, d_k, d_rate,
                d_scale, d_push, n + 1, p, steps, heads, pairs, scale_b, last_n, last_b,
                F, HIDDEN // TILE, C, ROWS, PRECISION, CAUSAL, CLOSES,
            )  # fmt: skip
        if BEGIN:
            rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, F)[None, :]
            d_e1 = summed_tiles(error_parts, p, pairs, HIDDEN // TILE, C, ROWS, F)
            tl.store(d_output + place(n % 2, p, pairs, rows, columns, C, F), d_e1, mask=rows < C)


@triton.jit
def _errors(
    target, output, width, shift, n, p, steps, heads, pairs, slots,
    F: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """`Z_1`, its `x̂` and `ι`, `γ x̂ + β − t`, and `E_1` (5), (6) of a mini-batch."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, F)[None, :]
    z = tl.load(output + place(n % slots, p, pairs, rows, columns, C, F), mask=rows < C, other=0)
    unit, inverse = normalised(z, F, EPS)
    gap = width * unit + shift - load_tokens(target, n, p, steps, heads, C, ROWS, F)
    return z, unit, inverse, gap, tl.where(rows < C, inverse * projected(width * gap, unit, F), 0)


@triton.jit
def _answers_back(
    d_answers, answered, width, n, p, steps, heads, pairs, slots,
    F: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """`dz`, `ŷ` and `dy_1` of a mini-batch (13); a constant `y_1` gets no gradient."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, F)[None, :]
    y = tl.load(answered + place(n % slots, p, pairs, rows, columns, C, F), mask=rows < C, other=0)
    unit, inverse = normalised(y, F, EPS)
    followed = tl.where(is_constant(y, LEAST), 0, inverse)
    d_z = load_tokens(d_answers, n, p, steps, heads, C, ROWS, F)
    return d_z, unit, tl.where(rows < C, followed * projected(width * d_z, unit, F), 0)


@triton.jit
def _push(last, n, p, heads, last_n, last_b, CLOSES: tl.constexpr):
    """`c`, the factor of an update."""
    if CLOSES:
        return -tl.load(last + n * last_n + (p // heads) * last_b)
    return tl.full([], 1, last.dtype.element_ty)


@triton.jit
def _begin(
    next0, nextb0, next1, nextb1, w1_at, q, k, target, rate, gamma, beta, scale, last, d_answers,
    before_w0, before_b0, before_w1, before_b1, hidden, asked, pulled, output, answered, d_error, d_asked,
    error_parts, seen_parts, row_parts, n, p, tile, steps, heads, pairs, slots,
    scale_b, last_n, last_b, norm_b, norm_h,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, CLOSES: tl.constexpr,
    OPENED: tl.constexpr,
):  # fmt: skip
    """A tile's part of the way back up to `dE_1`: the queries (14) to (17), the update (18), the errors (19).

    What takes much room in registers is used first, or loaded late.
    """
    rows, across, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, TILE)[None, :], tl.arange(0, F)[None, :]
    others = tl.arange(0, ROWS)[None, :]
    tile_at = place(n % slots, p, pairs, rows, tile * TILE + across, C, HIDDEN)
    z = tl.load(hidden + tile_at, mask=rows < C, other=0)
    value, gate = gelu_parts(z)
    slope = gelu_slope(z, value, gate)
    keys = load_tokens(k, n, p, steps, heads, C, ROWS, F)
    seen_by_next0 = product(keys, next0, PRECISION) + nextb0[None, :]
    seen_by_next1 = product(value, next1, PRECISION) + nextb1[None, :]
    norm_at = (p // heads) * norm_b + (p % heads) * norm_h + columns
    width, shift = tl.load(gamma + norm_at), tl.load(beta + norm_at)
    _, _, _, _, error1 = _errors(target, output, width, shift, n, p, steps, heads, pairs, slots, F, C, ROWS, EPS)
    error0 = tl.load(pulled + tile_at, mask=rows < C, other=0) * slope
    d_taught = tl.sum(seen_by_next0 * error0, 1) + tl.sum(seen_by_next1 * error1, 1)
    eta = load_column(rate, n, p, steps, heads, C, ROWS)
    taught = (_push(last, n, p, heads, last_n, last_b, CLOSES) * eta)[:, None]
    d_e0, part = taught * seen_by_next0, taught * seen_by_next1
    # The queries, from the last layer to the first.
    _, _, d_y1 = _answers_back(d_answers, answered, width, n, p, steps, heads, pairs, slots, F, C, ROWS, EPS, LEAST)
    s = tl.load(scale + (p // heads) * scale_b + tl.arange(0, ROWS), mask=tl.arange(0, ROWS) < C, other=0)
    kappa, turned = coefficients(eta, s, CAUSAL, ROWS)
    y = tl.load(asked + tile_at, mask=rows < C, other=0)
    asking, asking_gate = gelu_parts(y)
    first = (tile == 0).to(kappa.dtype)
    part += product((product(value, tl.trans(asking), PRECISION) + first) * turned, d_y1, PRECISION)
    d_seen1 = product(d_y1, tl.trans(error1), PRECISION)
    d_kappa = d_seen1 * (product(asking, tl.trans(value), PRECISION) + first)
    w1 = tl.load(w1_at)
    d_x = product(d_y1, tl.trans(w1), PRECISION) + product(d_seen1 * kappa, value, PRECISION)
    d_s = tl.zeros_like(eta)
    if OPENED:
        g1 = tl.load(before_w1 + second_tile(p, tile, 0, F, HIDDEN, TILE))
        c1 = tl.load(before_b1 + second_bias(p, 0, F, HIDDEN), mask=is_tile(tile, 0, F), other=0)
        d_x -= product(d_y1 * s[:, None], tl.trans(g1), PRECISION)
        d_s -= tl.sum(d_y1 * (product(asking, g1, PRECISION) + c1[None, :]), 1)
    d_y0 = d_x * gelu_slope(y, asking, asking_gate)
    d_seen0 = product(d_y0, tl.trans(error0), PRECISION)
    queries = load_tokens(q, n, p, steps, heads, C, ROWS, F)
    d_kappa += d_seen0 * (product(queries, tl.trans(keys), PRECISION) + 1)
    if OPENED:
        g0 = tl.load(before_w0 + first_tile(p, tile, 0, F, HIDDEN, TILE))
        c0 = tl.load(before_b0 + first_bias(p, tile, 0, F, HIDDEN, TILE))
        d_s -= tl.sum(d_y0 * (product(queries, g0, PRECISION) + c0[None, :]), 1)
    if CAUSAL:
        d_kappa = tl.where(others <= rows, d_kappa, 0)
    d_s -= tl.sum(d_kappa * eta[None, :], 1)
    d_eta = -tl.sum(d_kappa * s[:, None], 0)
    # The errors, from the first layer to the last.
    around = (product(keys, tl.trans(queries), PRECISION) + 1) * turned
    d_e0 += product(around, d_y0, PRECISION)
    part += product(d_e0 * slope, w1, PRECISION)
    # What finishing and `_tokens_back` read.
    own_at = place(n % 2, p, pairs, rows, tile * TILE + across, C, HIDDEN)
    tl.store(d_error + own_at, d_e0, mask=rows < C)
    tl.store(d_asked + own_at, d_y0, mask=rows < C)
    tl.store(error_parts + place(tile, p, pairs, rows, columns, C, F), part, mask=rows < C)
    index = (n % 2) * (HIDDEN // TILE) + tile
    tl.store(seen_parts + place(index, p, pairs, rows, others, C, C), d_seen0, mask=(rows < C) & (others < C))
    row = tl.arange(0, ROWS)
    row_at = place(index, p, pairs, row, 0, C, 4)
    tl.store(row_parts + row_at, d_eta, mask=row < C)
    tl.store(row_parts + row_at + 1, d_s, mask=row < C)
    tl.store(row_parts + row_at + 2, d_taught, mask=row < C)


@triton.jit
def _finish(
    next_w0, next_b0, next_w1, next_b1, w0_at, w1_at, q, k, target, rate, gamma, beta, scale, last, d_answers,
    before_w0, d_before_w0, d_before_b0, d_before_w1, d_before_b1,
    hidden, asked, pulled, output, answered, d_error, d_asked, d_output, query_parts, key_parts,
    d_target, d_gamma, d_beta, n, p, tile, steps, heads, pairs, slots, scale_b, last_n, last_b, norm_b, norm_h,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, CLOSES: tl.constexpr,
    OPENED: tl.constexpr,
):  # fmt: skip
    """A tile's way back from `dE_1`: the inner loss (20), the keys (21), and the tile's `dW` (22), which it returns."""
    only = is_tile(tile, 0, F)
    # Several threads read each of these, and one will write it: all read before the first barrier.
    next0_bias, next1_bias = tl.load(next_b0), tl.load(next_b1, mask=only, other=0)
    rows, across, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, TILE)[None, :], tl.arange(0, F)[None, :]
    norm_at = (p // heads) * norm_b + (p % heads) * norm_h + columns
    width, shift = tl.load(gamma + norm_at), tl.load(beta + norm_at)
    z1, unit, inverse, gap, error1 = _errors(
        target, output, width, shift, n, p, steps, heads, pairs, slots, F, C, ROWS, EPS
    )
    d_z, answer_unit, d_y1 = _answers_back(
        d_answers, answered, width, n, p, steps, heads, pairs, slots, F, C, ROWS, EPS, LEAST
    )
    # (20), in every tile again.
    d_e1 = tl.load(d_output + place(n % 2, p, pairs, rows, columns, C, F), mask=rows < C, other=0)
    constant = is_constant(z1, LEAST)
    silent = constant & (tl.max(tl.abs(error1), 1) == 0)[:, None]
    d_r = tl.where(silent, 0, inverse) * projected(d_e1, unit, F)
    followed = tl.where(constant, 0, inverse)
    d_z1 = followed * (
        projected(width * width * d_r, unit, F)
        - d_r * (tl.sum(width * gap * unit, 1) / F)[:, None]
        - error1 * (tl.sum(d_e1 * unit, 1) / F)[:, None]
        - unit * (tl.sum(d_e1 * error1, 1) / F)[:, None]
    )
    total = p * F + tl.arange(0, F)
    share = tl.sum(d_z * answer_unit + d_r * (width * unit + gap), 0)
    tl.store(d_gamma + total, tl.load(d_gamma + total, mask=only, other=0) + share, mask=only)
    share = tl.sum(d_z + width * d_r, 0)
    tl.store(d_beta + total, tl.load(d_beta + total, mask=only, other=0) + share, mask=only)
    target_at = token_rows(n, p, rows, steps, heads, C) * F + columns
    tl.store(d_target + target_at, -width * d_r, mask=(rows < C) & (tile == 0))
    # The hidden layer's tile.
    tile_at = place(n % slots, p, pairs, rows, tile * TILE + across, C, HIDDEN)
    z = tl.load(hidden + tile_at, mask=rows < C, other=0)
    value, gate = gelu_parts(z)
    slope = gelu_slope(z, value, gate)
    d = tl.load(pulled + tile_at, mask=rows < C, other=0)
    asking, _ = gelu_parts(tl.load(asked + tile_at, mask=rows < C, other=0))
    own_at = place(n % 2, p, pairs, rows, tile * TILE + across, C, HIDDEN)
    d_e0 = tl.load(d_error + own_at, mask=rows < C, other=0)
    d_y0 = tl.load(d_asked + own_at, mask=rows < C, other=0)
    eta = load_column(rate, n, p, steps, heads, C, ROWS)
    s = tl.load(scale + (p // heads) * scale_b + tl.arange(0, ROWS), mask=tl.arange(0, ROWS) < C, other=0)
    _, turned = coefficients(eta, s, CAUSAL, ROWS)
    taught = (_push(last, n, p, heads, last_n, last_b, CLOSES) * eta)[:, None]
    if OPENED:
        at, step = second_tile(p, tile, 0, F, HIDDEN, TILE), d_y1 * -s[:, None]
        tl.store(d_before_w1 + at, tl.load(next_w1) + product(tl.trans(asking), step, PRECISION))
        at = second_bias(p, 0, F, HIDDEN)
        tl.store(d_before_b1 + at, next1_bias + tl.sum(step, 0), mask=only)
    # The second layer: its keys, then its weights.
    next1 = tl.load(next_w1)
    d_x = product(product(error1, tl.trans(d_y1), PRECISION) * turned, asking, PRECISION)
    d_x += taught * product(error1, tl.trans(next1), PRECISION)
    d_x += product(d_z1, tl.trans(tl.load(w1_at)), PRECISION)
    d_z0 = d_e0 * d * gelu_bend(z, slope, gate) + d_x * slope
    d_w1 = product(tl.trans(value), d_z1, PRECISION) + product(tl.trans(asking), d_y1, PRECISION)
    d_w1 += product(tl.trans(d_e0 * slope), error1, PRECISION)
    d_b1 = tl.where(tile == 0, tl.sum(d_z1 + d_y1, 0), 0)
    if CLOSES:  # else W passes nothing on: G' does
        d_w1 += next1
        d_b1 += next1_bias
    # The first layer.
    parts_at = place(tile, p, pairs, rows, columns, C, F)
    w0 = tl.load(w0_at)
    d_query = product(d_y0, tl.trans(w0), PRECISION)
    queries = load_tokens(q, n, p, steps, heads, C, ROWS, F)
    if OPENED:
        at, step = first_tile(p, tile, 0, F, HIDDEN, TILE), d_y0 * -s[:, None]
        d_query += product(step, tl.trans(tl.load(before_w0 + at)), PRECISION)
        tl.store(d_before_w0 + at, tl.load(next_w0) + product(tl.trans(queries), step, PRECISION))
        at = first_bias(p, tile, 0, F, HIDDEN, TILE)
        tl.store(d_before_b0 + at, next0_bias + tl.sum(step, 0))
    tl.store(query_parts + parts_at, d_query, mask=rows < C)
    next0 = tl.load(next_w0)
    d_key = product(d_z0, tl.trans(w0), PRECISION) + taught * product(d * slope, tl.trans(next0), PRECISION)
    tl.store(key_parts + parts_at, d_key, mask=rows < C)
    keys = load_tokens(k, n, p, steps, heads, C, ROWS, F)
    d_w0 = product(tl.trans(keys), d_z0, PRECISION) + product(tl.trans(queries), d_y0, PRECISION)
    d_b0 = tl.sum(d_z0 + d_y0, 0)
    if CLOSES:
        d_w0 += next0
        d_b0 += next0_bias
    return d_w0, d_b0, d_w1, d_b1


@triton.jit
def _tokens_back(
    q, k, rate, scale, last, d_answers, query_parts, key_parts, seen_parts, row_parts, d_q, d_k, d_rate,
    d_scale, d_push, n, p, steps, heads, pairs, scale_b, last_n, last_b,
    F: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, CLOSES: tl.constexpr,
):  # fmt: skip
    """Sum the tiles' parts of mini-batch n: `dQ`, `dK`, `dη` and `dc` (23), (24); adds to `ds`."""
    row = tl.arange(0, ROWS)
    s = tl.load(scale + (p // heads) * scale_b + row, mask=row < C, other=0)
    eta = load_column(rate, n, p, steps, heads, C, ROWS)
    d_eta, d_s, d_taught = tl.zeros_like(eta), tl.zeros_like(eta), tl.zeros_like(eta)
    d_seen = tl.zeros([ROWS, ROWS], eta.dtype)
    for tile in range(TILES):
        row_at = place((n % 2) * TILES + tile, p, pairs, row, 0, C, 4)
        d_eta += tl.load(row_parts + row_at, mask=row < C, other=0)
        d_s += tl.load(row_parts + row_at + 1, mask=row < C, other=0)
        d_taught += tl.load(row_parts + row_at + 2, mask=row < C, other=0)
        seen_at = place((n % 2) * TILES + tile, p, pairs, row[:, None], row[None, :], C, C)
        d_seen += tl.load(seen_parts + seen_at, mask=(row[:, None] < C) & (row[None, :] < C), other=0)
    d_eta += _push(last, n, p, heads, last_n, last_b, CLOSES) * d_taught
    tl.store(d_rate + token_rows(n, p, row, steps, heads, C), d_eta, mask=row < C)
    tl.store(d_push + n * pairs + p, tl.sum(eta * d_taught, 0))
    scale_at = p * C + row
    tl.store(d_scale + scale_at, tl.load(d_scale + scale_at, mask=row < C, other=0) + d_s, mask=row < C)
    kappa, _ = coefficients(eta, s, CAUSAL, ROWS)
    d_attention = d_seen * kappa
    queries = load_tokens(q, n, p, steps, heads, C, ROWS, F)
    keys = load_tokens(k, n, p, steps, heads, C, ROWS, F)
    d_query = load_tokens(d_answers, n, p, steps, heads, C, ROWS, F) + product(d_attention, keys, PRECISION)
    d_query += summed_tiles(query_parts, p, pairs, TILES, C, ROWS, F)
    store_tokens(d_q, d_query, n, p, steps, heads, C, ROWS, F)
    d_key = product(tl.trans(d_attention), queries, PRECISION)
    d_key += summed_tiles(key_parts, p, pairs, TILES, C, ROWS, F)
    store_tokens(d_k, d_key, n, p, steps, heads, C, ROWS, F)
