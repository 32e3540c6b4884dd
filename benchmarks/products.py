"""The matrix products of a scan alone: the bound that `benchmarks/scan.py` measures scans against.

Each mini-batch runs the products that the scan needs, of their shapes, batched over streams and heads, into
memory that is there; backward runs the two products of each that give its operands' gradients. With groups, what
backward recomputes runs forward once more. No bias, no norm, no GELU, no autograd: nothing with these products is
faster, short of a kernel that never writes what is between them to memory.

`P` stands for streams times heads. Source of the products: `ttt.ops.linear` and `ttt.ops.mlp`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Product(NamedTuple):
    """`[rows, inner] @ [inner, columns]`, of one mini-batch and head."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns

    def gradients(self) -> tuple[Product, Product]:
        """The products that give the gradients of the left and of the right operand."""
        return Product(self.rows, self.columns, self.inner), Product(self.inner, self.rows, self.columns)


def products_of_minibatch(widths: Sequence[int], size: int, *, dual: bool) -> list[Product]:
    """What one mini-batch of C tokens needs for an inner model of the widths `F, …, F`.

    For each layer: keys and queries through its weights, the gradient through those of all but the first, and the
    weights' gradient. In dual form also what the queries see of the keys and what that makes of the gradient; without
    it the queries go through the weights after the mini-batch.
    """
    needed = []
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        needed += [Product(size, fan_in, fan_out)] * 2
        if layer:
            needed.append(Product(size, fan_out, fan_in))
        needed.append(Product(fan_in, size, fan_out))
        if dual:
            needed += [Product(size, fan_in, size), Product(size, size, fan_out)]
    return needed


class Products:
    """The products of a scan, ready to run.

    Args:
        widths: of the inner model, `F, …, F`.
        minibatches: how many there are of each size C: `{16: 11, 12: 1}`.
        pairs: P.
        dual: whether the queries answer in dual form.
        like: gives device and type.
    """

    def __init__(
        self, widths: Sequence[int], minibatches: Mapping[int, int], pairs: int, like: Tensor, *, dual: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        rooms: dict[tuple[int, int, str], Tensor] = {}

        def room(rows: int, columns: int, role: str) -> Tensor:
            if (rows, columns, role) not in rooms:
                rooms[rows, columns, role] = torch.randn(pairs, rows, columns, generator=generator).to(like)
            return rooms[rows, columns, role]

        def operands(product: Product) -> tuple[Tensor, Tensor, Tensor]:
            rows, inner, columns = product
            return room(rows, inner, "left"), room(inner, columns, "right"), room(rows, columns, "out")

        self.flops = 0
        """Of one forward pass; a backward pass has twice as many."""
        self._forward: list[tuple[int, list[tuple[Tensor, Tensor, Tensor]]]] = []
        self._backward: list[tuple[int, list[tuple[Tensor, Tensor, Tensor]]]] = []
        for size, count in minibatches.items():
            products = products_of_minibatch(widths, size, dual=dual)
            self.flops += count * pairs * sum(product.flops for product in products)
            self._forward.append((count, [operands(product) for product in products]))
            gradients = [gradient for product in products for gradient in product.gradients()]
            self._backward.append((count, [operands(product) for product in gradients]))

    def forward(self) -> None:
        """Those of a forward pass."""
        _run(self._forward)

    def forward_and_backward(self, *, recomputed: bool) -> None:
        """Those of both passes; `recomputed`, with a second forward pass."""
        for _ in range(1 + recomputed):
            _run(self._forward)
        _run(self._backward)


@torch.no_grad()
def _run(minibatches: list[tuple[int, list[tuple[Tensor, Tensor, Tensor]]]]) -> None:
    for count, products in minibatches:
        for _ in range(count):
            for left, right, out in products:
                torch.bmm(left, right, out=out)
