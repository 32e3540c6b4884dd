"""What Moshi keeps in memory for a backward pass, for `ttt check`: measured, or counted; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ttt_moshi.contexts import layers_contexts
from ttt_moshi.model_config import PUBLISHED
from ttt_moshi.options import HEAD_ROWS, LONG_WINDOW, MoshiRun, attention_block, model_config_of, sizes


def memory_facts(config: MoshiRun, frames: int) -> dict[str, Any]:
    """Parameters, and the bytes that autograd keeps for one token of a window, if the model is a known one.

    Args:
        config: the run's.
        frames: of a window.
    """
    options, dtype, checkpointing = config.backbone, config.train.param_dtype, config.train.gradient_checkpointing
    if options.preset == "7b" and model_config_of(options) is not PUBLISHED:
        return {}
    dim, layers = (sizes(options)[name] for name in ("dim", "num_layers"))
    if options.preset == "7b":
        layer, head, head_checkpointing = {
            "float32": (368_648, 4_429_485, 472_365),
            "bfloat16": (254_047, 3_028_827, 349_529),
        }[dtype]
        size = {"float32": 4.0, "bfloat16": 2.0}[dtype]
        without_mask = layer - size * 188  # which was measured in windows of so many frames
        counts = {
            "parameters": 7_687_729_152,
            "attention_parameters": 2_147_483_648,
            "layer_parameters": 205_529_088,
        }
        outside = float(head_checkpointing if checkpointing else head)
    else:
        size = {"float32": 4.0, "bfloat16": 2.8}[dtype]  # norms and the softmax of the losses stay float32
        without_mask, outside = size * (21.25 * dim + 6), size * (3 * dim + (2_434 if checkpointing else 20_066))
        counts = {
            "parameters": layers * (10 * dim * dim + 2 * dim) + 2154 * dim + 736_768,
            "attention_parameters": layers * 4 * dim * dim,
            "layer_parameters": 10 * dim * dim + 2 * dim,
        }
    rows, contexts = config.train.batch_size, layers_contexts(config)
    mask = size * _mask_columns(contexts, frames, rows, all_at_once=not checkpointing)
    if frames > LONG_WINDOW:  # the logits of some frames exist at once
        hidden = size * 3 * dim
        outside = hidden + (outside - hidden) * min(1.0, HEAD_ROWS / (rows * frames))
    return {
        **counts,
        "layer_activation_bytes": round(without_mask + mask),
        "head_activation_bytes": round(outside),
    }


def _mask_columns(contexts: Sequence[int | None], frames: int, rows: int, *, all_at_once: bool) -> float:
    """Numbers of a layer's mask for each token: the mean if all layers' are kept at once, else the most."""
    each = [_columns(context, frames, rows) for context in contexts]
    return sum(each) / len(each) if all_at_once else max(each)


def _columns(context: int | None, frames: int, rows: int) -> float:
    """A short window has a mask of all frames by all frames for each row; a long one has that of a block for all."""
    if frames <= LONG_WINDOW or context is None:
        return frames
    block = attention_block(context)
    keys = block + context - 1
    return frames if keys >= frames else block * keys / (frames * rows)
