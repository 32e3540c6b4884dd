# mypy: allow-untyped-defs, allow-incomplete-defs
"""The parts of the linear inner model's backward kernel; symbols and equations are those of `linear_backward`.

Every function runs inside the kernel. Shape letters: see `linear_parts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.linear_parts import after, numbers_at, rows_of_weights, seen, tokens_at
from ttt.ops.triton.mlp_parts import is_constant, normalised, product, projected


@triton.jit
def before(x_RR, key, query, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """`x ⊙ Mᵀ`: rows are keys, columns are queries."""
    if CAUSAL:
        i, j = tl.arange(0, ROWS)[None, :], tl.arange(0, ROWS)[:, None]
        x_RR = tl.where(key + j <= query + i, x_RR, 0)
    return x_RR


@triton.jit
def norm_back(d_answer_RF, answer_RF, gamma_1F, F: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr):
    """`dy` of (13), and `ŷ`."""
    unit_RF, inverse_R1 = normalised(answer_RF, F, EPS)
    d_answered_RF = inverse_R1 * projected(gamma_1F * d_answer_RF, unit_RF, F)
    # A constant vector gets no gradient (`ttt.ops.norm`).
    return tl.where(is_constant(answer_RF, LEAST), 0, d_answered_RF), unit_RF


@triton.jit
def errors_back(
    d_error_RF, output_RF, unit_RF, inverse_R1, slope_RF, error_RF, gamma_1F, F: tl.constexpr, LEAST: tl.constexpr
):
    """`dr` and `dZ` of (20)."""
    constant_R1 = is_constant(output_RF, LEAST)
    silent_R1 = (tl.max(tl.abs(error_RF), 1) == 0)[:, None]
    d_slope_RF = tl.where(constant_R1 & silent_R1, 0, inverse_R1) * projected(d_error_RF, unit_RF, F)
    along_unit_R1 = (tl.sum(d_error_RF * unit_RF, 1) / F)[:, None]
    along_error_R1 = (tl.sum(d_error_RF * error_RF, 1) / F)[:, None]
    to_slope_R1 = (tl.sum(slope_RF * unit_RF, 1) / F)[:, None]
    d_output_RF = projected(gamma_1F * gamma_1F * d_slope_RF, unit_RF, F) - to_slope_R1 * d_slope_RF
    d_output_RF -= error_RF * along_unit_R1 + unit_RF * along_error_R1
    return d_slope_RF, tl.where(constant_R1, 0, inverse_R1) * d_output_RF


# fmt: off
@triton.jit
def products(
    k, q, k_t, q_t, left, weight, bias_F, answering, answering_F,
    ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """`Z`, and what queries have of the weights that they answer with."""
    output_RF = tl.zeros((ROWS, F), bias_F.dtype) + bias_F[None, :]
    answer_RF = tl.zeros((ROWS, F), bias_F.dtype) + answering_F[None, :]
    for at in range(0, F, BLOCK):
        block = at * F + rows_of_weights(BLOCK, F)
        k_RB, q_RB = tokens_at(k + at, k_t, left, ROWS, BLOCK), tokens_at(q + at, q_t, left, ROWS, BLOCK)
        output_RF += product(k_RB, tl.load(weight + block), PRECISION)
        answer_RF += product(q_RB, tl.load(answering + block), PRECISION)
    return output_RF, answer_RF


# fmt: off
@triton.jit
def pulled(
    k, q, d_y, scale, k_t, q_t, first,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """`((K Qᵀ + 1) ⊙ Mᵀ) u` (15), for the block of keys from token `first` on."""
    pulled_RF = tl.zeros((ROWS, F), d_y.dtype.element_ty)
    for query in range(first if CAUSAL else 0, C, ROWS):
        left = C - query
        seen_RR = seen(k + first * k_t, k_t, C - first, q + query * q_t, q_t, left, 1, ROWS, F, BLOCK, PRECISION)
        d_taught_RF = -numbers_at(scale + query, 1, left, ROWS)[:, None] * tokens_at(d_y + query * F, F, left, ROWS, F)
        pulled_RF += product(before(seen_RR, first, query, CAUSAL, ROWS), d_taught_RF, PRECISION)
    return pulled_RF


# fmt: off
@triton.jit
def through_tokens(
    d_q_RF, d_k_RF, q, k, rate, scale, errors, d_y, q_t, k_t, rate_t, first,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """Add to `dQ` and `dK` of a block what queries see of keys (16)."""
    left = C - first
    scale_R1 = numbers_at(scale + first, 1, left, ROWS)[:, None]
    rate_R1 = numbers_at(rate + first * rate_t, rate_t, left, ROWS)[:, None]
    for key in range(0, first + 1 if CAUSAL else C, ROWS):
        mixed_RR = seen(d_y + first * F, F, left, errors + key * F, F, C - key, 0, ROWS, F, BLOCK, PRECISION)
        mixed_RR *= -scale_R1 * numbers_at(rate + key * rate_t, rate_t, C - key, ROWS)[None, :]
        k_RF = tokens_at(k + key * k_t, k_t, C - key, ROWS, F)
        d_q_RF += product(after(mixed_RR, first, key, CAUSAL, ROWS), k_RF, PRECISION)
    for query in range(first if CAUSAL else 0, C, ROWS):
        mixed_RR = seen(errors + first * F, F, left, d_y + query * F, F, C - query, 0, ROWS, F, BLOCK, PRECISION)
        mixed_RR *= -rate_R1 * numbers_at(scale + query, 1, C - query, ROWS)[None, :]
        q_RF = tokens_at(q + query * q_t, q_t, C - query, ROWS, F)
        d_k_RF += product(before(mixed_RR, first, query, CAUSAL, ROWS), q_RF, PRECISION)
    return d_q_RF, d_k_RF


# fmt: off
@triton.jit
def through_weights(
    errors, d_y, d_output, push_R1, scale_R1, left, weight, answering, d_next, summed,
    ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, OPENED: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """What the weights give to `dQ` and `dK` of a block, (23) and (16'); `push` is `c η`."""
    d_q_RF = tl.zeros((ROWS, F), errors.dtype.element_ty)
    d_k_RF = d_q_RF
    for at in range(0, F, BLOCK):
        d_y_RB = tokens_at(d_y + at, F, left, ROWS, BLOCK)
        d_output_RB = tokens_at(d_output + at, F, left, ROWS, BLOCK)
        pushed_RB = push_R1 * tokens_at(errors + at, F, left, ROWS, BLOCK)
        block = at + tl.arange(0, F)[:, None] * F + tl.arange(0, BLOCK)[None, :]
        d_q_RF += product(d_y_RB, tl.trans(tl.load(answering + block)), PRECISION)
        d_k_RF += product(d_output_RB, tl.trans(tl.load(weight + block)), PRECISION)
        d_k_RF += product(pushed_RB, tl.trans(tl.load(d_next + block)), PRECISION)
        if OPENED:
            d_q_RF += product(-scale_R1 * d_y_RB, tl.trans(tl.load(summed + block)), PRECISION)
    return d_q_RF, d_k_RF


# fmt: off
@triton.jit
def add_outer(
    sums_BF, x, x_t, d_x, C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """Add `Xᵀ dX` of a mini-batch to rows of a gradient of weights; `x` points to the columns that belong to them."""
    for first in range(0, C, ROWS):
        x_RB = tokens_at(x + first * x_t, x_t, C - first, ROWS, BLOCK)
        sums_BF += product(tl.trans(x_RB), tokens_at(d_x + first * F, F, C - first, ROWS, F), PRECISION)
    return sums_BF


# fmt: off
@triton.jit
def add_outer_scaled(
    sums_BF, x, x_t, d_x, scale, C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """Add `−Xᵀ (s ⊙ dX)`."""
    for first in range(0, C, ROWS):
        x_RB = tokens_at(x + first * x_t, x_t, C - first, ROWS, BLOCK)
        d_x_RF = tokens_at(d_x + first * F, F, C - first, ROWS, F)
        d_x_RF *= -numbers_at(scale + first, 1, C - first, ROWS)[:, None]
        sums_BF += product(tl.trans(x_RB), d_x_RF, PRECISION)
    return sums_BF
