"""Attention that sees only a window of the past and the first tokens, in a model of `transformers`.

Only masks change: positions stay those of the text, and a cache still holds every token. The limit goes through the
public registries of `transformers` (`AttentionInterface`, `AttentionMaskInterface`), so that every mask the model makes
has it: under training, in `generate`, for static caches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ttt.errors import UsageError

_LIMITABLE = ("sdpa", "eager", "flex_attention")
_PREFIX = "ttt_limited_"


class AttentionLimit:
    """A limit on what a model's attention sees; `undo`, or the end of a `with`, takes it off."""

    def __init__(self, model: nn.Module, before: str | None) -> None:
        self.model = model
        self._before = before

    def undo(self) -> None:
        """Let the model's attention see what it saw before. A second call does nothing."""
        before, self._before = self._before, None
        if before is not None:
            _set_implementation(self.model, before)

    def __enter__(self) -> AttentionLimit:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def limit_attention(model: nn.Module, *, window: int | None, sinks: int = 0) -> AttentionLimit:
    """Let each token attend to the last `window` tokens, itself included, and to the first `sinks` of its row.

    Padding counts for neither, so that a padded batch equals its single sequences. If layers have a sliding window of
    their own, both limits apply: they see the smaller window, and a sink only inside their own. A mask `[B,1,T,T]` that
    a caller gives the model is taken as it is.

    Args:
        model: a causal language model of `transformers`, changed in place.
        window: tokens, from 1; None leaves the model as it is.
        sinks: tokens, from 0.

    Raises:
        UsageError: a number is out of range; the model is limited already; or its attention cannot be limited.
    """
    if window is None:
        if sinks:
            raise UsageError(f"attention sinks: {sinks} without a window; give a window too")
        return AttentionLimit(model, None)
    for name, value, least in (("window", window, 1), ("sinks", sinks, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"attention {name}: {value!r} is not a whole number from {least}")
    before = _implementation(model)
    _set_implementation(model, _registered(before, window, sinks))
    return AttentionLimit(model, before)


def attention_limit(model: nn.Module) -> tuple[int | None, int]:
    """The window and the sinks to which a model's attention is limited; None and 0 if it is not."""
    name = str(getattr(_text_config(model), "_attn_implementation", ""))
    if not name.startswith(_PREFIX):
        return None, 0
    window, sinks = name.split("_")[-2:]
    return int(window), int(sinks)


def describe_limit(model: nn.Module) -> list[str]:
    """The limit in a sentence; none if there is none."""
    window, sinks = attention_limit(model)
    if window is None:
        return []
    beside = f", and the first {sinks:,} of its text" * bool(sinks)
    return [f"attention sees the newest {window:,} token{'s' * (window != 1)} at most{beside}"]


def _implementation(model: nn.Module) -> str:
    name = getattr(_text_config(model), "_attn_implementation", None)
    if isinstance(name, str) and name.startswith(_PREFIX):
        raise UsageError("the model's attention is limited already; undo that first")
    if name not in _LIMITABLE:
        raise UsageError(
            f"{type(model).__name__} has the attention implementation {name!r}, and a window and sinks need one of "
            f"{', '.join(_LIMITABLE)}; load it with attn_implementation='sdpa'"
        )
    return str(name)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _set_implementation(model: nn.Module, name: str) -> None:
    setter = getattr(model, "set_attn_implementation", None)
    if setter is not None:
        setter(name)
    if getattr(_text_config(model), "_attn_implementation", None) != name:
        raise UsageError(
            f"the attention of {type(model).__name__} cannot be limited: it does not look its implementation up in the "
            f"AttentionInterface of transformers"
        )


def _registered(base: str, window: int, sinks: int) -> str:
    """Register the limited form of an implementation; returns its name."""
    name = f"{_PREFIX}{base}_{window}_{sinks}"
    AttentionInterface.register(name, _LimitedAttention(base, window))
    AttentionMaskInterface.register(name, _LimitedMask(base, window, sinks))
    return name


@dataclass(frozen=True)
class _LimitedAttention:
    """A model's own attention under a limit: the masks have it, so this only sees that there is one."""

    base: str
    window: int

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kw: Any
    ) -> Any:
        if attention_mask is None and key.shape[-2] > self.window:
            raise UsageError(
                f"the attention of {type(module).__name__} cannot be limited to {self.window} tokens: it was given "
                f"{key.shape[-2]} without a mask"
            )
        attend = _own_attention(type(module), self.base)
        return attend(module, query, key, value, attention_mask, *args, **kw)


