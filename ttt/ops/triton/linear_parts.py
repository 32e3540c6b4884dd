# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the linear inner model's kernels share: blocks of tokens and of weights, what queries see, errors and norms.

Every function runs inside a kernel. Symbols and numbers in parentheses: `docs/backward.md`.

A mini-batch's C tokens go through a kernel in blocks of `ROWS`, at least 16, which `tl.dot` needs; the rows
after the C tokens are zeros at zero rate. `W [F,F]` goes through it in blocks of `BLOCK` rows, and a product over the
inner width in columns of as many. Shape letters of tiles, besides C and F:

- `R`: `ROWS` tokens, a block of a mini-batch
- `B`: `BLOCK` of the F rows or columns of the weights

Products that run one after the other in one region of the code share the places of the warps in a tile: `[R,F]` is
parted by columns, and then so is `W`. A product `[R,R]` among them would have every warp hold all of `[R,F]`, and of
the weights beside it. So those have loops of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.mlp_parts import normalised, product, projected


@triton.jit
def tokens_at(at, spacing, left, ROWS: tl.constexpr, F: tl.constexpr):
    """Vectors of tokens `[ROWS,F]` from the pointer `at`, `spacing` numbers apart, zeros where no more are `left`."""
    i, f = tl.arange(0, ROWS)[:, None], tl.arange(0, F)[None, :]
    return tl.load(at + (i * spacing + f), mask=i < left, other=0)


@triton.jit
def numbers_at(at, spacing, left, ROWS: tl.constexpr):
    """A number of each token, `[ROWS]`."""
    i = tl.arange(0, ROWS)
    return tl.load(at + i * spacing, mask=i < left, other=0)


@triton.jit
def store_numbers(at, x_R, spacing, left, ROWS: tl.constexpr):
    """The inverse of `numbers_at`."""
    i = tl.arange(0, ROWS)
    tl.store(at + i * spacing, x_R, mask=i < left)


@triton.jit
def store_tokens(at, x_RF, spacing, left, ROWS: tl.constexpr, F: tl.constexpr):
    """The inverse of `tokens_at`."""
    i, f = tl.arange(0, ROWS)[:, None], tl.arange(0, F)[None, :]
    tl.store(at + (i * spacing + f), x_RF, mask=i < left)


@triton.jit
def rows_of_weights(ROWS: tl.constexpr, F: tl.constexpr):
    """Where the numbers of consecutive rows of `W [F,F]` lie."""
    return tl.arange(0, ROWS)[:, None] * F + tl.arange(0, F)[None, :]


