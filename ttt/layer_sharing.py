"""How the tokens and heads of a TTT layer are shared out among processes: not at all, unless by `ttt.parallel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt.ops.norm import outer_layer_norm
from ttt.ops.rows import Tokens


def held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard of a `DTensor`; differentiable."""
    to_local: Any = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()


_PIECE = 128
"""Outputs that are multiplied at a time where `product` goes in pieces.

MKL does not share a product of one row among cores, and takes a slow path for a few rows; of many products at once it
does the first and not the second. In pieces they take 0.25 to 0.95 of the time, measured on an AMD processor with 1 and
2 threads, at widths 512 to 4,096.
"""
_LARGE = 1 << 18
"""Numbers in the least weight that goes in pieces; smaller ones are in the caches, where that gains nothing."""
_MOST_ROWS = 32
"""As many as were measured."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + b`, `[…,in]` to `[…,out]`, all of one type."""
    if x.dim() != 2 or not x.is_cpu or not _goes_in_pieces(x, weight):
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    pieces = weight.view(-1, _PIECE, weight.shape[1]).mT
    y = torch.bmm(x.expand(len(pieces), *x.shape), pieces)
    y = y.view(1, -1) if rows == 1 else y.transpose(0, 1).reshape(rows, -1)
    return y if bias is None else y + bias


def _goes_in_pieces(x: Tensor, weight: Tensor) -> bool:
    rows, out = x.shape[0], weight.shape[0]
    if weight.numel() < _LARGE or out % _PIECE or x.dtype != torch.float32 or not weight.is_contiguous():
        return False
    threads = torch.get_num_threads()
    if rows == 1:
        gains = threads > 1
    else:
        gains = rows <= _MOST_ROWS and out // _PIECE >= threads  # MKL shares a product of several rows itself
    return gains and torch.backends.mkl.is_available()


class Projection(nn.Linear):
    """A linear layer that computes in the type of its input, with what this process holds of its weight.

    Where the types differ, each call casts the weight. In training it has to: the weight changes with every step, and a
    copy would have to be made once a forward pass all the same, and kept or made again in a recomputation. A model that
    only reads holds the weight in the type of its tokens instead; see `TTTLayer.hold_for_inference`.
    """

    only: torch.dtype | None = None
    """The type of the tokens that it reads, if the weight was rounded to that; None if it reads any."""

    @torch.no_grad()
    def hold(self, dtype: torch.dtype) -> None:
        """Hold weight and bias in a type, for good; if that rounds them, they are not trained any more."""
        for name, parameter in list(self.named_parameters()):
            if parameter.dtype != dtype:
                self.register_parameter(name, nn.Parameter(parameter.to(dtype), requires_grad=False))
                self.only = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map `[…,in]` to `[…,out]`.

        Raises:
            ValueError: the weight is held in the type of other tokens.
        """
        if self.only is not None and x.dtype != self.only:
            raise ValueError(
                f"for inference this layer holds its projections in {self.only}, and reads no tokens of {x.dtype}"
            )
        bias = None if self.bias is None else held(self.bias).to(x.dtype)
        return product(x, held(self.weight).to(x.dtype), bias)


class Sharing:
    """All tokens and all heads are in this process: every method returns what it is given.

    A group of processes that shares a layer gives it another one, whose methods communicate. Every process of the
    group then calls the layer, with the same arguments but for its own tokens, and in the same order.
    """

    @property
    def alone(self) -> bool:
        """Whether nothing is shared out."""
        return type(self) is Sharing  # not `is WHOLE`: a deep copy of a layer has a copy of that

    def reading(self, x: Tensor) -> None:
        """Look at what is about to be read, `[B,T',D]`, before anything else."""

    def tokens(self, count: int) -> int:
        """How many tokens the streams have in all, if this process has `count` of each."""
        return count

    def all_tokens(self, x: Tensor) -> Tensor:
        """Values of this process's tokens, `[B,T']`, as values of all tokens in reading order, `[B,T]`."""
        return x

    def own_tokens(self, x: Tensor) -> Tensor:
        """Of values of all tokens in reading order, `[…,T]`, those of this process's tokens, `[…,T']`."""
        return x

    def entering(self, x: Tensor) -> Tensor:
        """Tokens, or anything else that every process has, before the heads of each process read it."""
        return x

    def angles(self, x: Tensor) -> Tensor:
        """Rotary angles `[…,T',F/2]` of the heads that this process projects."""
        return x

    def heads(self, x: Tensor) -> Tensor:
        """Of values of heads, `[H,…]`, those of the heads that this process scans."""
        return held(x)

    def to_heads(self, tokens: Tokens) -> Tokens:
        """What is scanned, from this process's tokens to its heads."""
        return tokens

    def to_tokens(self, z_BHTF: Tensor) -> Tensor:
        """The answers, from this process's heads to its tokens."""
        return z_BHTF

    def layer_norm(self, z: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
        """The norm over all heads' answers, `[B,T,D]`."""
        return outer_layer_norm(z, gamma, beta, eps=eps)

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        """A sum over this process's tokens as a sum over all; has no gradient."""
        return x

    def sum_over_heads(self, x: Tensor) -> Tensor:
        """A sum over this process's heads as a sum over all; has no gradient."""
        return x

    def mean_over_heads(self, x: Tensor) -> Tensor:
        """A mean over this process's heads as a mean over all; has no gradient."""
        return x

    def require_step(self) -> None:
        """Refuse to read one token of each stream, if the tokens are shared out.

        Raises:
            ValueError: they are.
        """


WHOLE = Sharing()
"""Of a layer that one process has alone."""
