# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the program of a pair that comes last does in `mlp_walk`: it sums the tiles' parts, always in the same order.

Symbols and numbers in parentheses: `docs/backward.md`, with the layers counted from 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.mlp_parts import (
    block_place,
    blocks,
    coefficients,
    is_constant,
    load_block,
    load_column,
    load_scale,
    load_tokens,
    norm_place,
    normalised,
    product,
    projected,
    push_of,
    store_block,
    store_tokens,
    summed_tiles,
    token_rows,
)


@triton.jit
def output_back(
    target, gamma, beta, d_answers, output, errors, shares, error_parts, d_output, d_target, d_gamma, d_beta,
    at, pairs, slots, norm_b, norm_h,
    F: tl.constexpr, TILES: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr, EPS: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """Sum the tiles' parts of `dE_1`, and go through the gradient of the inner loss (20): `dZ_1`, and (25), (13)."""
    n, p = at[0], at[1]
    norm_at = norm_place(at, norm_b, norm_h, F)
    width, shift = tl.load(gamma + norm_at), tl.load(beta + norm_at)
    columns = tl.arange(0, F)
    total_gamma = tl.load(shares + ((n % slots).to(tl.int64) * pairs + p) * F + columns)
    total_beta = tl.zeros_like(total_gamma)
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        d_e1 = summed_tiles(error_parts, 0, at, pairs, first, TILES, size, BLOCK, F)
        z = load_block(output, n % slots, at, pairs, first, size, BLOCK, F)
        unit, inverse = normalised(z, F, EPS)
        constant = is_constant(z, LEAST)
        error1 = load_block(errors, n % slots, at, pairs, first, size, BLOCK, F)
        silent = constant & (tl.max(tl.abs(error1), 1) == 0)[:, None]
        d_r = tl.where(silent, 0, inverse) * projected(d_e1, unit, F)
        gap = width * unit + shift - load_tokens(target, at, first, size, BLOCK, F)
        d_z1 = tl.where(constant, 0, inverse) * (
            projected(width * width * d_r, unit, F)
            - d_r * (tl.sum(width * gap * unit, 1) / F)[:, None]
            - error1 * (tl.sum(d_e1 * unit, 1) / F)[:, None]
            - unit * (tl.sum(d_e1 * error1, 1) / F)[:, None]
        )
        store_block(d_output, d_z1, n % 2, at, pairs, first, size, BLOCK, F)
        store_tokens(d_target, -width * d_r, at, first, size, BLOCK, F)
        total_gamma += tl.sum(d_r * (width * unit + gap), 0)
        total_beta += tl.sum(load_tokens(d_answers, at, first, size, BLOCK, F) + width * d_r, 0)
    total = p * F + columns
    tl.store(d_gamma + total, tl.load(d_gamma + total) + total_gamma)
    tl.store(d_beta + total, tl.load(d_beta + total) + total_beta)


@triton.jit
def tokens_back(
    q, k, rate, scale, last, d_answers, query_parts, key_parts, seen_parts, row_parts, d_q, d_k, d_rate,
    d_scale, d_push, at, pairs, scale_b, last_n, last_b,
    F: tl.constexpr, TILES: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, CLOSES: tl.constexpr,
):  # fmt: skip
    """Sum the tiles' parts of a mini-batch: `dQ`, `dK`, `dη` and `dc` (16), (23), (24); adds to `ds`."""
    n, p = at[0], at[1]
    place = (n % 2) * TILES
    push = push_of(last, at, last_n, last_b, CLOSES)
    d_c = tl.zeros([BLOCK], rate.dtype.element_ty)
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        row = first + tl.arange(0, BLOCK)
        eta = load_column(rate, at, first, size, BLOCK)
        d_query = load_tokens(d_answers, at, first, size, BLOCK, F)
        d_query += summed_tiles(query_parts, place, at, pairs, first, TILES, size, BLOCK, F)
        d_key = summed_tiles(key_parts, 0, at, pairs, first, TILES, size, BLOCK, F)
        if CAUSAL:
            kappa, _ = coefficients(eta, load_scale(scale, at, first, scale_b, size, BLOCK), CAUSAL, BLOCK)
            d_seen = summed_tiles(seen_parts, place, at, pairs, first, TILES, size, BLOCK, BLOCK) * kappa
            d_query += product(d_seen, load_tokens(k, at, first, size, BLOCK, F), PRECISION)
            d_key += product(tl.trans(d_seen), load_tokens(q, at, first, size, BLOCK, F), PRECISION)
        store_tokens(d_q, d_query, at, first, size, BLOCK, F)
        store_tokens(d_k, d_key, at, first, size, BLOCK, F)
        d_taught, d_eta, d_s = tl.zeros_like(eta), tl.zeros_like(eta), tl.zeros_like(eta)
        for tile in range(TILES):
            row_at = row_parts + block_place(place + tile, at, pairs, row, 0, size, 4)
            d_taught += tl.load(row_at + 2, mask=row < size, other=0)
            if CAUSAL:
                d_eta += tl.load(row_at, mask=row < size, other=0)
            if CAUSAL or not CLOSES:
                d_s += tl.load(row_at + 1, mask=row < size, other=0)
            if CAUSAL and MANY:
                d_eta += tl.load(row_at + 3, mask=row < size, other=0)
            if not (CAUSAL or CLOSES):
                d_s += tl.load(row_at + 3, mask=row < size, other=0)
        d_c += eta * d_taught
        tl.store(d_rate + token_rows(at, row, size), d_eta + push * d_taught, mask=row < size)
        if CAUSAL or not CLOSES:
            scale_at = p * size + row
            tl.store(d_scale + scale_at, tl.load(d_scale + scale_at, mask=row < size, other=0) + d_s, mask=row < size)
    tl.store(d_push + n * pairs + p, tl.sum(d_c, 0))
