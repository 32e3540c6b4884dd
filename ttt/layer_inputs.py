"""What a TTT layer can be made for and read: widths and heads, tokens with their mask and angles, states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt.config import TTTConfig
from ttt.state import TTTState


def check_head_width(dim: int, num_heads: int, config: TTTConfig) -> None:
    """Refuse a head count that does not divide the width, and odd heads that need rotary pairs.

    Raises:
        ValueError: naming the number that does not fit.
    """
    if dim % num_heads:
        raise ValueError(f"width {dim} does not divide into {num_heads} heads; write a ttt.num_heads that divides it")
    if config.rope != "none" and (dim // num_heads) % 2:
        raise ValueError(
            f"heads of odd width {dim // num_heads} have no pairs for rotary embedding; write ttt.rope: none or "
            f"another ttt.num_heads"
        )


def check_tokens(
    x: Tensor, dim: int, config: TTTConfig, *, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None
) -> None:
    """Refuse tokens, rotary angles and a mask that a layer of width D with this config cannot read.

    Raises:
        ValueError: saying what does not fit.
    """
    if x.dim() != 3 or x.shape[-1] != dim or x.shape[1] == 0:
        raise ValueError(f"a TTT layer of width {dim} reads [B, T, {dim}] with T ≥ 1, not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"a TTT layer reads floating point, not {x.dtype}")
    if (rotary is not None) != (config.rope == "backbone"):
        raise ValueError(
            "rope: backbone needs the backbone's rotary angles; none were given"
            if rotary is None
            else f"rotary angles were given, but the config says rope: {config.rope}"
        )
    _require_mask(mask, x)


def check_state(state: TTTState, x: Tensor, own: Sequence[torch.Size], *, mini_batch_size: int) -> None:
    """Refuse a state that is not of these tokens' streams, or of a layer with other fast weights or mini-batches.

    Args:
        state: before the tokens.
        x: tokens `[B,T,D]`.
        own: shapes of the layer's fast weights.
        mini_batch_size: `C`.

    Raises:
        ValueError: saying what does not fit.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = state.weights
    if state.batch_size != x.shape[0]:
        raise ValueError(f"the state is of {state.batch_size} streams, the tokens of {x.shape[0]}")
    if weights[0].dtype != dtype:
        raise ValueError(f"the state is {weights[0].dtype}; tokens of {x.dtype} need {dtype}")
    given = [w.shape[1:] for w in weights]
    if given != own:
        shapes, expected = [tuple(shape) for shape in given], [tuple(shape) for shape in own]
        raise ValueError(f"the state is of another layer: its fast weights are {shapes}, here they are {expected}")
    check_counts(state, mini_batch_size)


def check_counts(state: TTTState, mini_batch_size: int) -> None:
    """Refuse a state whose open mini-batches have as many tokens as a whole one has, or more.

    Raises:
        ValueError: saying how many. It is not looked for where the count is not on the CPU.
    """
    counts = [0] if state.count is None or not state.count.is_cpu else state.count.tolist()
    if max(counts) >= mini_batch_size:
        raise ValueError(
            f"the state is of another layer: a stream has read {max(counts)} tokens of its open "
            f"mini-batch, here they are of {mini_batch_size}"
        )


def check_step(state: TTTState, x: Tensor, config: TTTConfig, parameters: Sequence[Tensor]) -> None:
    """Refuse more than a token of each stream, and a state that cannot be written to in place.

    Args:
        state: before the tokens; `check_state` has passed it.
        x: tokens `[B,T,D]`.
        config: the layer's.
        parameters: what this process holds of those from which its fast weights start, in the order of
            `state.weights`.

    Raises:
        ValueError: saying what does not fit.
    """
    if x.shape[1] != 1:
        raise ValueError(f"step_ reads one token of each stream, not {x.shape[1]}; forward reads more")
    if not config.causal and config.mini_batch_size > 1:
        raise ValueError("a layer that is not causal learns from whole mini-batches; it has no step_")
    if state.gradients is None and config.mini_batch_size > 1:
        raise ValueError("the state has no open mini-batch to write to; take one from streaming_state")
    if state.skipped is None and config.skip_nonfinite_tokens:
        raise ValueError("the state has no count of skipped tokens to write to; take one from streaming_state")
    own = all(
        parameter.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
        for parameter, weight in zip(parameters, state.weights, strict=True)
    )
    if not own or not all(tensor.is_contiguous() for tensor in state.written()):
        raise ValueError("the state shares its memory; take one from streaming_state, which step_ may write to")


def nonfinite(x: Tensor) -> Tensor:
    """Which tokens of `[B,T,D]` hold a NaN or an infinity, `[B,T,1]`."""
    return ~x.isfinite().all(dim=-1, keepdim=True)


def _require_mask(mask: Tensor | None, x: Tensor) -> None:
    """Refuse what would be broadcast, or counted as numbers, or moved between devices."""
    if mask is None:
        return
    wanted = f"the mask of {list(x.shape[:2])} tokens is bool {list(x.shape[:2])}, true for those that count"
    if not isinstance(mask, Tensor):
        raise ValueError(f"{wanted}; it is not a {type(mask).__name__}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{wanted}; this one is {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{wanted}; this one is {mask.dtype}: write mask.bool()")
    if mask.device != x.device:
        raise ValueError(f"{wanted}; this one is on {mask.device}, the tokens are on {x.device}")