@triton.jit
def weights_at(at, F: tl.constexpr, BLOCK: tl.constexpr):
    """`W [F,F]` from the pointer `at`, as a tuple of blocks of rows, `[BLOCK,F]` each."""
    blocks = ()
    for r in tl.static_range(F // BLOCK):
        blocks += (tl.load(at + r * BLOCK * F + rows_of_weights(BLOCK, F)),)  # type: ignore[assignment]
    return blocks


@triton.jit
def no_weights(dtype: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr):
    """The same of zeros."""
    blocks = ()
    for _ in tl.static_range(F // BLOCK):
        blocks += (tl.zeros((BLOCK, F), dtype),)  # type: ignore[assignment]
    return blocks


@triton.jit
def store_weights(at, weight, F: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `weights_at`."""
    for r in tl.static_range(F // BLOCK):
        tl.store(at + r * BLOCK * F + rows_of_weights(BLOCK, F), weight[r])


# fmt: off
@triton.jit
def times_weights(x, x_t, left, weight, bias_F, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
                  PRECISION: tl.constexpr):
    # fmt: on
    """`X W + b` of a block of tokens, with W as blocks of rows in registers; `x` points to the tokens."""
    x_RF = tl.zeros((ROWS, F), bias_F.dtype) + bias_F[None, :]
    for r in tl.static_range(F // BLOCK):
        x_RF += product(tokens_at(x + r * BLOCK, x_t, left, ROWS, BLOCK), weight[r], PRECISION)
    return x_RF


# fmt: off
@triton.jit
def both_times_weights(x, x_t, y, y_t, left, weight, bias_F, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
                       PRECISION: tl.constexpr):
    # fmt: on
    """`X W + b` and `Y W + b`: a block of W is a factor of both at once, not twice, nor kept as one in between."""
    x_RF = tl.zeros((ROWS, F), bias_F.dtype) + bias_F[None, :]
    y_RF = x_RF
    for r in tl.static_range(F // BLOCK):
        x_RF += product(tokens_at(x + r * BLOCK, x_t, left, ROWS, BLOCK), weight[r], PRECISION)
        y_RF += product(tokens_at(y + r * BLOCK, y_t, left, ROWS, BLOCK), weight[r], PRECISION)
    return x_RF, y_RF


# fmt: off
@triton.jit
def times_weights_at(x, x_t, left, weight, start_RF, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
                     PRECISION: tl.constexpr):
    # fmt: on
    """`start + x W`, with W in memory."""
    for at in range(0, F, BLOCK):
        x_RB = tokens_at(x + at, x_t, left, ROWS, BLOCK)
        start_RF += product(x_RB, tl.load(weight + at * F + rows_of_weights(BLOCK, F)), PRECISION)
    return start_RF


# fmt: off
@triton.jit
def seen(q, q_t, q_left, k, k_t, k_left, start, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
         PRECISION: tl.constexpr):
    # fmt: on
    """`start + Q Kᵀ` of two blocks of tokens in memory, `[ROWS,ROWS]`; with `start` 1 it is A of (9)."""
    seen_RR = tl.full((ROWS, ROWS), start, q.dtype.element_ty)
    for at in range(0, F, BLOCK):
        q_RB, k_RB = tokens_at(q + at, q_t, q_left, ROWS, BLOCK), tokens_at(k + at, k_t, k_left, ROWS, BLOCK)
        seen_RR += product(q_RB, tl.trans(k_RB), PRECISION)
    return seen_RR


@triton.jit
def after(x_RR, query, key, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """`x ⊙ M`: rows are queries from token `query` on, columns are keys from token `key` on."""
    if CAUSAL:
        i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
        x_RR = tl.where(key + j <= query + i, x_RR, 0)
    return x_RR


# fmt: off
@triton.jit
def taught(
    q, k, rate, errors, error_RF, summed, summed_F, q_t, k_t, rate_t, first,
    C: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    OPENED: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """`U = ((Q Kᵀ + 1) ⊙ M ηᵀ) E + Q G + g` for the block of queries from token `first` on.

    `q`, `k` and `rate` point to the mini-batch's tokens, `errors` to `E [C,F]`; if one block has all tokens, its errors
    are `error_RF`. G and g only if the mini-batch was open before.
    """
    taught_RF = tl.zeros_like(error_RF)
    for key in range(0, first + 1 if CAUSAL else C, ROWS):
        seen_RR = seen(
            q + first * q_t, q_t, C - first, k + key * k_t, k_t, C - key, 1, ROWS, F, BLOCK, PRECISION
        )
        seen_RR *= numbers_at(rate + key * rate_t, rate_t, C - key, ROWS)[None, :]
        if C > ROWS:
            error_RF = tokens_at(errors + key * F, F, C - key, ROWS, F)
        taught_RF += product(after(seen_RR, first, key, CAUSAL, ROWS), error_RF, PRECISION)
    if OPENED:
        taught_RF += summed_F[None, :]
        taught_RF = times_weights_at(q + first * q_t, q_t, C - first, summed, taught_RF, ROWS, F, BLOCK, PRECISION)
    return taught_RF


@triton.jit
def errors_of(output_RF, offset_RF, gamma_1F, F: tl.constexpr, EPS: tl.constexpr):
    """`x̂`, `ι`, `r` and `E` of a block's keys, (5) and (6); `output` is `Z`, `offset` is `β − t`."""
    unit_RF, inverse_R1 = normalised(output_RF, F, EPS)
    slope_RF = gamma_1F * (gamma_1F * unit_RF + offset_RF)
    return unit_RF, inverse_R1, slope_RF, inverse_R1 * projected(slope_RF, unit_RF, F)
