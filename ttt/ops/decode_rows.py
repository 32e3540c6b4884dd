"""Tokens, norms and streams as `ttt.ops.decode` takes them: rows × heads as one dimension R.

Shape letters: those of `ttt.ops.decode`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.factors import Factors
from ttt.ops.minibatch import Inner, Stream, Weights
from ttt.ops.rows import Tokens


class Token(NamedTuple):
    """One token of each stream, its heads as rows."""

    both_R2F: Tensor
    """Key, then query."""
    target_R1F: Tensor
    rate_R11: Tensor

    @classmethod
    def of(cls, tokens: Tokens) -> Token:
        """Of `[B,H,1,F]` and rates `[B,H,1,1]`."""
        both_R2F = torch.cat((tokens.k, tokens.q), 2).flatten(0, 1)
        return cls(both_R2F, tokens.target.flatten(0, 1), tokens.rate.flatten(0, 1))

    def tokens(self, batch: int) -> Tokens:
        """The inverse of `of`; B streams."""
        width = self.both_R2F.shape[-1]
        k_BH1F, q_BH1F = self.both_R2F.view(batch, -1, 2, width).split(1, 2)
        return Tokens(q_BH1F, k_BH1F, self.target_R1F.view_as(k_BH1F), self.rate_R11.view(batch, -1, 1, 1))


class InnerRows:
    """`Inner` as a token takes it: γ and β by stream and head, and what follows from them, once it is asked for.

    Triton's kernels ask for none of it.

    Args:
        inner: norms, step sizes, kind of update.
        batch: streams, B.
    """

    def __init__(self, inner: Inner, batch: int) -> None:
        self.inner, self._batch = inner, batch

    @functools.cached_property
    def gamma(self) -> Tensor:
        """`γ [R,1,F]`."""
        return self._rows(self.inner.gamma_H1F)

    @functools.cached_property
    def beta(self) -> Tensor:
        """`β [R,1,F]`."""
        return self._rows(self.inner.beta_H1F)

    @functools.cached_property
    def square(self) -> Tensor:
        """`γ² [R,1,F]`."""
        return self._rows(self.inner.gamma_H1F * self.inner.gamma_H1F)

    @functools.cached_property
    def product(self) -> Tensor:
        """`γ β [R,1,F]`."""
        return self._rows(self.inner.gamma_H1F * self.inner.beta_H1F)

    @functools.cached_property
    def steps(self) -> list[float]:
        """`scale_C` on the host, for which another device would have to be waited for."""
        return self.inner.scale_C.tolist()

    def _rows(self, x_H1F: Tensor) -> Tensor:
        return x_H1F if self._batch == 1 else x_H1F.repeat(self._batch, 1, 1)


class Slot(NamedTuple):
    """One place of the open mini-batches in their factors, layer by layer, for rows that all stand there."""

    inputs: list[Tensor]
    """Where the token's `x` goes, `[R,1,in]`."""
    taught: list[Tensor]
    """Where its `u` goes, `[R,1,out]`."""
    filled: list[tuple[Tensor, Tensor]]
    """`Xᵀ [R,in,k]` and `U [R,k,out]` of the k tokens up to it."""


class Memory:
    """The tensors of B streams as `ttt.ops.decode` reads and writes them: rows × heads as one dimension R.

    All are views. Each takes some microseconds to make, and a token needs some thirty of them, so whoever reads token
    after token of the same streams keeps this. It is theirs for as long as each of their tensors keeps its memory.

    Args:
        stream: every tensor contiguous, with memory of its own.
        factors: of the open mini-batches; None if `stream.gradients` holds all.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, stream: Stream, factors: Factors | None) -> None:
        self.stream, self.factors = stream, factors
        self.batch, self.heads = stream.weights[0].shape[:2]
        self.weights = _flat(stream.weights)
        """`W [R,in,out]` and `b [R,1,out]` in turn."""
        self.sums = _flat(stream.gradients or ())
        """Their gradients; none if mini-batches have one token."""
        self.inputs = [] if factors is None else _flat(factors.inputs)
        """`[R,K,in]` of each layer."""
        self.taught = [] if factors is None else _flat(factors.taught)
        """`[R,K,out]` of each layer."""
        self.slots = 1 if factors is None else factors.slots
        self._slot: dict[int, Slot] = {}

    def slot(self, place: int) -> Slot:
        """A slot by its number."""
        found = self._slot.get(place)
        if found is None:
            found = self._slot[place] = self._views(place)
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def _views(self, place: int) -> Slot:
        def at(slots: list[Tensor]) -> list[Tensor]:
            return [x.narrow(1, place, 1) for x in slots]

        pairs = zip(self.inputs, self.taught, strict=True)
        filled = [(x.narrow(1, 0, place + 1).mT, u.narrow(1, 0, place + 1)) for x, u in pairs]
        return Slot(at(self.inputs), at(self.taught), filled)


def _flat(tensors: Weights) -> list[Tensor]:
    return [x.view(-1, *x.shape[2:]) for x in tensors]
