"""In what the inner model's products are multiplied, whatever PyTorch is set to globally.

| | operands | where |
| --- | --- | --- |
| `ieee` | as they are | everywhere |
| `tf32` | rounded to TF32 by the GPU's matrix units | CUDA, compute capability 8.0 and later |
| `bf16` | rounded to bfloat16, to the nearest, ties to even | everywhere |

Sums are float32 (float64 for float64), and so are the fast weights, their gradients and every norm. A number rounded to
bfloat16 is a TF32 number too, so `bf16` multiplies on CUDA by the same units without rounding again.

What a caller sets globally (`torch.set_float32_matmul_precision`, `fp32_precision`, `allow_tf32`) acts on all float32
products of a process. Here it is set for the inner products alone, around forward and around backward, and then set
back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ttt.ops.constants import Precision

_BACKENDS: dict[str, Any] = {
    "cpu": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    "cuda": torch.backends.cuda.matmul,
}


@contextlib.contextmanager
def multiplying(x: Tensor, precision: Precision) -> Iterator[None]:
    """A context in which the float32 products on the device of `x` are exact, or take TF32 where that is wanted."""
    wanted = "tf32" if x.is_cuda and precision != "ieee" else "ieee"
    before = global_precision(x)
    if before == wanted:
        yield
        return
    _set(x, wanted)
    try:
        yield
    finally:
        _set(x, "none")  # it follows `torch.backends.fp32_precision` again, if that was what held
        if global_precision(x) != before:
            _set(x, before)


def global_precision(x: Tensor) -> str:
    """What PyTorch is set to for float32 products on the device of `x`: `ieee`, `tf32` or `bf16`."""
    if x.dtype != torch.float32 or x.device.type not in _BACKENDS:
        return "ieee"
    found: str = _BACKENDS[x.device.type].fp32_precision
    return "ieee" if found == "none" else found


def _set(x: Tensor, precision: str) -> None:
    _BACKENDS[x.device.type].fp32_precision = precision


def rounded(x: Tensor) -> Tensor:
    """`x`, every number rounded to bfloat16, in its own type."""
    return x.to(torch.bfloat16).to(x.dtype)


class _Product(torch.autograd.Function):
    """`a @ b` of equal batch sizes, whose derivatives are products of the same precision."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, precision: Precision) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.precision = precision
        return _multiply(a, b, precision)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        d_a = product(d, b.mT, ctx.precision) if ctx.needs_input_grad[0] else None
        d_b = product(a.mT, d, ctx.precision) if ctx.needs_input_grad[1] else None
        return d_a, d_b, None


def _multiply(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    if precision == "bf16":
        a, b = rounded(a), rounded(b)
    with multiplying(a, precision):
        return a @ b


def product(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    """`a @ b` in a precision, in its derivatives too, for the products that autograd records.

    Where PyTorch is set to it anyway, this is PyTorch's own product, whose backward takes what is set then. So does
    compiled code in place of `ieee`: a compiler takes no setting from within.

    Args:
        a: `[B,H,…,…]`.
        b: `[B,H,…,…]`.
        precision: of the operands.
    """
    if torch.compiler.is_compiling():
        return rounded(a) @ rounded(b) if precision == "bf16" else a @ b
    if precision == "ieee" and global_precision(a) == "ieee":
        return a @ b
    if not torch.is_grad_enabled() or not (a.requires_grad or b.requires_grad):
        return _multiply(a, b, precision)
    return _Product.apply(a, b, precision)
