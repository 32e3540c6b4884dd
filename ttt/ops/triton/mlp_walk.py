# mypy: allow-untyped-defs, allow-incomplete-defs
"""The MLP's backward step as a kernel: finish the way back of one mini-batch, begin that of the one before.

Symbols and numbers in parentheses: `docs/backward.md`, with the layers counted from 0. `mlp_backward` says how steps
follow each other. No product's result is transposed: what is needed so is computed so (names with `t`), or read from
memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.mlp_parts import (
    block_place,
    blocks,
    coefficients,
    comes_last,
    first_bias,
    first_tile,
    gelu_bend,
    gelu_parts,
    gelu_slope,
    is_tile,
    load_block,
    load_column,
    load_hidden,
    load_scale,
    load_tokens,
    product,
    push_of,
    second_bias,
    second_tile,
    store_block,
    store_hidden,
    wide_product,
)
from ttt.ops.triton.mlp_queries import answered_first, answered_second, first_sums, queries_back, second_sums
from ttt.ops.triton.mlp_sums import output_back, tokens_back

_NEVER_SPECIALISED = [
    "n",
    "steps",
    "slots",
    "size",
    "w0_bias",
    "w1_bias",
    "scale_b",
    "last_n",
    "last_b",
    "norm_b",
    "norm_h",
]


@triton.jit(do_not_specialize=_NEVER_SPECIALISED)
def mlp_walk(
    q, k, target, rate, gamma, beta, scale, last, d_answers,
    w0, w1, next_w0, next_b0, next_w1, next_b1, to_w0, to_b0, to_w1, to_b1,
    before_w0, before_b0, before_w1, before_b1, d_before_w0, d_before_b0, d_before_w1, d_before_b1,
    hidden, errors, output, asked, pulled, d_answered, shares, d_error, d_asked, d_output,
    error_parts, query_parts, key_parts, seen_parts, row_parts, tickets,
    d_q, d_k, d_target, d_rate, d_gamma, d_beta, d_scale, d_push,
    n, steps, heads, pairs, slots, w0_bias, w1_bias, scale_b, last_n, last_b, norm_b, norm_h,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, FINISH: tl.constexpr,
    BEGIN: tl.constexpr, CLOSES: tl.constexpr, OPENED: tl.constexpr,
):  # fmt: skip
    """Finish mini-batch n + 1 and begin n, for one tile of one pair; the program that comes last sums what they leave.

    Tokens, `hidden` to `shares` and `before_*` are those of `mlp_step`. `w0` opened n + 1 (n, if there is nothing to
    finish), `w1` opened n (n + 1, if there is nothing to begin); `w0_bias` and `w1_bias` are 1 if a bias is the last
    row of each pair's. `next_*` hold `dW'` of n + 1 (of n, if there is nothing to finish) and may be `to_*`, which
    receive its `dW`, the `dW'` of n. If the update is not causal, the `dW'` that is left for finishing has the answers'
    share (12') already; that of an open mini-batch is `dG'`, with theirs.

    What beginning leaves for finishing lies in two slots, by the mini-batch modulo 2: `d_error` `dE_0` and `d_asked`
    `dy_0` `[2,P,C,HIDDEN]`, `d_output` `dZ_1` `[2,P,C,F]`, the tiles' parts of `dQ` `[2,tiles,P,C,F]`, of `dB_0` within
    blocks `[2,tiles,P,C,BLOCK]`, and of `dη` through `κ`, of `ds`, of `d(cη)` and of `dη` through sums of gradients
    `[2,tiles,P,C,4]`. The tiles' parts of `dE_1` and `dK`, `[tiles,P,C,F]`, are summed in the launch that makes them.
    `tickets [P]` begin at 0.
    """
    p, tile = tl.program_id(0), tl.program_id(1)
    MANY: tl.constexpr = C > BLOCK
    FACTORS: tl.constexpr = BEGIN and CAUSAL and C <= BLOCK and PRECISION != "ieee"  # takes fewer registers
    now, later = (n, p, tile, steps, heads), (n + 1, p, tile, steps, heads)
    w0_at, b0_at = first_tile(p, tile, 0, F, HIDDEN, TILE), first_bias(p, tile, 0, F, HIDDEN, TILE)
    w1_at, b1_at = second_tile(p, tile, 0, F, HIDDEN, TILE), second_bias(p, 0, F, HIDDEN)
    only = is_tile(tile, 0, F)
    # Several threads read each of these, and one will write it: all read before the first barrier.
    d_b0, d_b1 = tl.load(next_b0 + b0_at), tl.load(next_b1 + b1_at, mask=only, other=0)
    second = tl.load(w1 + second_tile(p, tile, w1_bias, F, HIDDEN, TILE))
    first_at = w0 + first_tile(p, tile, w0_bias, F, HIDDEN, TILE)
    if FINISH:
        push = push_of(last, later, last_n, last_b, CLOSES)
        second_t = tl.trans(second)
        # W_1 of n + 1, which is not read: what n has taught is added again, here or to what is multiplied by it.
        if BEGIN and not FACTORS:
            taught, _ = second_sums(
                rate, hidden, errors, before_w1, before_b1, now, pairs, slots,
                F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, False,
            )  # fmt: skip
            second_t += push_of(last, now, last_n, last_b, CLOSES) * taught
        d_w1, d_b1 = _finish_second(
            next_w1 + w1_at, d_b1, second_t, push, rate, scale, d_before_w1, d_before_b1, hidden, errors, asked,
            pulled, d_answered, d_error, d_output, later, now, last, pairs, slots, scale_b, last_n, last_b,
            F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, CAUSAL, CLOSES, OPENED, FACTORS,
        )  # fmt: skip
        if BEGIN and not CAUSAL:
            d_w1, d_b1 = answered_second(
                second_t, second_t, d_b1, d_w1, d_b1, scale, asked, d_answered, d_asked, row_parts, now, pairs, slots,
                scale_b, F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, CLOSES,
            )  # fmt: skip
        tl.debug_barrier()  # what the second layer's half leaves for the first's, other threads read
        first = tl.load(first_at)
        d_w0, d_b0 = _finish_first(
            next_w0 + w0_at, d_b0, first, push, q, k, rate, scale, d_before_w0, d_before_b0, hidden, pulled,
            d_error, d_asked, query_parts, key_parts, later, pairs, slots, scale_b,
            F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, CAUSAL, CLOSES, OPENED,
        )  # fmt: skip
        if BEGIN and not CAUSAL:
            d_w0, d_b0 = answered_first(
                tl.trans(first), d_w0, d_b0, d_w0, d_b0, q, scale, d_asked, query_parts, row_parts, now, pairs,
                scale_b, F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, CLOSES,
            )  # fmt: skip
    else:
        d_w0, d_w1 = tl.load(next_w0 + w0_at), tl.load(next_w1 + w1_at)
        if not CAUSAL:
            second_t, first_t = tl.trans(second), tl.trans(tl.load(first_at))
            taught1, taught_b1 = second_sums(
                rate, hidden, errors, before_w1, before_b1, now, pairs, slots,
                F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, OPENED,
            )  # fmt: skip
            taught0, taught_b0 = first_sums(
                k, rate, hidden, pulled, before_w0, before_b0, now, pairs, slots,
                F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, OPENED,
            )  # fmt: skip
            if CLOSES:
                push = push_of(last, now, last_n, last_b, CLOSES)
                second_t += push * taught1
                first_t += push * taught0
            d_w1, d_b1 = answered_second(
                second_t, taught1, taught_b1, d_w1, d_b1, scale, asked, d_answered, d_asked, row_parts, now, pairs,
                slots, scale_b, F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, CLOSES,
            )  # fmt: skip
            tl.debug_barrier()
            d_w0, d_b0 = answered_first(
                first_t, taught0, taught_b0, d_w0, d_b0, q, scale, d_asked, query_parts, row_parts, now, pairs,
                scale_b, F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, CLOSES,
            )  # fmt: skip
    if FINISH or not CAUSAL:
        tl.store(to_w0 + w0_at, d_w0)
        tl.store(to_b0 + b0_at, d_b0)
        tl.store(to_w1 + w1_at, d_w1)
        tl.store(to_b1 + b1_at, d_b1, mask=only)
    if BEGIN:
        if CAUSAL:
            queries_back(
                second, q, k, rate, scale, before_w0, before_b0, before_w1, before_b1, hidden, errors, asked, pulled,
                d_answered, d_asked, query_parts, seen_parts, row_parts, now, pairs, slots, scale_b,
                F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, OPENED,
            )  # fmt: skip
        tl.debug_barrier()  # what the queries leave for the keys; and what finishing has read is written over
        _keys_back(
            second, d_w0, d_b0, d_w1, d_b1, q, k, rate, scale, last, hidden, errors, asked, pulled, d_answered,
            d_error, d_asked, error_parts, row_parts, now, pairs, slots, scale_b, last_n, last_b,
            F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, CAUSAL, CLOSES,
        )  # fmt: skip
    if comes_last(tickets, p, HIDDEN // TILE):
        if FINISH:
            tokens_back(
                q, k, rate, scale, last, d_answers, query_parts, key_parts, seen_parts, row_parts, d_q, d_k, d_rate,
                d_scale, d_push, later, pairs, scale_b, last_n, last_b,
                F, HIDDEN // TILE, C, BLOCK, MANY, PRECISION, CAUSAL, CLOSES,
            )  # fmt: skip
        if BEGIN:
            output_back(
                target, gamma, beta, d_answers, output, errors, shares, error_parts, d_output, d_target, d_gamma,
                d_beta, now, pairs, slots, norm_b, norm_h, F, HIDDEN // TILE, C, BLOCK, MANY, EPS, LEAST,
            )  # fmt: skip


@triton.jit
def _keys_back(
    second, d_w0, d_b0, d_w1, d_b1, q, k, rate, scale, last, hidden, errors, asked, pulled, d_answered,
    d_error, d_asked, error_parts, row_parts, at, pairs, slots, scale_b, last_n, last_b,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, CLOSES: tl.constexpr,
):  # fmt: skip
    """`dE_0` and a tile's part of `dE_1`, from the last block to the first: (15), the update (18), the errors (19)."""
    n, tile = at[0], at[2]
    push = push_of(last, at, last_n, last_b, CLOSES)
    # What the queries of later blocks ask of the sums of gradients.
    h0, hb0, h1, hb1 = tl.zeros_like(d_w0), tl.zeros_like(d_b0), tl.zeros_like(d_w1), tl.zeros_like(d_b1)
    for block in range(blocks(size, BLOCK, MANY)):
        first = (blocks(size, BLOCK, MANY) - 1 - block) * BLOCK
        keys = load_tokens(k, at, first, size, BLOCK, F)
        error1 = load_block(errors, n % slots, at, pairs, first, size, BLOCK, F)
        z = load_hidden(hidden, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        value, gate = gelu_parts(z)
        slope = gelu_slope(z, value, gate)
        error0 = load_hidden(pulled, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK) * slope
        seen0 = wide_product(keys, d_w0, PRECISION, CAUSAL) + d_b0[None, :]
        seen1 = product(value, d_w1, PRECISION) + d_b1[None, :]
        eta = load_column(rate, at, first, size, BLOCK)
        row = first + tl.arange(0, BLOCK)
        row_at = row_parts + block_place((n % 2) * (HIDDEN // TILE) + tile, at, pairs, row, 0, size, 4)
        tl.store(row_at + 2, tl.sum(seen0 * error0, 1) + tl.sum(seen1 * error1, 1), mask=row < size)
        taught = (push * eta)[:, None]
        d_e0, part = taught * seen0, taught * seen1
        if CAUSAL:
            s = load_scale(scale, at, first, scale_b, size, BLOCK)
            if MANY:
                past0 = wide_product(keys, h0, PRECISION, CAUSAL) + hb0[None, :]
                past1 = product(value, h1, PRECISION) + hb1[None, :]
                tl.store(row_at + 3, -tl.sum(past0 * error0, 1) - tl.sum(past1 * error1, 1), mask=row < size)
                d_e0 -= eta[:, None] * past0
                part -= eta[:, None] * past1
            _, turned = coefficients(eta, s, CAUSAL, BLOCK)
            asking, _ = gelu_parts(load_hidden(asked, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK))
            d_y1 = load_block(d_answered, n % slots, at, pairs, first, size, BLOCK, F)
            around = product(value, tl.trans(asking), PRECISION) + (tile == 0).to(eta.dtype)
            part += product(around * turned, d_y1, PRECISION)
            queries = load_tokens(q, at, first, size, BLOCK, F)
            d_y0 = load_hidden(d_asked, n % 2, at, pairs, first, HIDDEN, TILE, size, BLOCK)
            around = wide_product(keys, tl.trans(queries), PRECISION, CAUSAL) + 1
            d_e0 += product(around * turned, d_y0, PRECISION)
            if MANY:
                step0, step1 = s[:, None] * d_y0, s[:, None] * d_y1
                h0 += product(tl.trans(queries), step0, PRECISION)
                hb0 += tl.sum(step0, 0)
                h1 += product(tl.trans(asking), step1, PRECISION)
                hb1 += tl.where(tile == 0, tl.sum(step1, 0), 0)
        part += product(d_e0 * slope, second, PRECISION)
        store_hidden(d_error, d_e0, n % 2, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        store_block(error_parts, part, tile, at, pairs, first, size, BLOCK, F)


@triton.jit
def _finish_second(
    next_w1, next_b1, second_t, push, rate, scale, d_before_w1, d_before_b1, hidden, errors, asked, pulled,
    d_answered, d_error, d_output, at, earlier, last, pairs, slots, scale_b, last_n, last_b,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, CLOSES: tl.constexpr, OPENED: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """From `dZ_1` through the second layer: the keys (16), (18), (21), and `dW_1` (22), which it returns with `db_1`.

    Leaves `dZ_0` in the slot of `d_error` that nobody else uses now.
    """
    n, p, tile = at[0], at[1], at[2]
    next1 = tl.load(next_w1)
    d_w1, d_b1 = tl.zeros_like(next1), tl.zeros_like(next_b1)
    if CLOSES:  # else W passes nothing on: G' does
        d_w1 += next1
        d_b1 += next_b1
    taught_t, taught_b = push * tl.trans(next1), push * next_b1  # dG_1ᵀ, as this block's update sees it
    for block in range(blocks(size, BLOCK, MANY)):
        first = (blocks(size, BLOCK, MANY) - 1 - block) * BLOCK
        error1 = load_block(errors, n % slots, at, pairs, first, size, BLOCK, F)
        d_z1 = load_block(d_output, n % 2, at, pairs, first, size, BLOCK, F)
        eta = load_column(rate, at, first, size, BLOCK)
        d_x = eta[:, None] * wide_product(error1, taught_t, PRECISION, CAUSAL)
        d_x += wide_product(d_z1, second_t, PRECISION, CAUSAL)
        if FACTORS:  # `second_t` opened the mini-batch before: what it has taught, as factors
            slot = earlier[0] % slots
            taught, _ = gelu_parts(load_hidden(hidden, slot, earlier, pairs, first, HIDDEN, TILE, size, BLOCK))
            pushed = push_of(last, earlier, last_n, last_b, CLOSES) * load_column(rate, earlier, first, size, BLOCK)
            teaching = pushed[:, None] * load_block(errors, slot, earlier, pairs, first, size, BLOCK, F)
            d_x += product(product(d_z1, tl.trans(teaching), PRECISION), taught, PRECISION)
        z = load_hidden(hidden, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        value, gate = gelu_parts(z)
        slope = gelu_slope(z, value, gate)
        d_e0 = load_hidden(d_error, n % 2, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        d_w1 += product(tl.trans(value), d_z1, PRECISION)
        d_w1 += product(tl.trans(d_e0 * slope), error1, PRECISION)
        d_b1 += tl.where(tile == 0, tl.sum(d_z1, 0), 0)
        if CAUSAL or not CLOSES:  # else the answers belong to the weights after it
            d_y1 = load_block(d_answered, n % slots, at, pairs, first, size, BLOCK, F)
            asking, _ = gelu_parts(load_hidden(asked, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK))
            d_w1 += product(tl.trans(asking), d_y1, PRECISION)
            d_b1 += tl.where(tile == 0, tl.sum(d_y1, 0), 0)
            if CAUSAL:
                s = load_scale(scale, at, first, scale_b, size, BLOCK)
                _, turned = coefficients(eta, s, CAUSAL, BLOCK)
                d_x += product(wide_product(error1, tl.trans(d_y1), PRECISION, CAUSAL) * turned, asking, PRECISION)
                if OPENED or MANY:
                    step = s[:, None] * d_y1
                    taught_t -= product(tl.trans(step), asking, PRECISION)
                    taught_b -= tl.where(tile == 0, tl.sum(step, 0), 0)
        d = load_hidden(pulled, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        d_z0 = d_e0 * d * gelu_bend(z, slope, gate) + d_x * slope
        store_hidden(d_error, d_z0, (n + 1) % 2, at, pairs, first, HIDDEN, TILE, size, BLOCK)
    if OPENED:
        tl.store(d_before_w1 + tl.trans(second_tile(p, tile, 0, F, HIDDEN, TILE)), taught_t)
        tl.store(d_before_b1 + second_bias(p, 0, F, HIDDEN), taught_b, mask=is_tile(tile, 0, F))
    return d_w1, d_b1


@triton.jit
def _finish_first(
    next_w0, next_b0, first_weights, push, q, k, rate, scale, d_before_w0, d_before_b0, hidden, pulled,
    d_error, d_asked, query_parts, key_parts, at, pairs, slots, scale_b,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, CLOSES: tl.constexpr, OPENED: tl.constexpr,
):  # fmt: skip
    """From `dZ_0` through the first layer: parts of `dK` and `dQ` (18), (23), and `dW_0` (22), returned with `db_0`."""
    n, p, tile = at[0], at[1], at[2]
    next0 = tl.load(next_w0)
    d_w0, d_b0 = tl.zeros_like(next0), tl.zeros_like(next_b0)
    if CLOSES:
        d_w0 += next0
        d_b0 += next_b0
    taught_t, taught_b = push * tl.trans(next0), push * next_b0  # dG_0ᵀ, as this block's update sees it
    for block in range(blocks(size, BLOCK, MANY)):
        first = (blocks(size, BLOCK, MANY) - 1 - block) * BLOCK
        d_z0 = load_hidden(d_error, (n + 1) % 2, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        z = load_hidden(hidden, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        value, gate = gelu_parts(z)
        error0 = load_hidden(pulled, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK) * gelu_slope(
            z, value, gate
        )
        eta = load_column(rate, at, first, size, BLOCK)
        d_key = eta[:, None] * product(error0, taught_t, PRECISION)
        d_key += product(d_z0, tl.trans(first_weights), PRECISION)
        store_block(key_parts, d_key, tile, at, pairs, first, size, BLOCK, F)
        keys = load_tokens(k, at, first, size, BLOCK, F)
        d_w0 += product(tl.trans(keys), d_z0, PRECISION)
        d_b0 += tl.sum(d_z0, 0)
        if CAUSAL or not CLOSES:
            queries = load_tokens(q, at, first, size, BLOCK, F)
            d_y0 = load_hidden(d_asked, n % 2, at, pairs, first, HIDDEN, TILE, size, BLOCK)
            d_w0 += product(tl.trans(queries), d_y0, PRECISION)
            d_b0 += tl.sum(d_y0, 0)
            if CAUSAL:
                place = (n % 2) * (HIDDEN // TILE) + tile
                d_query = product(d_y0, tl.trans(first_weights), PRECISION)
                if OPENED or MANY:
                    d_query += load_block(query_parts, place, at, pairs, first, size, BLOCK, F)
                    step = load_scale(scale, at, first, scale_b, size, BLOCK)[:, None] * d_y0
                    taught_t -= product(tl.trans(step), queries, PRECISION)
                    taught_b -= tl.sum(step, 0)
                store_block(query_parts, d_query, place, at, pairs, first, size, BLOCK, F)
    if OPENED:
        tl.store(d_before_w0 + tl.trans(first_tile(p, tile, 0, F, HIDDEN, TILE)), taught_t)
        tl.store(d_before_b0 + first_bias(p, tile, 0, F, HIDDEN, TILE), taught_b)
    return d_w0, d_b0
