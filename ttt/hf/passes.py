"""One forward pass of a decoder: which tokens count, and whether the layers must get a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ttt.errors import UsageError
from ttt.hf.states import find_cache


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward pass must know."""

    mask: Tensor | None
    """Tokens that count, `[B,T]` bool; None if all do."""
    cache: Cache | None
    """What the decoder was given. If it was given one, each layer must be given one too."""


class Passes:
    """The forward pass that a decoder is in; its layers with TTT share this object."""

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.layers = 0
        """How many layers share it."""

    @contextmanager
    def opened(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """A context in which a decoder's forward pass runs with these arguments."""
        before, self.current = self.current, _read_pass(forward, args, kwargs)
        try:
            yield
        finally:
            self.current = before

    def required(self) -> Pass:
        """The current pass.

        Raises:
            UsageError: a layer is called outside of its decoder's forward pass, so that nothing says which tokens
                are padding.
        """
        if self.current is None:
            raise UsageError(
                "a decoder layer with TTT was called outside of its model's forward pass, as when activation "
                "checkpointing is put around single layers; write model.gradient_checkpointing_enable() instead"
            )
        return self.current


def _read_pass(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
    bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    tokens = bound.get("input_ids")
    tokens = bound.get("inputs_embeds") if tokens is None else tokens
    mask = bound.get("attention_mask")
    length = None if tokens is None else tokens.shape[1]
    return Pass(_token_mask(mask, length), find_cache(args, kwargs))


def _token_mask(mask: Any, length: int | None) -> Tensor | None:
    """Which of the pass's own tokens count, from an attention mask `[B, past + T]`.

    Raises:
        UsageError: the mask has another form, which does not say which tokens are padding.
    """
    if mask is None or length is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        form = f"a {type(mask).__name__}" if not isinstance(mask, Tensor) else f"of shape {tuple(mask.shape)}"
        raise UsageError(
            f"attention_mask is {form}: TTT layers need the two-dimensional one, [batch, tokens], 0 where a token is "
            f"padding; give that, or none"
        )
    if mask.shape[1] < length:
        raise UsageError(f"attention_mask has {mask.shape[1]} columns, fewer than the {length} tokens of this pass")
    own = mask[:, mask.shape[1] - length :] != 0
    # One look at the device for each pass, as transformers itself takes: without padding the scan is simpler.
    return None if not torch.compiler.is_compiling() and bool(own.all()) else own
