# mypy: allow-untyped-defs, allow-incomplete-defs
"""The MLP's forward step as a kernel: finish one mini-batch, begin the next. `mlp_forward` says how steps follow.

Symbols and numbers in parentheses: `docs/backward.md`, with the layers counted from 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.mlp_parts import (
    blocks,
    coefficients,
    comes_last,
    first_bias,
    first_tile,
    gelu_parts,
    gelu_slope,
    is_constant,
    is_tile,
    load_block,
    load_column,
    load_hidden,
    load_scale,
    load_tokens,
    norm_place,
    normalised,
    product,
    projected,
    push_of,
    second_bias,
    second_tile,
    store_block,
    store_hidden,
    store_tokens,
    summed_tiles,
)

_NEVER_SPECIALISED = [
    "n",
    "steps",
    "slots",
    "size",
    "from_bias",
    "to_bias",
    "scale_b",
    "last_n",
    "last_b",
    "norm_b",
    "norm_h",
]


@triton.jit(do_not_specialize=_NEVER_SPECIALISED)
def mlp_step(
    q, k, target, rate, gamma, beta, scale, last, d_answers,
    from_w0, from_b0, from_w1, from_b1, to_w0, to_b0, to_w1, to_b1, before_w0, before_b0, before_w1, before_b1,
    hidden, errors, output, asked, pulled, d_answered, shares, key_parts, answer_parts, tickets, answers,
    n, steps, heads, pairs, slots, from_bias, to_bias, scale_b, last_n, last_b, norm_b, norm_h,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, FINISH: tl.constexpr,
    BEGIN: tl.constexpr, UPDATE: tl.constexpr, CLOSES: tl.constexpr, OPENED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Finish mini-batch n − 1 and begin n, for one tile of one pair.

    `q`, `k`, `target`, `d_answers` and `answers` are tokens in the memory order `[B,N,C,H,F]`, `rate` `[B,N,C,H]`.

    `from_*` are the weights that opened n − 1 (n, if there is nothing to finish), `to_*` receive those that open n, or
    the sums of a mini-batch that stays open, and may be the same; without `UPDATE` they hold these weights already.
    `from_bias` or `to_bias` is 1 if biases are the last rows of their weights, so that pairs lie that much further
    apart. `before_*` are, with `OPENED`, the sums so far of the only mini-batch.

    `hidden` holds `Z_0 [slots,P,C,HIDDEN]` and `errors` `E_1 [slots,P,C,F]`, in the slot n modulo `slots`. With `KEEP`
    `output` `Z_1`, `asked` `y_0` and `pulled` `D_0` are kept beside them, nothing is answered, and `d_answers` goes
    back through the answers' norm (13): `d_answered` receives `dy_1` and `shares [slots,P,F]` what `dγ` has of it.
    `key_parts` and `answer_parts` are the tiles' parts of `Z_1` and `y_1`, `[tiles,P,C,F]`, which the program that
    comes last sums. `tickets [P]` begin at 0.
    """
    p, tile = tl.program_id(0), tl.program_id(1)
    MANY: tl.constexpr = C > BLOCK
    before, now = (n - 1, p, tile, steps, heads), (n, p, tile, steps, heads)
    w0_at, b0_at = first_tile(p, tile, from_bias, F, HIDDEN, TILE), first_bias(p, tile, from_bias, F, HIDDEN, TILE)
    w1_at, b1_at = second_tile(p, tile, from_bias, F, HIDDEN, TILE), second_bias(p, from_bias, F, HIDDEN)
    w0, b0 = tl.load(from_w0 + w0_at), tl.load(from_b0 + b0_at)
    w1, b1 = tl.load(from_w1 + w1_at), tl.load(from_b1 + b1_at, mask=is_tile(tile, 0, F), other=0)
    if FINISH:
        g0, c0, g1, c1 = _finish(
            w0, b0, w1, b1, q, k, rate, scale, before_w0, before_b0, before_w1, before_b1, hidden, errors, asked,
            pulled, answer_parts, before, pairs, slots, scale_b,
            F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION, CAUSAL, UPDATE, OPENED, KEEP,
        )  # fmt: skip
        w0_at, b0_at = first_tile(p, tile, to_bias, F, HIDDEN, TILE), first_bias(p, tile, to_bias, F, HIDDEN, TILE)
        w1_at, b1_at = second_tile(p, tile, to_bias, F, HIDDEN, TILE), second_bias(p, to_bias, F, HIDDEN)
        if UPDATE:  # (8)
            if CLOSES:
                push = push_of(last, before, last_n, last_b, CLOSES)
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
        _begin(w0, b0, w1, b1, k, hidden, key_parts, now, pairs, slots, F, HIDDEN, TILE, C, BLOCK, MANY, PRECISION)
    if comes_last(tickets, p, HIDDEN // TILE):
        if FINISH:
            _answer(
                q, gamma, beta, d_answers, answer_parts, d_answered, shares, answers, before, pairs, slots,
                norm_b, norm_h, F, HIDDEN // TILE, C, BLOCK, MANY, EPS, LEAST, KEEP,
            )  # fmt: skip
        if BEGIN:
            _errors(
                target, gamma, beta, key_parts, output, errors, now, pairs, slots, norm_b, norm_h,
                F, HIDDEN // TILE, C, BLOCK, MANY, EPS, KEEP,
            )  # fmt: skip


@triton.jit
def _begin(
    w0, b0, w1, b1, k, hidden, key_parts, at, pairs, slots,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys' way through a tile (1): `Z_0`, and its part of `Z_1`. The first tile's part has the bias."""
    n, tile = at[0], at[2]
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        z = product(load_tokens(k, at, first, size, BLOCK, F), w0, PRECISION) + b0[None, :]
        store_hidden(hidden, z, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        value, _ = gelu_parts(z)
        part = product(value, w1, PRECISION) + b1[None, :]
        store_block(key_parts, part, tile, at, pairs, first, size, BLOCK, F)


@triton.jit
def _finish(
    w0, b0, w1, b1, q, k, rate, scale, before_w0, before_b0, before_w1, before_b1, hidden, errors, asked, pulled,
    answer_parts, at, pairs, slots, scale_b,
    F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, UPDATE: tl.constexpr, OPENED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The errors of a mini-batch's tile (7), its sums (8), and its part of the answers (9), (10), block by block.

    Returns:
        Its sums `Σ_j η_j ∇ℓ_j`, those before it included, of `W_0`, `b_0`, `W_1` and `b_1`; without meaning if neither
        the update nor the answers need them.
    """
    n, p, tile, heads = at[0], at[1], at[2], at[4]
    g0, c0, g1, c1 = tl.zeros_like(w0), tl.zeros_like(b0), tl.zeros_like(w1), tl.zeros_like(b1)
    if OPENED:
        g0 += tl.load(before_w0 + first_tile(p, tile, 0, F, HIDDEN, TILE))
        c0 += tl.load(before_b0 + first_bias(p, tile, 0, F, HIDDEN, TILE))
        g1 += tl.load(before_w1 + second_tile(p, tile, 0, F, HIDDEN, TILE))
        c1 += tl.load(before_b1 + second_bias(p, 0, F, HIDDEN), mask=is_tile(tile, 0, F), other=0)
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        error1 = load_block(errors, n % slots, at, pairs, first, size, BLOCK, F)
        z = load_hidden(hidden, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        value, gate = gelu_parts(z)
        d = product(error1, tl.trans(w1), PRECISION)
        if KEEP:
            store_hidden(pulled, d, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
        error0 = d * gelu_slope(z, value, gate)
        eta = load_column(rate, at, first, size, BLOCK)
        keys = load_tokens(k, at, first, size, BLOCK, F)
        if CAUSAL:  # the block's own tokens in dual form, those before it as a sum of gradients
            queries = load_tokens(q, at, first, size, BLOCK, F)
            s = load_scale(scale, at, first, scale_b, size, BLOCK)
            kappa, _ = coefficients(eta, s, CAUSAL, BLOCK)
            y = product(queries, w0, PRECISION) + b0[None, :]
            y += product((product(queries, tl.trans(keys), PRECISION) + 1) * kappa, error0, PRECISION)
            if OPENED or MANY:
                y -= s[:, None] * (product(queries, g0, PRECISION) + c0[None, :])
            if KEEP:
                store_hidden(asked, y, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
            asking, _ = gelu_parts(y)
            part = product(asking, w1, PRECISION) + b1[None, :]
            seen = product(asking, tl.trans(value), PRECISION) + (tile == 0).to(w1.dtype)
            part += product(seen * kappa, error1, PRECISION)
            if OPENED or MANY:
                part -= s[:, None] * (product(asking, g1, PRECISION) + c1[None, :])
            store_block(answer_parts, part, tile, at, pairs, first, size, BLOCK, F)
        if UPDATE or not CAUSAL or MANY:
            g0 += product(tl.trans(keys * eta[:, None]), error0, PRECISION)
            c0 += tl.sum(error0 * eta[:, None], 0)
            g1 += product(tl.trans(value), error1 * eta[:, None], PRECISION)
            c1 += tl.where(tile == 0, tl.sum(error1 * eta[:, None], 0), 0)
    if not CAUSAL:  # all answer with the same weights, those of the first position's step
        step = tl.load(scale + (p // heads) * scale_b)
        after0, bias0, after1, bias1 = w0 - step * g0, b0 - step * c0, w1 - step * g1, b1 - step * c1
        for block in range(blocks(size, BLOCK, MANY)):
            first = block * BLOCK
            y = product(load_tokens(q, at, first, size, BLOCK, F), after0, PRECISION) + bias0[None, :]
            if KEEP:
                store_hidden(asked, y, n % slots, at, pairs, first, HIDDEN, TILE, size, BLOCK)
            asking, _ = gelu_parts(y)
            part = product(asking, after1, PRECISION) + bias1[None, :]
            store_block(answer_parts, part, tile, at, pairs, first, size, BLOCK, F)
    return g0, c0, g1, c1


@triton.jit
def _errors(
    target, gamma, beta, key_parts, output, errors, at, pairs, slots, norm_b, norm_h,
    F: tl.constexpr, TILES: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr, EPS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Sum the tiles' parts of `Z_1`, and write `E_1` (5), (6); with `KEEP`, `Z_1` too."""
    n = at[0]
    norm_at = norm_place(at, norm_b, norm_h, F)
    width, shift = tl.load(gamma + norm_at), tl.load(beta + norm_at)
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        z = summed_tiles(key_parts, 0, at, pairs, first, TILES, size, BLOCK, F)
        if KEEP:
            store_block(output, z, n % slots, at, pairs, first, size, BLOCK, F)
        unit, inverse = normalised(z, F, EPS)
        r = width * (width * unit + shift - load_tokens(target, at, first, size, BLOCK, F))
        store_block(errors, inverse * projected(r, unit, F), n % slots, at, pairs, first, size, BLOCK, F)


@triton.jit
def _answer(
    q, gamma, beta, d_answers, answer_parts, d_answered, shares, answers, at, pairs, slots, norm_b, norm_h,
    F: tl.constexpr, TILES: tl.constexpr, size, BLOCK: tl.constexpr, MANY: tl.constexpr, EPS: tl.constexpr,
    LEAST: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Sum the tiles' parts of the answers, and write `z` (11); or, with `KEEP`, `dy_1` and a share of `dγ` (13)."""
    n, p = at[0], at[1]
    norm_at = norm_place(at, norm_b, norm_h, F)
    width, shift = tl.load(gamma + norm_at), tl.load(beta + norm_at)
    share = tl.zeros([F], width.dtype)
    for block in range(blocks(size, BLOCK, MANY)):
        first = block * BLOCK
        y = summed_tiles(answer_parts, 0, at, pairs, first, TILES, size, BLOCK, F)
        unit, inverse = normalised(y, F, EPS)
        if KEEP:
            d_z = load_tokens(d_answers, at, first, size, BLOCK, F)
            followed = tl.where(is_constant(y, LEAST), 0, inverse)  # a constant `y_1` gets no gradient
            d_y1 = followed * projected(width * d_z, unit, F)
            store_block(d_answered, d_y1, n % slots, at, pairs, first, size, BLOCK, F)
            share += tl.sum(d_z * unit, 0)
        else:
            z = load_tokens(q, at, first, size, BLOCK, F) + unit * width + shift
            store_tokens(answers, z, at, first, size, BLOCK, F)
    if KEEP:
        tl.store(shares + ((n % slots).to(tl.int64) * pairs + p) * F + tl.arange(0, F), share)
