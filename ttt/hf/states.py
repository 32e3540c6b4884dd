"""TTT states that travel with a `transformers` cache, so that `generate` treats them as it treats keys and values.

A cache becomes an instance of a subclass of its own class, which keeps the state of each TTT layer beside keys and
values: reordered for beams, repeated, selected and reset with them. A state cannot be cut back, as a fast weight cannot
forget single tokens, so `crop` is refused if it would remove a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor
from transformers.cache_utils import Cache

from ttt.errors import UsageError
from ttt.state import TTTState


class Remembered(NamedTuple):
    """What one TTT layer remembers of the streams in a cache."""

    state: TTTState
    positions: int
    """How many positions of the cache it has read, masked ones included."""


class StatefulCache(Cache):
    """What a cache can do with TTT states beside it; `stateful` makes a cache one."""

    ttt_states: dict[int, Remembered]
    """By the layer's index in the cache."""

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

    def crop(self, max_length: int) -> None:
        """Keep the first tokens only; refused if that would remove one.

        Raises:
            UsageError: the layers have learned from the tokens that would be removed.
        """
        length = int(self.get_seq_length())
        kept = length + max_length if max_length < 0 else max_length
        if self.ttt_states and kept < length:
            raise UsageError(
                f"a cache of {length} tokens cannot be cut to {kept}: its TTT layers have learned from the others, and "
                f"fast weights cannot forget single tokens; generate without an assistant model and without prompt "
                f"lookup, or read the first {kept} tokens again into a new cache"
            )
        super().crop(max_length)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.ttt_states = {
            index: Remembered(_mapped(r.state, function), r.positions) for index, r in self.ttt_states.items()
        }


def _mapped(state: TTTState, function: Callable[[Tensor], Tensor]) -> TTTState:
    return TTTState.from_tensors({name: function(tensor) for name, tensor in state.tensors().items()})


_MADE: dict[type[Cache], type[Cache]] = {}


def stateful(cache: Cache) -> StatefulCache:
    """Make a cache one that holds TTT states, in place; it is returned."""
    if isinstance(cache, StatefulCache):
        return cache
    kind = type(cache)
    if kind not in _MADE:
        _MADE[kind] = type(f"{kind.__name__}WithTTT", (StatefulCache, kind), {"__module__": __name__})
    cache.__class__ = _MADE[kind]
    made = cast("StatefulCache", cache)
    made.ttt_states = {}
    return made


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a layer's arguments, whatever its name and place."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    return found[0] if found else None
