"""What the MLP's two passes share on the host: sizes, where weights lie, and the order of the forward steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ttt.ops.constants import Precision
from ttt.ops.fused.layout import Dims, Problem
from ttt.ops.triton.forms import Form
from ttt.ops.triton.mlp_parts import least_spread
from ttt.ops.triton.mlp_step import mlp_step

TILES = (32, 16)
"""Widths of a hidden tile: the first if it divides the hidden width and the mini-batch is short; registers are few."""
WIDTHS = (16, 32, 64, 128)
"""Widths of a head, F."""
MOST_ROWS = 64
"""The most tokens of a mini-batch."""


class Sizes(NamedTuple):
    """The sizes of a launch."""

    width: int
    """`F`"""
    hidden: int
    tile: int
    size: int
    """`C`"""

    @property
    def rows(self) -> int:
        """Rows of a tile: `C`, up to the next power of two that a product takes."""
        return max(16, triton.next_power_of_2(self.size))

    @property
    def tiles(self) -> int:
        """Hidden tiles."""
        return self.hidden // self.tile

    @classmethod
    def of_shape(cls, width: int, hidden: int, size: int) -> Sizes:
        """The sizes of a shape that has a form."""
        wide, narrow = TILES
        return cls(width, hidden, wide if size <= 32 and hidden % wide == 0 else narrow, size)

    @classmethod
    def of(cls, dims: Dims) -> Sizes:
        """The sizes of a problem.

        Raises:
            ValueError: the kernels have no form for it.
        """
        if dims.depth != 2:
            raise ValueError(f"the Triton kernels of the MLP run inner models of two layers, not {dims.depth}")
        width, hidden, _ = dims.widths
        if width not in WIDTHS:
            raise ValueError(f"the Triton kernels run heads of {', '.join(map(str, WIDTHS))}, not {width}")
        if hidden % TILES[-1]:
            raise ValueError(f"the Triton kernels need a hidden width that is a multiple of {TILES[-1]}, not {hidden}")
        if dims.size > MOST_ROWS:
            raise ValueError(f"the Triton kernels run mini-batches of at most {MOST_ROWS} tokens, not {dims.size}")
        return cls.of_shape(width, hidden, dims.size)

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return 8


class Place(NamedTuple):
    """Where the weights of all pairs lie, or sums or gradients in their shapes."""

    w0: Tensor
    b0: Tensor
    w1: Tensor
    b1: Tensor
    bias: int
    """1 if biases are the last rows of their weights."""

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Place:
        """Of `W [B,H,I,O]` and `b [B,H,1,O]` of both layers, each with memory of its own."""
        w0, b0, w1, b1 = (x.contiguous() for x in tensors)
        return cls(w0, b0, w1, b1, 0)

    @classmethod
    def joined(cls, tensors: list[Tensor], index: int) -> Place:
        """Of one of several, `W̃ [M,P,J,O]` of both layers."""
        first, second = (x[index] for x in tensors)
        return cls(first, first[:, -1], second, second[:, -1], 1)


class Kept(NamedTuple):
    """What backward reads of a group's mini-batches, one slot for each."""

    hidden: Tensor
    """`Z_0 [slots,P,C,HIDDEN]`"""
    output: Tensor
    """`Z_1 [slots,P,C,F]`"""
    asked: Tensor
    """`y_0`"""
    pulled: Tensor
    """`D_0`"""
    answered: Tensor
    """`y_1`"""

    @classmethod
    def room(cls, dims: Dims, slots: int, like: Tensor, *, all_of_it: bool = True) -> Kept:
        """Allocate memory for so many mini-batches; only the first two, if no backward follows."""
        width, hidden, _ = dims.widths

        def room(columns: int) -> Tensor:
            return like.new_empty((slots, dims.pairs, dims.size, columns))

        z0, z1 = room(hidden), room(width)
        return cls(z0, z1, room(hidden), room(hidden), room(width)) if all_of_it else cls(z0, z1, z0, z0, z1)


COUNTS = frozenset(
    {"n", "steps", "heads", "pairs", "slots", "from_bias", "to_bias", "begun_bias", "bias"}
    | {"scale_b", "last_n", "last_b", "norm_b", "norm_h"}
)
"""The kernels' arguments that are integers; the others are pointers."""
SHIPPED: tuple[tuple[int, int, bool, Precision], ...] = (
    (128, 16, True, "ieee"), (128, 16, True, "tf32"), (128, 16, True, "bf16"), (128, 1, True, "tf32"),
    (64, 16, True, "tf32"), (64, 64, False, "ieee"), (64, 64, False, "tf32"), (64, 64, False, "bf16"),
)  # fmt: skip
"""`F`, `C`, whether it is causal, and the precision of the forms: every value of each, not all products of them."""


