"""Which tokens of a forward pass count, from what a decoder is told about padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt.errors import UsageError

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Arguments by which `transformers` tells its kernels where packed texts begin."""
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""The kinds of layers whose masks say which tokens count."""


def token_mask(attention_mask: Any, shape: tuple[int, int], past: int) -> Tensor | None:
    """The pass's own tokens that count, bool `[B,T]`; None if all do.

    Args:
        attention_mask: what the decoder was given: `[B, past + T]`, true where a token is real; the `[B,1,T,K]` that
            `generate` makes for a static cache; or a dict of those.
        shape: B and T.
        past: positions that the cache held before.

    Raises:
        UsageError: it has another form, or says that several texts share a row.
    """
    chunked = False
    if isinstance(attention_mask, dict):  # by type of layer; a token of a chunk does not see the chunk before
        kind = next((kind for kind in _KINDS if kind in attention_mask), None)
        chunked = kind == "chunked_attention"
        attention_mask = attention_mask if kind is None else attention_mask[kind]
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        own = _own_columns(attention_mask, shape, past)
    elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        own = _attended_by_themselves(attention_mask, shape, past, chunked)
    else:
        raise UsageError(
            f"attention_mask is {_in_words(attention_mask)}: TTT layers need the two-dimensional one, [batch, tokens], "
            f"0 where a token is padding; give that, or none"
        )
    # One look at the device for each pass, as transformers itself takes: without padding the scan is simpler.
    return None if bool(own.all()) else own


def require_one_text(position_ids: Any, shape: tuple[int, int], mask: Tensor | None, others: dict[str, Any]) -> None:
    """Refuse several texts packed into one row: TTT would go on from one text to the next.

    Raises:
        UsageError: positions do not grow from one counted token of a row to the next.
    """
    packed = any(others.get(name) is not None for name in _PACKED)
    if not packed and isinstance(position_ids, Tensor) and position_ids.dim() == 2 and position_ids.shape[1] > 1:
        packed = not _grow(position_ids.expand(shape[0], -1), mask)
    if packed:
        raise UsageError(
            "several texts are packed into a row (position_ids start again within it): TTT would carry what it learned "
            "from one text into the next; give each text a row of its own, padded"
        )


def _own_columns(mask: Tensor, shape: tuple[int, int], past: int) -> Tensor:
    batch, length = shape
    if mask.shape[0] != batch or mask.shape[1] < past + length:
        held = f"the cache holds {past} tokens and this pass {length}" if past else f"this pass has {length} tokens"
        raise UsageError(
            f"attention_mask is {list(mask.shape)}, but {held}, in {batch} rows: it must have a column for each token, "
            f"those in the cache included"
        )
    return mask[:, past : past + length] != 0


def _attended_by_themselves(mask: Tensor, shape: tuple[int, int], past: int, chunked: bool) -> Tensor:
    """Tokens that attend to themselves: under a causal mask with padding, padding does not."""
    batch, length = shape
    allowed = _allowed(mask[:, 0]).expand(batch, -1, -1)
    if allowed.shape[1] != length or allowed.shape[2] < length:
        raise UsageError(f"attention_mask is {list(mask.shape)}, but this pass has {length} tokens")
    # A sliding cache that is full drops its first keys; the last are then the pass's own.
    start = past if allowed.shape[2] >= past + length else allowed.shape[2] - length
    own = allowed[:, :, start : start + length]
    counts = own.diagonal(dim1=1, dim2=2)
    before = own.diagonal(offset=-1, dim1=1, dim2=2)
    if length > 1 and not chunked and not bool((before | ~(counts[:, 1:] & counts[:, :-1])).all()):
        raise UsageError(
            "attention_mask keeps a token from the one before it, as if several texts were packed into a row: TTT "
            "would carry what it learned from one text into the next; give each text a row of its own"
        )
    return counts


def _allowed(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():  # added to the scores: the lowest number, or -inf, where attention may not look
        return mask > torch.finfo(mask.dtype).min / 2
    raise UsageError(
        f"attention_mask is {_in_words(mask)} of {mask.dtype}; with four dimensions it is bool or floating"
    )


def _grow(position_ids: Tensor, mask: Tensor | None) -> bool:
    if mask is None:
        return bool((position_ids.diff(dim=1) > 0).all())
    lowest = torch.iinfo(torch.int64).min
    highest = position_ids.long().masked_fill(~mask, lowest).cummax(dim=1).values  # of the counted tokens so far
    return bool(((position_ids[:, 1:] > highest[:, :-1]) | ~mask[:, 1:]).all())


def _in_words(value: Any) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
