"""One forward pass of a decoder: which tokens count, and where the cache that its layers share stands."""

from __future__ import annotations

import inspect
import itertools
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ttt.errors import UsageError
from ttt.hf.masks import require_one_text, token_mask
from ttt.hf.states import cached_length, find_cache


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward pass must know."""

    owner: int
    """The decoder's `Passes.number`; states belong to it."""
    shape: tuple[int, int]
    """Rows B and tokens T of the pass."""
    mask: Tensor | None
    """Tokens that count, `[B,T]` bool; None if all do."""
    cache: Cache | None
    """What the decoder was given. If it was given one, each layer must be given the same."""
    past: int
    """Positions that it held before the pass; 0 if none was given."""


_NUMBERS: Iterator[int]


def _begin_elsewhere() -> None:
    """In each process, so that a cache that another process has saved is not taken for one of this process."""
    global _NUMBERS
    _NUMBERS = itertools.count(secrets.randbits(62))


_begin_elsewhere()
if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_begin_elsewhere)

_CURRENT: ContextVar[tuple[Pass, ...]] = ContextVar("ttt_hf_passes", default=())
"""The passes that are running, the innermost last: one stack for each thread."""


class Passes:
    """The forward passes of a decoder; its layers with TTT share this object.

    Args:
        forward: the decoder's own forward.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.number = next(_NUMBERS)
        self.layers = 0
        """How many layers share it."""
        self._names = tuple(inspect.signature(forward).parameters)[1:]

    @contextmanager
    def opened(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """A context in which the decoder's forward runs with these arguments."""
        token = _CURRENT.set((*_CURRENT.get(), self._read(args, kwargs)))
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def renew(self, *_: object) -> None:
        """Refuse the caches that were filled so far: other weights are being loaded. A hook of `load_state_dict`."""
        self.number = next(_NUMBERS)

    def required(self) -> Pass:
        """The current pass.

        Raises:
            UsageError: a layer is called outside of its decoder's forward pass, so that nothing says which tokens
                are padding.
        """
        for current in reversed(_CURRENT.get()):
            if current.owner == self.number:
                return current
        raise UsageError(
            "a decoder layer with TTT was called outside of its model's forward pass, as when activation checkpointing "
            f"is put around single layers; write model.{checkpointing_method('enable')}() instead"
        )

    @torch.compiler.disable  # it looks at values, and there is nothing to compile in it
    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            raise UsageError(
                "the decoder was given neither input_ids [batch, tokens] nor inputs_embeds [batch, tokens, width], so "
                "that TTT layers do not know its tokens"
            )
        shape = (tokens.shape[0], tokens.shape[1])
        cache = find_cache(args, kwargs)
        past = 0 if cache is None else cached_length(cache)
        mask = token_mask(given.get("attention_mask"), shape, past)
        require_one_text(given.get("position_ids"), shape, mask, given)
        return Pass(self.number, shape, mask, cache, past)


def checkpointing_method(verb: str) -> str:
    """What the installed version of `transformers` calls the method; `verb` is enable or disable."""
    new = f"activation_checkpointing_{verb}"
    return new if hasattr(PreTrainedModel, new) else f"gradient_checkpointing_{verb}"
