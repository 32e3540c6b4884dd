"""What the MLP's two passes share on the host: sizes, where weights lie, and the order of the forward steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt.ops.constants import Precision
from ttt.ops.fused.layout import Dims, Problem
from ttt.ops.triton.forms import Form
from ttt.ops.triton.mlp_parts import least_spread
from ttt.ops.triton.mlp_step import mlp_step

TILES = (32, 16)
"""Widths of a hidden tile: the first if it divides the hidden width and registers suffice."""
BLOCK = 16
"""Tokens that a program walks together; a product takes no fewer."""
STAGES = 1
"""What a loop over blocks reads is not fetched ahead: a block reads what the one before has written."""
WIDTHS = (16, 32, 64, 128)
"""Widths of a head, F."""
MOST_TOKENS = 64
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
    def tiles(self) -> int:
        """Hidden tiles."""
        return self.hidden // self.tile

    @classmethod
    def of_shape(cls, width: int, hidden: int, size: int, *, causal: bool) -> Sizes:
        """The sizes of a shape that has a form."""
        wide, narrow = TILES
        # A causal mini-batch of several blocks carries sums of gradients beside the weights.
        fits = hidden % wide == 0 and not (causal and size > BLOCK)
        return cls(width, hidden, wide if fits else narrow, size)

    @classmethod
    def of(cls, dims: Dims, *, causal: bool) -> Sizes:
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
        if dims.size > MOST_TOKENS:
            raise ValueError(f"the Triton kernels run mini-batches of at most {MOST_TOKENS} tokens, not {dims.size}")
        return cls.of_shape(width, hidden, dims.size, causal=causal)

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
    errors: Tensor
    """`E_1 [slots,P,C,F]`"""
    output: Tensor
    """`Z_1`"""
    asked: Tensor
    """`y_0`"""
    pulled: Tensor
    """`D_0`"""
    d_answered: Tensor
    """`dy_1`"""
    shares: Tensor
    """What `dγ` has of the answers, `[slots,P,F]`."""

    @classmethod
    def room(cls, dims: Dims, slots: int, like: Tensor, *, all_of_it: bool = True) -> Kept:
        """Allocate memory for so many mini-batches; only the first two, if no backward follows."""
        width, hidden, _ = dims.widths

        def room(columns: int) -> Tensor:
            return like.new_empty((slots, dims.pairs, dims.size, columns))

        z0, e1 = room(hidden), room(width)
        if not all_of_it:
            return cls(z0, e1, e1, z0, z0, e1, e1)
        shares = like.new_empty((slots, dims.pairs, width))
        return cls(z0, e1, room(width), room(hidden), room(hidden), room(width), shares)


COUNTS = frozenset(
    {"n", "steps", "heads", "pairs", "slots", "from_bias", "to_bias", "w0_bias", "w1_bias"}
    | {"scale_b", "last_n", "last_b", "norm_b", "norm_h"}
)
"""The kernels' arguments that are integers; the others are pointers."""
PRECISIONS: tuple[Precision, ...] = ("ieee", "tf32", "bf16")
SHIPPED: tuple[tuple[int, int, bool, Precision], ...] = tuple(
    (width, size, causal, precision)
    for width in (128, 64)
    for size, causal in ((1, False), (16, True), (16, False), (64, True), (64, False))
    for precision in PRECISIONS
)
"""`F`, `C`, whether it is causal, and the precision of the forms; one token alone has one form for both."""


def form(
    name: str, kernel: Any, sizes: Sizes, constants: dict[str, Any], spilled_bytes: int | dict[int, int] = 0
) -> Form:
    """A form of one of the kernels, which takes some of the constants."""
    every = {
        "F": sizes.width, "HIDDEN": sizes.hidden, "TILE": sizes.tile, "C": sizes.size,
        "BLOCK": BLOCK, "EPS": 1e-6, "LEAST": least_spread("fp32"), **constants,
    }  # fmt: skip
    taken = {key: value for key, value in every.items() if key in kernel.arg_names}
    signature = {key: "i32" if key in COUNTS else "*fp32" for key in kernel.arg_names if key not in taken}
    return Form(
        name,
        kernel,
        signature,
        taken,
        sizes.warps,
        STAGES,
        spilled_bytes=spilled_bytes,
        aligned=frozenset(signature) - COUNTS,
    )


