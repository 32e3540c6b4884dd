# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the MLP's kernels share: products, GELU, the inner loss's errors, and where tokens and weights lie.

Every function runs inside a kernel. Symbols and numbers in parentheses: `docs/backward.md`. A mini-batch's tokens, C or
`size`, are walked in blocks of `BLOCK` rows; rows past the last token are zeros where they are read, and not written.

`at` is which mini-batch, pair and hidden tile, and what tokens' places depend on: `(n, p, tile, steps, heads)`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_GELU_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
"""`a` of (2)"""
_GELU_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
"""`b` of (2)"""
PART = tl.constexpr(32)
"""Of a head's width, in a product on the ordinary cores."""
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_EPS = {"fp32": 2.0**-23, "fp64": 2.0**-52}


@triton.jit
def rounded(x):
    """`x` in float32, rounded to the nearest bfloat16, ties to even; for the interpreter, whose own cast truncates."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True).to(x.dtype)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """`a b`: operands in the precision's type, sums in float32 (float64 for operands in float64)."""
    if PRECISION != "bf16":
        return tl.dot(a, b, input_precision=PRECISION)
    elif _INTERPRETED:  # its products of bfloat16 are those of the bits  # noqa: RET505
        return tl.dot(rounded(a), rounded(b), input_precision="ieee")
    else:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))


@triton.jit
def wide_product(a, b, PRECISION: tl.constexpr, CAUSAL: tl.constexpr):
    """`product` over the width of a head; in parts of `PART`, if it is wide and runs on the ordinary cores.

    There a thread holds all numbers of its rows of `a` and columns of `b`. Of the parts, which the warps share, it
    holds a few; beside what a causal mini-batch needs it has no registers for more. Where it has, parts take more.
    `a` comes from memory, since its parts are turned to the front.
    """
    if CAUSAL and PRECISION == "ieee" and a.shape[1] > 2 * PART:
        PARTS: tl.constexpr = a.shape[1] // PART
        of_a = tl.permute(tl.reshape(a, (a.shape[0], PARTS, PART)), (1, 0, 2))
        return tl.sum(product(of_a, tl.reshape(b, (PARTS, PART, b.shape[1])), PRECISION), 0)
    return product(a, b, PRECISION)


@triton.jit
def gelu_parts(z):
    """`φ(z) = z σ(2u)` and the gate `σ(2u)` (2)."""
    gate = 1 / (1 + tl.exp(-z * (_GELU_SLOPE + _GELU_CUBIC * z * z)))
    return z * gate, gate


@triton.jit
def gelu_slope(z, value, gate):
    """`φ'(z)` (3)."""
    p = _GELU_SLOPE + 3 * _GELU_CUBIC * z * z
    return gate + value * (1 - gate) * p


@triton.jit
def gelu_bend(z, slope, gate):
    """`φ''(z)` (4)."""
    p = _GELU_SLOPE + 3 * _GELU_CUBIC * z * z
    return gate * (1 - gate) * (4 * p - 2 * _GELU_SLOPE) + (slope - gate) * p * (1 - 2 * gate)


@triton.jit
def normalised(z, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """`x̂` and `ι [rows,1]` of each row."""
    centred = z - (tl.sum(z, 1) / WIDTH)[:, None]
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + EPS)
    return centred * inverse[:, None], inverse[:, None]


@triton.jit
def projected(v, unit, WIDTH: tl.constexpr):
    """`Π(v) = v − mean(v) − x̂ mean(v ⊙ x̂)`, by rows."""
    return v - (tl.sum(v, 1) / WIDTH)[:, None] - unit * (tl.sum(v * unit, 1) / WIDTH)[:, None]


@triton.jit
def is_constant(z, LEAST: tl.constexpr):
    """Which rows hold one value throughout, up to rounding, `[rows,1]`; false for a row with a NaN (`ttt.ops.norm`).

    `LEAST` is four times the spacing of the type's numbers at 1.
    """
    least, most = tl.min(z, 1), tl.max(z, 1)
    total = tl.sum(z, 1)
    near = most - least <= LEAST * tl.maximum(tl.abs(least), tl.abs(most))
    return (near & (total == total))[:, None]