def _own_attention(kind: type[nn.Module], base: str) -> Callable[..., Any]:
    """What a class of attention modules would call, had it the implementation `base`."""
    for ancestor in kind.__mro__:
        names = vars(sys.modules[ancestor.__module__])
        if "eager_attention_forward" in names:
            functions = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
            return functions.get(base, names["eager_attention_forward"])
    if base == "eager":
        raise UsageError(
            f"the eager attention of {kind.__name__} is not understood, so that it cannot be limited; load the model "
            f"with attn_implementation='sdpa'"
        )
    return ALL_ATTENTION_FUNCTIONS[base]


@dataclass(frozen=True)
class _LimitedMask:
    """Makes the masks of an implementation, with the limit on top."""

    base: str
    window: int
    sinks: int

    def __call__(
        self,
        *args: Any,
        mask_function: Callable[..., Tensor],
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is None and self.sinks:
            _require_one_text(mask_function, kwargs)
        count = None if attention_mask is None else _counted(attention_mask, kwargs)
        make = AttentionMaskInterface()[self.base]
        return make(
            *args,
            mask_function=self._limited(mask_function, count),
            attention_mask=attention_mask,
            # With this, sdpa leaves the mask out only if no more keys than the window are there.
            local_size=self.window if local_size is None else min(local_size, self.window),
            **kwargs,
        )

    def _limited(self, allowed: Callable[..., Tensor], count: Tensor | None) -> Callable[..., Tensor]:
        """`allowed(batch, head, query, key)`, limited; `count [B,T]` is how many tokens count up to each."""

        def limited(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
            if count is None:
                query_number, key_number = query, key
            else:
                query_number, key_number = count[batch, query] - 1, count[batch, key] - 1
            seen = (key_number > query_number - self.window) | (key_number < self.sinks)
            return allowed(batch, head, query, key) & seen

        return limited


def _counted(attention_mask: Tensor, sizes: dict[str, Any]) -> Tensor:
    """How many tokens count up to each, `[B,T]`, over all keys and queries; those not yet written count for none."""
    count = attention_mask.cumsum(-1)
    missing = sizes["kv_length"] + sizes.get("kv_offset", 0) - count.shape[-1]
    return count if missing <= 0 else torch.cat([count, count[:, -1:].expand(-1, missing)], -1)


def _require_one_text(mask_function: Callable[..., Tensor], sizes: dict[str, Any]) -> None:
    """Refuse rows in which several texts are packed: the first tokens of the row are those of the first text alone.

    Raises:
        UsageError: a token may not attend to the one before it.
    """
    # Older versions give the queries' positions instead of how many there are.
    length = sizes["q_length"] if "q_length" in sizes else len(sizes["cache_position"])
    if sizes.get("allow_is_causal_skip", True) or sizes.get("use_vmap") or length != sizes["kv_length"] or length < 2:
        return
    device = sizes["device"] if "device" in sizes else sizes["cache_position"].device
    at = torch.arange(1, length, device=device)
    batch = torch.arange(sizes["batch_size"], device=device)
    if not bool(mask_function(batch[:, None], torch.zeros_like(at), at, at - 1).all()):
        raise UsageError(
            "position_ids start again within a row, as if several texts were packed into it; attention sinks would be "
            "those of the first text alone: give each text a row of its own"
        )