def form(
    name: str, kernel: Any, sizes: Sizes, constants: dict[str, Any], spilled_bytes: int | dict[int, int] = 0
) -> Form:
    """A form of one of the kernels, which takes some of the constants."""
    every = {
        "F": sizes.width, "HIDDEN": sizes.hidden, "TILE": sizes.tile, "C": sizes.size,
        "ROWS": sizes.rows, "EPS": 1e-6, "LEAST": least_spread("fp32"), **constants,
    }  # fmt: skip
    taken = {key: value for key, value in every.items() if key in kernel.arg_names}
    signature = {key: "i32" if key in COUNTS else "*fp32" for key in kernel.arg_names if key not in taken}
    return Form(
        name, kernel, signature, taken, sizes.warps, spilled_bytes=spilled_bytes, aligned=frozenset(signature) - COUNTS
    )


def dense(x_BHNCF: Tensor) -> Tensor:
    """The tokens in the memory order of `room_for_tokens`, as the kernels read them; no copy if they lie so already."""
    return x_BHNCF.permute(0, 2, 3, 1, 4).contiguous()


class Steps:
    """A problem's tensors as the kernels take them, and its forward steps."""

    def __init__(self, problem: Problem) -> None:
        self.dims = dims = problem.dims
        self.sizes = Sizes.of(dims)
        self.q, self.k, self.target, self.rate = (dense(x) for x in problem[:4])
        shape = dims.batch, dims.heads, 1, dims.widths[0]
        self.gamma, self.beta = (x.expand(shape).contiguous() for x in (problem.gamma_H1F, problem.beta_H1F))
        self.scale = problem.scale_BC.contiguous()
        self.closes, self.opened, self.causal = problem.last_NB is not None, bool(problem.gradients), problem.causal
        last = self.scale if problem.last_NB is None else problem.last_NB
        self.last = last.expand(dims.steps, dims.batch).contiguous() if self.closes else last
        self.given = Place.of(problem.weights)
        self.before = Place.of(problem.gradients) if self.opened else self.given
        self.eps, self.precision = problem.eps, problem.precision

    @property
    def strides(self) -> dict[str, int]:
        """How far apart the rows of step sizes and of norms lie."""
        heads, width = self.dims.heads, self.sizes.width
        return {
            "scale_b": self.dims.size if len(self.scale) > 1 else 0,
            "last_n": self.dims.batch, "last_b": 1, "norm_b": heads * width, "norm_h": width,
        }  # fmt: skip

    @property
    def shapes(self) -> dict[str, Any]:
        """The constants of a kernel that are sizes."""
        sizes = self.sizes
        return {
            "F": sizes.width, "HIDDEN": sizes.hidden, "TILE": sizes.tile, "C": sizes.size, "ROWS": sizes.rows
        }  # fmt: skip

    @property
    def least(self) -> float:
        """`LEAST` of `is_constant`."""
        return least_spread("fp64" if self.q.dtype == torch.float64 else "fp32")

    def run(
        self, start: int, stop: int, opening: Callable[[int], Place], *, last_update: int,
        kept: Kept | None = None, answers: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Run the mini-batches from `start` to `stop`, whose places follow each other from `opening(start)` on.

        Args:
            start: the first mini-batch.
            stop: the one after the last.
            opening: where the weights that open a mini-batch lie; of `stop`: the weights after the last.
            last_update: the last mini-batch whose opening weights are written; those after it are there already, or
                nobody reads them.
            kept: receives what backward reads; its slots are as many as the mini-batches of a group, and groups begin
                at their multiples.
            answers: receives the answers, in the memory order of `room_for_tokens`; None with `kept`.
        """
        dims, sizes, q = self.dims, self.sizes, self.q
        key_parts, answer_parts = (q.new_empty((sizes.tiles, dims.pairs, dims.size, sizes.width)) for _ in range(2))
        tickets = torch.zeros(dims.pairs, dtype=torch.int32, device=q.device)
        slots = 2 if kept is None else len(kept.hidden)
        room = Kept.room(dims, slots, q, all_of_it=False) if kept is None else kept
        shown = q if answers is None else answers
        for n in range(start, stop + 1):
            finish = n > start
            source, target = opening(n - 1 if finish else n), opening(n)
            mlp_step[(dims.pairs, sizes.tiles)](
                q, self.k, self.target, self.rate, self.gamma, self.beta, self.scale, self.last,
                *source[:4], *target[:4], *self.before[:4], *room, key_parts, answer_parts, tickets, shown,
                n, dims.steps, dims.heads, dims.pairs, slots, source.bias, target.bias, **self.strides,
                **self.shapes, EPS=self.eps, PRECISION=self.precision, CAUSAL=self.causal, FINISH=finish,
                BEGIN=n < stop, UPDATE=finish and n <= last_update, CLOSES=self.closes, OPENED=self.opened,
                KEEP=kept is not None, num_warps=sizes.warps, num_stages=2,
            )  # fmt: skip
