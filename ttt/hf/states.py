"""TTT states that travel with a `transformers` cache, so that `generate` treats them as it treats keys and values.

A cache becomes an instance of a subclass of its own class, which keeps the state of each TTT layer beside keys and
values: reordered for beams, repeated, selected, copied and reset with them. Fast weights cannot forget single tokens.
So that assisted decoding can take tokens back, the state before the last tokens is kept beside the tokens themselves,
from which the state without some of them is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ttt.adapter import TTTAdapter
from ttt.errors import UsageError
from ttt.state import TTTState

_KEPT = 256
"""How many of the last pass's tokens can be taken back. More than assistants propose; few beside a prompt."""


@dataclass(frozen=True)
class Last:
    """The last tokens that a TTT layer has read."""

    before: TTTState | None
    """The state before them; None if the streams started with them."""
    tokens: Tensor
    """What the layer was given, `[B,T,D]`."""
    mask: Tensor | None
    """Those of them that count, `[B,T]`; None if all do."""

    def without(self, count: int) -> Last:
        """The same without the last `count` tokens."""
        kept = self.tokens.shape[1] - count
        return Last(self.before, self.tokens[:, :kept], None if self.mask is None else self.mask[:, :kept])

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Last:
        """The same with the function applied to every tensor."""
        mask = None if self.mask is None else function(self.mask)
        return Last(_mapped(self.before, function), function(self.tokens), mask)


@dataclass(frozen=True)
class Remembered:
    """What one TTT layer remembers of the streams in a cache."""

    positions: int
    """How many positions of the cache it has read, masked ones included."""
    state: TTTState | None
    """The state after them; None if tokens were taken back, and it is to be made from `last`."""
    last: Last | None = None
    """What can be taken back; None if nothing can."""

    def without(self, count: int) -> Remembered:
        """The same before the last `count` positions, which `last` holds."""
        assert self.last is not None
        return Remembered(self.positions - count, None, self.last.without(count)) if count else self

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Remembered:
        """The same with the function applied to every tensor."""
        last = None if self.last is None else self.last.mapped(function)
        return replace(self, state=_mapped(self.state, function), last=last)

    def current_state(self, adapter: TTTAdapter) -> TTTState | None:
        """The state after all positions; None if there are none."""
        if self.state is not None or self.last is None:
            return self.state
        if not self.last.tokens.shape[1]:
            return self.last.before
        return adapter.adapt(self.last.tokens, self.last.before, mask=self.last.mask)[1]


def read_on(
    adapter: TTTAdapter, tokens: Tensor, mask: Tensor | None, state: TTTState | None, positions: int
) -> tuple[Tensor, Remembered]:
    """Adapt the tokens `[B,T,D]` that follow a state; returns the tokens, and what is remembered after them.

    Assisted decoding takes tokens back from a single row, without gradients; only then can they be.
    """
    positions += tokens.shape[1]
    if tokens.shape[0] > 1 or torch.is_grad_enabled():
        out, state = adapter.adapt(tokens, state, mask=mask)
        return out, Remembered(positions, state)
    head = max(0, tokens.shape[1] - _KEPT)
    outs = []
    if head:
        out, state = adapter.adapt(tokens[:, :head], state, mask=None if mask is None else mask[:, :head])
        outs.append(out)
    last = Last(state, tokens[:, head:].clone(), None if mask is None else mask[:, head:])
    out, state = adapter.adapt(tokens[:, head:], state, mask=last.mask)
    return (torch.cat([*outs, out], 1) if outs else out), Remembered(positions, state, last)


class StatefulCache(Cache):
    """What a cache can do with TTT states beside it; `stateful` makes a cache one."""

    ttt_states: dict[int, Remembered]
    """By the layer's index in the cache."""
    ttt_owner: int
    """Whose states they are: the number of the decoder's `Passes`."""

    @property
    def is_croppable(self) -> bool:
        """Whether tokens of the last pass can be taken back."""
        known = all(remembered.last is not None for remembered in self.ttt_states.values())
        return known and bool(getattr(super(), "is_croppable", True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the streams, as beam search asks for."""
        super().reorder_cache(beam_idx)
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each stream."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the streams."""
        super().batch_select_indices(indices)
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.ttt_states = {}

    def crop(self, tokens: int) -> None:
        """Take tokens back: `-tokens` of them if negative; else what this version of `transformers` means by it.

        Raises:
            UsageError: the TTT layers have read on since.
        """
        length = cached_length(self)
        if tokens < 0:
            self._without(min(-tokens, length))  # raises before anything is changed
        super().crop(tokens)
        self.ttt_states = self._without(length - cached_length(self))

    def _without(self, count: int) -> dict[int, Remembered]:
        if not count:
            return self.ttt_states
        for remembered in self.ttt_states.values():
            kept = 0 if remembered.last is None else remembered.last.tokens.shape[1]
            if count > kept:
                raise UsageError(
                    f"{count} tokens cannot be taken back from this cache: fast weights cannot forget single tokens, "
                    f"and its TTT layers keep {kept or 'none'} of them to learn again (up to {_KEPT} of the last "
                    f"forward pass, for one row without gradients); generate without an assistant that has TTT itself, "
                    f"or read the tokens that remain into a new cache"
                )
        return {index: remembered.without(count) for index, remembered in self.ttt_states.items()}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.ttt_states = {index: remembered.mapped(function) for index, remembered in self.ttt_states.items()}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that a pickle cannot name it.
        return _restored, (type(self).__mro__[2],), vars(self)


def _restored(kind: type[Cache]) -> Cache:
    return object.__new__(_stateful_class(kind))


def _mapped(state: TTTState | None, function: Callable[[Tensor], Tensor]) -> TTTState | None:
    if state is None:
        return None
    return TTTState.from_tensors({name: function(tensor) for name, tensor in state.tensors().items()})


_MADE: dict[type[Cache], type[Cache]] = {}


def _stateful_class(kind: type[Cache]) -> type[Cache]:
    if kind not in _MADE:
        _MADE[kind] = type(f"{kind.__name__}WithTTT", (StatefulCache, kind), {"__module__": __name__})
    return _MADE[kind]


def stateful(cache: Cache, owner: int) -> StatefulCache:
    """Make a cache one that holds TTT states, in place; it is returned.

    Raises:
        UsageError: it holds the states of another model, or of what this one was before other weights were loaded.
    """
    if not isinstance(cache, StatefulCache):
        cache.__class__ = _stateful_class(type(cache))
        cast("StatefulCache", cache).ttt_states = {}
    made = cast("StatefulCache", cache)
    if made.ttt_states and made.ttt_owner != owner:
        raise UsageError(
            "the cache holds TTT states of another model or process, of layers since taken out, or of weights that "
            "others were loaded over; start from a new cache"
        )
    made.ttt_owner = owner
    return made


def cached_length(cache: Cache) -> int:
    """How many positions a cache holds."""
    return int(cache.get_seq_length())


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a call's arguments, whatever its name and place."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    return found[0] if found else None
