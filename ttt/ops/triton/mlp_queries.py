# mypy: allow-untyped-defs, allow-incomplete-defs
"""The queries' way back through an MLP's tile, as a part of `mlp_walk`: `dy_0`, and what weights and sums have of it.

A causal mini-batch goes block by block: a block's tokens see each other in dual form, and what earlier blocks have
taught as a sum of gradients. Any other answers with the weights after it (9'). Symbols and numbers in parentheses:
`docs/backward.md`, with the layers counted from 0. Names with `t` are transposed: no product's result is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.mlp_parts import (
    block_place,
    blocks,
    coefficients,
    first_bias,
    first_tile,
    gelu_parts,
    gelu_slope,
    is_tile,
    load_block,
    load_column,
    load_hidden,
    load_scale,
    load_tokens,
    product,
    second_bias,
    second_tile,
    store_block,
    store_hidden,
    wide_product,
)


@triton.jit
def second_sums(
    rate, hidden, errors, before_w1, before_b1, at, pairs, slots,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, OPENED: tl.constexpr,
):  # fmt: skip
    """`G_1ᵀ [F,TILE]` of a whole mini-batch, those before it included, and the bias's, of the first tile alone."""
    n, p, tile = at[0], at[1], at[2]
    g_t, c = tl.zeros([F, TILE], rate.dtype.element_ty), tl.zeros([F], rate.dtype.element_ty)
    if OPENED:
        g_t += tl.trans(tl.load(before_w1 + second_tile(p, tile, 0, F, HIDDEN, TILE)))
        c += tl.load(before_b1 + second_bias(p, 0, F, HIDDEN), mask=is_tile(tile, 0, F), other=0)
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        value, _ = gelu_parts(load_hidden(hidden, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK))
        taught = load_block(errors, n % slots, at, pairs, first, size, BLOCK, F)
        taught *= load_column(rate, at, first, size, BLOCK)[:, None]
        g_t += product(tl.trans(taught), value, PRECISION)
        c += tl.where(tile == 0, tl.sum(taught, 0), 0)
    return g_t, c


