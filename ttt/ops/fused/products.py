"""The operation's matrix products: every one goes through here, so that its operands have the problem's precision.

A bias is a row of its weights and is multiplied by one, so it is an operand too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops.constants import Precision
from ttt.ops.precision import rounded


class Products:
    """Products of batches of matrices; sums are in the type of the tensors."""

    def __init__(self, precision: Precision) -> None:
        self._rounds = precision == "bf16"

    def operands(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of a product, rounded if the precision says so; TF32 rounds inside the product."""
        return (rounded(a), rounded(b)) if self._rounds else (a, b)

    def of(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """`a b`, into `out` if it is given."""
        if self._rounds:
            a, b = self.operands(a, b)
        return torch.bmm(a, b, out=out)  # None: into new memory

    def add(self, base: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """`base + a b`, into `out`, or else into `base` itself."""
        if self._rounds:
            a, b = self.operands(a, b)
        if out is None or out is base:
            return base.baddbmm_(a, b)
        return torch.baddbmm(base, a, b, out=out)

    def add_outer(self, base: Tensor, columns: Tensor, rows: Tensor, out: Tensor) -> None:
        """`base + columns rows`, `[P,a,C]` and `[P,C,b]`, into `out`, which may be `base`.

        It is bound by memory for few tokens. A product passes once over a base in place, but copies it first into
        another result; an elementwise sum passes once for each token, and copies nothing.
        """
        count = rows.shape[-2]
        if count > 2 or (count == 2 and out is base):
            self.add(base, columns, rows, out)
            return
        columns, rows = self.operands(columns, rows)
        torch.addcmul(base, columns[..., :1], rows[:, :1], out=out)
        if count == 2:
            out.addcmul_(columns[..., 1:], rows[:, 1:])