@triton.jit
def blocks(size, BLOCK: tl.constexpr, MANY: tl.constexpr):
    """How many blocks a mini-batch of `size` tokens has: one, unless it has `MANY`."""
    return (size + BLOCK - 1) // BLOCK if MANY else 1


@triton.jit
def token_rows(at, rows, size):
    """The rows of a mini-batch's tokens in a tensor whose memory is `[B,N,C,H,…]`, int64; `at` is said above."""
    n, p, steps, heads = at[0], at[1], at[3], at[4]
    return (((p // heads).to(tl.int64) * steps + n) * size + rows) * heads + p % heads


@triton.jit
def load_tokens(x, at, first, size, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The tokens of a mini-batch's block that begins at row `first`, `[BLOCK,WIDTH]`."""
    rows = first + tl.arange(0, BLOCK)[:, None]
    return tl.load(x + token_rows(at, rows, size) * WIDTH + tl.arange(0, WIDTH)[None, :], mask=rows < size, other=0)


@triton.jit
def store_tokens(x, value, at, first, size, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_tokens`."""
    rows = first + tl.arange(0, BLOCK)[:, None]
    tl.store(x + token_rows(at, rows, size) * WIDTH + tl.arange(0, WIDTH)[None, :], value, mask=rows < size)


@triton.jit
def load_column(x, at, first, size, BLOCK: tl.constexpr):
    """A number of each token of a block, `[BLOCK]`."""
    rows = first + tl.arange(0, BLOCK)
    return tl.load(x + token_rows(at, rows, size), mask=rows < size, other=0)


@triton.jit
def load_scale(scale, at, first, scale_b, size, BLOCK: tl.constexpr):
    """The step sizes `s` of a block's positions, `[BLOCK]`."""
    p, heads = at[1], at[4]
    rows = first + tl.arange(0, BLOCK)
    return tl.load(scale + (p // heads) * scale_b + rows, mask=rows < size, other=0)


@triton.jit
def norm_place(at, norm_b, norm_h, F: tl.constexpr):
    """Where a pair's row of `γ` or `β` lies, `[1,F]`."""
    p, heads = at[1], at[4]
    return (p // heads) * norm_b + (p % heads) * norm_h + tl.arange(0, F)[None, :]


@triton.jit
def push_of(last, at, last_n, last_b, CLOSES: tl.constexpr):
    """`c`, the factor of an update."""
    if CLOSES:
        n, p, heads = at[0], at[1], at[4]
        return -tl.load(last + n * last_n + (p // heads) * last_b)
    return tl.full([], 1, last.dtype.element_ty)


@triton.jit
def coefficients(eta, scale, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """`κ = −s ηᵀ ⊙ M` (9) and `κᵀ`, `[ROWS,ROWS]`; zeros where a row or column is no token."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    kappa, turned = -scale[:, None] * eta[None, :], -eta[:, None] * scale[None, :]
    if CAUSAL:
        kappa, turned = tl.where(j <= i, kappa, 0), tl.where(i <= j, turned, 0)
    return kappa, turned


@triton.jit
def load_block(x, index, at, pairs, first, size, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """A block's rows `[BLOCK,WIDTH]` of a tensor `[…,P,C,WIDTH]`; its leading axes together have the place `index`."""
    rows = first + tl.arange(0, BLOCK)[:, None]
    place = block_place(index, at, pairs, rows, tl.arange(0, WIDTH)[None, :], size, WIDTH)
    return tl.load(x + place, mask=rows < size, other=0)


@triton.jit
def store_block(x, value, index, at, pairs, first, size, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_block`."""
    rows = first + tl.arange(0, BLOCK)[:, None]
    place = block_place(index, at, pairs, rows, tl.arange(0, WIDTH)[None, :], size, WIDTH)
    tl.store(x + place, value, mask=rows < size)


@triton.jit
def load_hidden(x, index, at, pairs, first, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr):
    """A block's rows of this tile, `[BLOCK,TILE]`, of a tensor `[…,P,C,HIDDEN]`."""
    tile = at[2]
    rows, columns = first + tl.arange(0, BLOCK)[:, None], tile * TILE + tl.arange(0, TILE)[None, :]
    return tl.load(x + block_place(index, at, pairs, rows, columns, size, HIDDEN), mask=rows < size, other=0)


@triton.jit
def store_hidden(
    x, value, index, at, pairs, first, HIDDEN: tl.constexpr, TILE: tl.constexpr, size, BLOCK: tl.constexpr
):
    """The inverse of `load_hidden`."""
    tile = at[2]
    rows, columns = first + tl.arange(0, BLOCK)[:, None], tile * TILE + tl.arange(0, TILE)[None, :]
    tl.store(x + block_place(index, at, pairs, rows, columns, size, HIDDEN), value, mask=rows < size)


@triton.jit
def block_place(index, at, pairs, rows, columns, size, WIDTH: tl.constexpr):
    """Where `[rows,columns]` of a tensor `[…,P,C,WIDTH]` lies, whose leading axes together have the place `index`."""
    p = at[1]
    return ((index * pairs + p).to(tl.int64) * size + rows) * WIDTH + columns


@triton.jit
def first_tile(p, tile, bias, F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """Where a pair's tile `[F,TILE]` of `W_0 [P,F,HIDDEN]` lies; with `bias` 1, of `W̃_0 [P,F+1,HIDDEN]`."""
    inside = tl.arange(0, F)[:, None] * HIDDEN + tile * TILE + tl.arange(0, TILE)[None, :]
    return p.to(tl.int64) * (F + bias) * HIDDEN + inside


@triton.jit
def first_bias(p, tile, bias, F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """Where a pair's tile `[TILE]` of `b_0 [P,HIDDEN]` lies; with `bias` 1, from the bias of the first pair."""
    return p.to(tl.int64) * (1 + bias * F) * HIDDEN + tile * TILE + tl.arange(0, TILE)


@triton.jit
def second_tile(p, tile, bias, F: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """Where a pair's tile `[TILE,F]` of `W_1 [P,HIDDEN,F]` lies; with `bias` 1, of `W̃_1 [P,HIDDEN+1,F]`."""
    inside = (tile * TILE + tl.arange(0, TILE)[:, None]) * F + tl.arange(0, F)[None, :]
    return p.to(tl.int64) * (HIDDEN + bias) * F + inside


@triton.jit
def second_bias(p, bias, F: tl.constexpr, HIDDEN: tl.constexpr):
    """Where a pair's `b_1 [P,F]` lies; with `bias` 1, from the bias of the first pair."""
    return p.to(tl.int64) * (1 + bias * HIDDEN) * F + tl.arange(0, F)


@triton.jit
def is_tile(tile, index: tl.constexpr, WIDTH: tl.constexpr):
    """Whether this is the tile of this index, `[WIDTH]`: a mask for what one tile does for all, such as `b_1`."""
    return tl.zeros([WIDTH], tl.int32) + tile == index


@triton.jit
def summed_tiles(parts, index, at, pairs, first, TILES: tl.constexpr, size, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The sum over hidden tiles, in their order, of a block's parts; those of tile 0 lie at the place `index`."""
    total = tl.zeros([BLOCK, WIDTH], parts.dtype.element_ty)
    for tile in tl.range(TILES, loop_unroll_factor=4):
        total += load_block(parts, index + tile, at, pairs, first, size, BLOCK, WIDTH)
    return total


@triton.jit
def comes_last(tickets, p, TILES: tl.constexpr):
    """Whether all other tiles of this pair have stored their parts; what they have stored can be read then.

    Each tile of a launch asks once. Which one comes last is up to chance, but no number depends on it: the sums have
    the order of the tiles. Nobody waits.
    """
    tl.debug_barrier()  # the ticket tells of the whole program's stores
    return tl.atomic_add(tickets + p, 1, sem="acq_rel") % TILES == TILES - 1


def least_spread(dtype: str) -> float:
    """`LEAST` of `is_constant`."""
    return 4 * _EPS[dtype]
