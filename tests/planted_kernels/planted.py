"""Each kernel has one fault; `sound` has none."""

import os

import triton
import triton.language as tl

from ttt.ops.triton.forms import Form

SCALE: tl.constexpr = tl.constexpr(2.0)


@triton.jit
def _doubled(x):
    return x * SCALE


@triton.jit
def sound(a, b, out, N, K, SIZE: tl.constexpr):
    """A product in tiles; `tl.trans` of what was loaded, which is allowed."""
    rows, inner = tl.arange(0, SIZE), tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, K, SIZE):
        x = tl.load(a + rows[:, None] * N + start + inner[None])
        y = tl.load(b + rows[:, None] * N + start + inner[None])
        total = tl.dot(x, tl.trans(y), total, input_precision="tf32")
    tl.store(out + rows[:, None] * N + inner[None], _doubled(total))


@triton.jit
def spilling(a, out, SIZE: tl.constexpr):
    """More live numbers than a thread of one warp has registers for."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None]
    x = tl.load(a + at)
    tl.store(out + at, x * tl.sum(x, 0)[None] + tl.sum(x * x, 1)[:, None])


@triton.jit
def hoarding(a, out, SIZE: tl.constexpr):
    """A transpose through more shared memory than an A100 has, not than an H100 has."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None]
    tl.store(out + at, tl.trans(tl.cumsum(tl.load(a + at), 1)))


@triton.jit
def turning(a, out, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """Transposes what a dot made, behind arithmetic and a loop with a sum in it."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None]
    x = tl.load(a + at)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for _ in range(STEPS):
        total = total * 0.5 + tl.dot(x, x)
        total -= tl.sum(total, 1)[:, None]
    tl.store(out + at, tl.dot(tl.trans(_doubled(total)), x))


@triton.jit
def broken(a, out, SIZE: tl.constexpr):
    """Does not compile: shapes that do not fit."""
    tl.store(out + tl.arange(0, SIZE), tl.load(a + tl.arange(0, 2 * SIZE)))


class _Deadly:
    """What ends the process that reads it, as a failed assertion in the compiler does."""

    def __repr__(self) -> str:
        return "deadly"

    def __str__(self) -> str:
        if not triton.knobs.runtime.interpret:
            os.abort()
        return "deadly"


def forms() -> list[Form]:
    """One of each."""
    two = {"a": "*fp32", "out": "*fp32"}
    more = {**two, "b": "*fp32", "N": "i32", "K": "i32"}
    return [
        Form("sound", sound, more, {"SIZE": 32}, aligned=frozenset(("a", "b", "out", "N"))),
        Form("spilling", spilling, two, {"SIZE": 128}, num_warps=1),
        Form("hoarding", hoarding, two, {"SIZE": 256}, num_warps=32, spilled_bytes=1 << 10),
        Form("turning", turning, two, {"STEPS": 3, "SIZE": 32}),
        Form("deadly", broken, two, {"SIZE": _Deadly()}),
        Form("broken", broken, two, {"SIZE": 32}),
    ]
