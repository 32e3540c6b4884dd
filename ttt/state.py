"""What a TTT layer remembers between pieces of its streams, and what it is about to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.errors import EnvironmentProblem
from ttt.files import read_tensors, write_tensors
from ttt.ops.factors import Factors, no_factors, summed_gradients
from ttt.ops.minibatch import Stream, Weights


def weight_names(count: int) -> tuple[str, ...]:
    """Names of `count` fast weights in order: `W1, b1, W2, b2, …`."""
    return tuple(f"{letter}{layer}" for layer in range(1, count // 2 + 1) for letter in "Wb")


@dataclass(frozen=True, eq=False)
class TTTState:
    """Fast weights of B streams and their open mini-batches.

    States are not changed: a step returns a new one. Only `TTTLayer.step_` writes to the state that it is given, and
    `take_` to its own. For these there are streaming states, from `TTTLayer.streaming_state` or `streaming`: they keep
    their open mini-batches as factors. Everywhere else they serve as any other state.
    """

    weights: Weights
    """The weights that opened each stream's current mini-batch: `W1 [B,H,in,out]`, `b1 [B,H,1,out]`, `W2`, …"""
    gradients: Weights | None = None
    """Gradients summed over the tokens read of that mini-batch, in the shapes of the weights; None if every stream is
    at a boundary. If there are `factors`, those of the matrices lack the tokens that these hold."""
    count: Tensor | None = None
    """How many tokens have been read of it, `[B]` int64 in 0 … C−1; None if `gradients` is None."""
    skipped: Tensor | None = None
    """How many tokens each stream has skipped since it started because they were not finite, `[B]` int64; None if the
    layer does not look for them (`ttt.skip_nonfinite_tokens`)."""
    factors: Factors | None = None
    """The open mini-batches token by token, as `TTTLayer.step_` reads and writes them; only in a streaming state."""

    @classmethod
    def of(cls, stream: Stream, *, skipped: Tensor | None = None) -> TTTState:
        """The state that `ttt.ops` calls a `Stream`."""
        return cls(*stream, skipped)

    @property
    def stream(self) -> Stream:
        """This state as `ttt.ops` takes it, with all gradients summed."""
        return Stream(self.weights, self._summed(), self.count)

    @property
    def batch_size(self) -> int:
        """How many streams there are, B."""
        return self.weights[0].shape[0]

    def summed(self) -> TTTState:
        """The same state without factors: a copy of a streaming state's, which no step changes; else this one."""
        if self.factors is None:
            return self
        return self.from_tensors({name: tensor.clone() for name, tensor in self.tensors().items()})

    def opened(self) -> TTTState:
        """The same state with gradients and count written out: zero for a stream at a boundary."""
        if self.factors is not None:
            return self.summed()
        if self.gradients is not None and self.count is not None:
            return self
        return TTTState(self.weights, tuple(torch.zeros_like(w) for w in self.weights), self.no_tokens(), self.skipped)

    def no_tokens(self) -> Tensor:
        """A count of zero for each stream, `[B]` int64."""
        return torch.zeros(self.batch_size, dtype=torch.int64, device=self.weights[0].device)

    def counting(self) -> TTTState:
        """The same state with `skipped` written out: zero if it was None."""
        return self if self.skipped is not None else replace(self, skipped=self.no_tokens())

    def detach(self) -> TTTState:
        """The same state, detached from the autograd graph; a copy of a streaming state's."""
        return self.from_tensors({name: tensor.detach() for name, tensor in self.summed().tensors().items()})

    def to(self, device: torch.device | str) -> TTTState:
        """The same state on another device; a copy of a streaming state's also on its own."""
        return self.from_tensors({name: tensor.to(device) for name, tensor in self.summed().tensors().items()})

    def where(self, rows: Tensor, other: TTTState) -> TTTState:
        """This state for the streams for which `rows [B]` is true, `other` for the rest."""
        one, two = self, other
        if one.gradients is not None or two.gradients is not None:
            one, two = one.opened(), two.opened()
        if one.skipped is not None or two.skipped is not None:
            one, two = one.counting(), two.counting()
        mine, others = one.tensors(), two.tensors()
        return self.from_tensors(
            {
                name: torch.where(rows.view(-1, *[1] * (tensor.dim() - 1)), tensor, others[name])
                for name, tensor in mine.items()
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: `W1`, `b1`, …; `W1_grad`, …, `count` if mini-batches are open; `skipped` if counted.

        Gradients are summed: those of a streaming state, which holds factors, are new tensors at each call.
        """
        names, gradients = weight_names(len(self.weights)), self._summed()
        found = dict(zip(names, self.weights, strict=True))
        if gradients is not None and self.count is not None:
            found |= {f"{name}_grad": g for name, g in zip(names, gradients, strict=True)}
            found["count"] = self.count
        return found if self.skipped is None else found | {"skipped": self.skipped}

    def memory(self) -> dict[str, Tensor]:
        """The tensors that this state is written in, by name; a streaming state's keep their addresses for ever."""
        found = replace(self, factors=None).tensors()
        if self.factors is not None:
            for layer, (x, u) in enumerate(zip(self.factors.inputs, self.factors.taught, strict=True), 1):
                found |= {f"x{layer}": x, f"u{layer}": u}
            found["based"] = self.factors.based_B
        return found

    def written(self) -> list[Tensor]:
        """The tensors of `memory`, in no particular order."""
        found = [*self.weights, *(self.gradients or ())]
        if self.factors is not None:
            found += [*self.factors.inputs, *self.factors.taught, self.factors.based_B]
        return found + [x for x in (self.count, self.skipped) if x is not None]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TTTState:
        """The inverse of `tensors`.

        Raises:
            ValueError: a name is missing or unknown.
        """
        skipped = tensors.get("skipped")
        tensors = {name: tensor for name, tensor in tensors.items() if name != "skipped"}
        open_names = [name for name in tensors if name == "count" or name.endswith("_grad")]
        names = weight_names(len(tensors) // 2 if open_names else len(tensors))
        expected = {*names, *(f"{name}_grad" for name in names), "count"} if open_names else set(names)
        if not names or set(tensors) != expected:
            raise ValueError(f"these tensors are not a TTT state: {', '.join(sorted(tensors)) or 'none'}")
        weights = tuple(tensors[name] for name in names)
        if not open_names:
            return cls(weights, skipped=skipped)
        return cls(weights, tuple(tensors[f"{name}_grad"] for name in names), tensors["count"], skipped)

    def _summed(self) -> Weights | None:
        """The gradients with those of the factors."""
        if self.gradients is None or self.factors is None:
            return self.gradients
        return summed_gradients(self.gradients, self.factors)

    @torch.no_grad()
    def streaming(self, mini_batch_size: int) -> TTTState:
        """A copy for `TTTLayer.step_` to write to, every tensor in memory of its own.

        Args:
            mini_batch_size: C of the layer, whose update is causal if C is not 1.
        """
        weights = tuple(w.clone(memory_format=torch.contiguous_format) for w in self.weights)
        skipped = None if self.skipped is None else self.skipped.clone()
        if mini_batch_size == 1:
            return TTTState(weights, skipped=skipped)
        # New zeros, not copies of zeros: on the CPU they take no memory until they are written to.
        gradients = tuple(torch.zeros(w.shape, dtype=w.dtype, device=w.device) for w in weights)
        factors = no_factors(weights, mini_batch_size)
        own = TTTState(weights, gradients, self.no_tokens(), skipped, factors)
        if self.gradients is not None:
            own.take_(self)
        return own

    @torch.no_grad()
    def take_(self, other: TTTState, rows: Tensor | None = None) -> None:
        """Write the state of other streams into this streaming state, whose tensors keep their addresses.

        Args:
            other: as many streams of the same layer.
            rows: `[B]`, the streams to take; the rest stays as it is bit for bit. None means all.
        """
        rows = torch.ones(self.batch_size, dtype=torch.bool, device=self.weights[0].device) if rows is None else rows

        def take(mine: Tensor, theirs: Tensor) -> None:
            mine.copy_(torch.where(rows.view(-1, *[1] * (mine.dim() - 1)), theirs, mine))

        for mine, theirs in zip(self.weights, other.weights, strict=True):
            take(mine, theirs)
        if self.skipped is not None:
            take(self.skipped, other.no_tokens() if other.skipped is None else other.skipped)
        if self.gradients is None or self.count is None:
            return
        opened = other.opened()
        assert opened.gradients is not None
        assert opened.count is not None
        for mine, theirs in zip(self.gradients, opened.gradients, strict=True):
            take(mine, theirs)
        take(self.count, opened.count)
        if self.factors is not None:
            for mine in (*self.factors.inputs, *self.factors.taught):
                mine.masked_fill_(rows[:, None, None, None], 0)
            take(self.factors.based_B, opened.count > 0)

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file; the file appears whole or not at all.

        Raises:
            EnvironmentProblem: the disk is full, or the path cannot be written.
        """
        write_tensors(Path(path), self.tensors(), {"format": "ttt-state"})

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> TTTState:
        """Read what `save` wrote.

        Raises:
            EnvironmentProblem: the file is missing, cut short, or holds something else.
        """
        try:
            return cls.from_tensors(read_tensors(Path(path), device=device))
        except ValueError as error:
            raise EnvironmentProblem(f"{path}: not a saved TTT state ({error})") from None


class Reading(NamedTuple):
    """What a layer is about to read; see `TTTLayer.observers`."""

    x: Tensor
    """Tokens `[B,T,D]`."""
    state: TTTState | None
    """The streams' state before them; None if they start fresh. `step_` writes to it afterwards: copy what you keep."""
    rotary: tuple[Tensor, Tensor] | None
    """As in `TTTLayer.forward`."""
    rows: Tensor | None
    """Which streams read, `[B]`; None means all. `forward` has its mask instead."""
    mask: Tensor | None = None
    """Which tokens count, `[B,T]`; None means all. In `step_` these are the tokens of `rows`."""