@triton.jit
def first_sums(
    k, rate, hidden, pulled, before_w0, before_b0, at, pairs, slots,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, OPENED: tl.constexpr,
):  # fmt: skip
    """`G_0ᵀ [TILE,F]` of a whole mini-batch, those before it included, and the bias's."""
    n, p, tile = at[0], at[1], at[2]
    g_t, c = tl.zeros([TILE, F], rate.dtype.element_ty), tl.zeros([TILE], rate.dtype.element_ty)
    if OPENED:
        g_t += tl.trans(tl.load(before_w0 + first_tile(p, tile, 0, F, HIDDEN, TILE)))
        c += tl.load(before_b0 + first_bias(p, tile, 0, F, HIDDEN, TILE))
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        z = load_hidden(hidden, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        value, gate = gelu_parts(z)
        error0 = load_hidden(pulled, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK) * gelu_slope(
            z, value, gate
        )
        taught = error0 * load_column(rate, at, first, size, BLOCK)[:, None]
        g_t += product(tl.trans(taught), load_tokens(k, at, first, size, BLOCK, F), PRECISION)
        c += tl.sum(taught, 0)
    return g_t, c


@triton.jit
def answered_second(
    weights_t, sums_t, sums_b, d_w1, d_b1, scale, asked, d_answered, d_asked, row_parts, at, pairs, slots, scale_b,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, CLOSES: tl.constexpr,
):  # fmt: skip
    """Queries that all answer with the same weights, from `dy_1` to `dy_0` (16'), (17), which is stored.

    `weights_t` are `W_1'ᵀ`, and `sums_t` and `sums_b` are not read; if the mini-batch stays open they are `W_1ᵀ`, and
    `G_1'`, with `W_1' = W_1 − s G_1'`.

    Returns:
        `dW_1'` and `db_1'` with their share (12'); of an open mini-batch `dG_1'`.
    """
    n, tile = at[0], at[2]
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        d_y1 = load_block(d_answered, n % slots, at, pairs, first, size, BLOCK, F)
        y = load_hidden(asked, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        asking, gate = gelu_parts(y)
        d_x = product(d_y1, weights_t, PRECISION)
        if CLOSES:
            share = d_y1
        else:
            s = load_scale(scale, at, first, scale_b, size, BLOCK)[:, None]
            share = -s * d_y1
            through = product(d_y1, sums_t, PRECISION)
            d_x -= s * through
            row = first + tl.arange(0, BLOCK)
            row_at = row_parts + block_place((n % 2) * (HIDDEN // TILE) + tile, at, pairs, row, 0, size, 4)
            tl.store(row_at + 1, -tl.sum(through * asking, 1) - tl.sum(d_y1 * sums_b[None, :], 1), mask=row < size)
        d_y0 = d_x * gelu_slope(y, asking, gate)
        store_hidden(d_asked, d_y0, n % 2, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        d_w1 += product(tl.trans(asking), share, PRECISION)
        d_b1 += tl.where(tile == 0, tl.sum(share, 0), 0)
    return d_w1, d_b1


@triton.jit
def answered_first(
    weights_t, sums_t, sums_b, d_w0, d_b0, q, scale, d_asked, query_parts, row_parts, at, pairs, scale_b,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, CLOSES: tl.constexpr,
):  # fmt: skip
    """The same through the first layer, from `dy_0` to a tile's part of `dQ` (16').

    Returns:
        `dW_0'` and `db_0'` with their share (12'); of an open mini-batch `dG_0'`.
    """
    n, tile = at[0], at[2]
    place = (n % 2) * (HIDDEN // TILE) + tile
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        d_y0 = load_hidden(d_asked, n % 2, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        queries = load_tokens(q, at, first, size, BLOCK, F)
        d_query = product(d_y0, weights_t, PRECISION)
        if CLOSES:
            share = d_y0
        else:
            s = load_scale(scale, at, first, scale_b, size, BLOCK)[:, None]
            share = -s * d_y0
            through = product(d_y0, sums_t, PRECISION)
            d_query -= s * through
            row = first + tl.arange(0, BLOCK)
            row_at = row_parts + block_place(place, at, pairs, row, 0, size, 4)
            tl.store(row_at + 3, -tl.sum(through * queries, 1) - tl.sum(d_y0 * sums_b[None, :], 1), mask=row < size)
        store_block(query_parts, d_query, place, at, pairs, first, size, BLOCK, F)
        d_w0 += product(tl.trans(queries), share, PRECISION)
        d_b0 += tl.sum(share, 0)
    return d_w0, d_b0


@triton.jit
def queries_back(
    second, q, k, rate, scale, before_w0, before_b0, before_w1, before_b1, hidden, errors, asked, pulled,
    d_answered, d_asked, query_parts, seen_parts, row_parts, at, pairs, slots, scale_b,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, OPENED: tl.constexpr,
):  # fmt: skip
    """Queries of a causal mini-batch, from the first block to the last (14), (16), (17).

    Stores `dy_0`, the parts of `dB_0`, of `dη` through `κ` and of `ds`, and what `dQ` has of the sums of gradients.
    """
    n, p, tile = at[0], at[1], at[2]
    place = (n % 2) * (HIDDEN // TILE) + tile
    second_t = tl.trans(second)
    g0_t, c0 = tl.zeros([TILE, F], second.dtype), tl.zeros([TILE], second.dtype)
    g1_t, c1 = tl.zeros([F, TILE], second.dtype), tl.zeros([F], second.dtype)
    if OPENED:
        g0_t += tl.trans(tl.load(before_w0 + first_tile(p, tile, 0, F, HIDDEN, TILE)))
        c0 += tl.load(before_b0 + first_bias(p, tile, 0, F, HIDDEN, TILE))
        g1_t += tl.trans(tl.load(before_w1 + second_tile(p, tile, 0, F, HIDDEN, TILE)))
        c1 += tl.load(before_b1 + second_bias(p, 0, F, HIDDEN), mask=is_tile(tile, 0, F), other=0)
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        row, others = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
        eta = load_column(rate, at, first, size, BLOCK)
        s = load_scale(scale, at, first, scale_b, size, BLOCK)
        kappa, _ = coefficients(eta, s, True, BLOCK)
        # The second layer.
        d_y1 = load_block(d_answered, n % slots, at, pairs, first, size, BLOCK, F)
        error1 = load_block(errors, n % slots, at, pairs, first, size, BLOCK, F)
        z = load_hidden(hidden, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        value, gate = gelu_parts(z)
        y = load_hidden(asked, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        asking, asking_gate = gelu_parts(y)
        d_seen = wide_product(d_y1, tl.trans(error1), PRECISION, True)
        d_kappa = d_seen * (product(asking, tl.trans(value), PRECISION) + (tile == 0).to(eta.dtype))
        d_x = wide_product(d_y1, second_t, PRECISION, True) + product(d_seen * kappa, value, PRECISION)
        d_s = tl.zeros_like(eta)
        if OPENED or MANY:
            through = wide_product(d_y1, g1_t, PRECISION, True)
            d_x -= s[:, None] * through
            d_s -= tl.sum(through * asking, 1) + tl.sum(d_y1 * c1[None, :], 1)
        d_y0 = d_x * gelu_slope(y, asking, asking_gate)
        store_hidden(d_asked, d_y0, n % 2, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        # The first.
        error0 = load_hidden(pulled, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK) * gelu_slope(
            z, value, gate
        )
        d_seen = product(d_y0, tl.trans(error0), PRECISION)
        seen_at = block_place(place, at, pairs, row[:, None], others[None, :], size, BLOCK)
        tl.store(seen_parts + seen_at, d_seen, mask=row[:, None] < size)
        queries, keys = load_tokens(q, at, first, size, BLOCK, F), load_tokens(k, at, first, size, BLOCK, F)
        d_kappa += d_seen * (wide_product(queries, tl.trans(keys), PRECISION, True) + 1)
        d_kappa = tl.where(first + others[None, :] <= row[:, None], d_kappa, 0)
        if OPENED or MANY:
            through0 = product(d_y0, g0_t, PRECISION)
            store_block(query_parts, -s[:, None] * through0, place, at, pairs, first, size, BLOCK, F)
            d_s -= tl.sum(through0 * queries, 1) + tl.sum(d_y0 * c0[None, :], 1)
        d_s -= tl.sum(d_kappa * eta[None, :], 1)
        row_at = row_parts + block_place(place, at, pairs, row, 0, size, 4)
        tl.store(row_at, -tl.sum(d_kappa * s[:, None], 0), mask=row < size)
        tl.store(row_at + 1, d_s, mask=row < size)
        if MANY:
            taught1, taught0 = eta[:, None] * error1, eta[:, None] * error0
            g1_t += product(tl.trans(taught1), value, PRECISION)
            c1 += tl.where(tile == 0, tl.sum(taught1, 0), 0)
            g0_t += product(tl.trans(taught0), keys, PRECISION)
            c0 += tl.sum(taught0, 0)
