"""kyutai's streaming, made exact for pieces of several steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moshi.models import MimiModel
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention
from torch import nn

from ttt.errors import UsageError


@contextmanager
def exact_streaming(module: StreamingModule, batch_size: int, *, longest: int) -> Iterator[None]:
    """`module.streaming(batch_size)`, exact for pieces of up to `longest` steps of its transformer.

    kyutai's cache keeps the last `context` keys, and a piece is written to it before it is read. So a piece of n steps
    overwrites n − 1 keys that its first queries still attend to, once the stream is longer than the context. Here the
    cache has n − 1 places more. What a query attends to does not change: the mask lets it see only the last `context`
    keys.

    Raises:
        UsageError: the module is streaming already, or its attention has no context.
    """
    if module.is_streaming:
        raise UsageError("the model is streaming already; leave that `streaming` context first")
    if any(attention.context is None for attention in _attentions(module)):
        raise UsageError("the model's attention has no `context`, so that no memory is enough for streaming")
    with module.streaming(batch_size):
        for attention in _attentions(module):
            _widen(attention, longest)
        yield


@contextmanager
def codec_streaming(codec: Any, batch_size: int) -> Iterator[None]:
    """`codec.streaming(batch_size)`, exact for one frame after another: kyutai's Mimi, or the demo's codec.

    A frame of Mimi is two steps of its transformers, whose cache is then one place too short; see `exact_streaming`.

    Raises:
        UsageError: the codec is streaming already.
    """
    if isinstance(codec, MimiModel):
        with exact_streaming(codec, batch_size, longest=round(codec.encoder_frame_rate / codec.frame_rate)):
            yield
        return
    if codec.is_streaming:
        raise UsageError("the codec is streaming already; leave that `streaming` context first")
    with codec.streaming(batch_size):
        yield


def _attentions(module: nn.Module) -> Iterator[StreamingMultiheadAttention]:
    """The attentions that stream with a module: those of detached children, as the depformer, do not."""
    for child in module.children():
        if isinstance(child, StreamingModule) and child._streaming_detached:
            continue
        if isinstance(child, StreamingMultiheadAttention) and not child.cross_attention:
            yield child
        yield from _attentions(child)


def _widen(attention: StreamingMultiheadAttention, longest: int) -> None:
    state = attention._streaming_state
    assert state is not None
    assert state.kv_cache is not None
    _, batch_size, heads, _, width = state.kv_cache.cache.shape
    state.kv_cache = RingKVCache(
        batch_size,
        heads,
        width,
        attention.context + longest - 1,
        respect_exec_mask=state.kv_cache.respect_exec_mask,
        device=state.kv_cache.cache.device,
        dtype=state.kv_cache.cache.dtype,
    )