def dense(x_BHNCF: Tensor) -> Tensor:
    """The tokens in the memory order of `room_for_tokens`, as the kernels read them; no copy if they lie so already."""
    return x_BHNCF.permute(0, 2, 3, 1, 4).contiguous()


class Steps:
    """A problem's tensors as the kernels take them, and its forward steps."""

    def __init__(self, problem: Problem) -> None:
        self.dims = dims = problem.dims
        self.q, self.k, self.target, self.rate = (dense(x) for x in problem[:4])
        shape = dims.batch, dims.heads, 1, dims.widths[0]
        self.gamma, self.beta = (x.expand(shape).contiguous() for x in (problem.gamma_H1F, problem.beta_H1F))
        self.scale = problem.scale_BC.contiguous()
        self.closes, self.opened = problem.last_NB is not None, bool(problem.gradients)
        self.causal = problem.causal and dims.size > 1
        """Whether tokens answer with different weights; one token alone answers with those after it."""
        self.sizes = Sizes.of(dims, causal=self.causal)
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
            "F": sizes.width, "HIDDEN": sizes.hidden, "TILE": sizes.tile, "C": sizes.size, "BLOCK": BLOCK
        }  # fmt: skip

    @property
    def least(self) -> float:
        """`LEAST` of `is_constant`."""
        return least_spread("fp64" if self.q.dtype == torch.float64 else "fp32")

    def run(
        self, start: int, stop: int, opening: Callable[[int], Place], *, last_update: int,
        kept: Kept | None = None, d_answers: Tensor | None = None, answers: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Run the mini-batches from `start` to `stop`, whose places follow each other from `opening(start)` on.

        Args:
            start: the first mini-batch.
            stop: the one after the last.
            opening: where the weights that open a mini-batch lie; of `stop`: the weights after the last.
            last_update: the last mini-batch whose opening weights are written; those after it are there already, or
                nobody reads them.
            kept: receives what backward reads, each mini-batch in the slot of its number modulo the slots.
            d_answers: the gradient of the answers, as `dense` makes it; goes with `kept`.
            answers: receives the answers, in the memory order of `room_for_tokens`; None with `kept`.
        """
        dims, sizes, q = self.dims, self.sizes, self.q
        key_parts, answer_parts = (q.new_empty((sizes.tiles, dims.pairs, dims.size, sizes.width)) for _ in range(2))
        tickets = torch.zeros(dims.pairs, dtype=torch.int32, device=q.device)
        slots = 2 if kept is None else len(kept.hidden)
        room = Kept.room(dims, slots, q, all_of_it=False) if kept is None else kept
        shown, d_shown = q if answers is None else answers, q if d_answers is None else d_answers
        for n in range(start, stop + 1):
            finish = n > start
            source, target = opening(n - 1 if finish else n), opening(n)
            mlp_step[(dims.pairs, sizes.tiles)](
                q, self.k, self.target, self.rate, self.gamma, self.beta, self.scale, self.last, d_shown,
                *source[:4], *target[:4], *self.before[:4], *room, key_parts, answer_parts, tickets, shown,
                n, dims.steps, dims.heads, dims.pairs, slots, source.bias, target.bias, **self.strides,
                **self.shapes, EPS=self.eps, LEAST=self.least, PRECISION=self.precision, CAUSAL=self.causal,
                FINISH=finish, BEGIN=n < stop, UPDATE=finish and n <= last_update, CLOSES=self.closes,
                OPENED=self.opened, KEEP=kept is not None, num_warps=sizes.warps, num_stages=STAGES,
            )  # fmt: skip
