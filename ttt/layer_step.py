"""A layer's reading of one token of each stream: the same numbers as its `forward`'s, in as few operations as may be.

One token costs a layer four products of D² numbers, which the memory limits, and the inner learning of
`ttt.ops.decode`. Each further operation takes some microseconds however small it is, so that a hundred of them weigh as
much as the projections. So queries and keys are treated as one tensor here; what depends on the config alone is
computed once, and so are the views of the streams' memory. What depends on parameters is derived anew for each token,
for they may change between two, unless the layer is held for inference (`ttt.layer_held`).

No gradient flows here. Every function is called under `torch.no_grad()`, with autocast off.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.layer_held import Layer, Parts, parts_of
from ttt.layer_inputs import nonfinite
from ttt.layer_sharing import product
from ttt.layer_tokens import Rotary
from ttt.ops.decode import learn_token_
from ttt.ops.decode_rows import Memory, Token
from ttt.ops.minibatch import Stream
from ttt.ops.norm import normalize, normalize_target, rms_norm
from ttt.ops.rotary import rotary_angles
from ttt.state import TTTState


class _Known(NamedTuple):
    """A state that has been checked, and what it was then."""

    memory: Memory
    written: list[Tensor]
    places: list[object]
    tokens: tuple[torch.Size, torch.dtype, bool]


class KnownStates:
    """The states that a layer's `step_` has checked, so that it does not check them again for every token.

    Those of a state that is let go are forgotten. A state is checked again if one of its tensors is another one, lies
    elsewhere in memory, or has another shape or order there, or if one of the parameters that fast weights start from
    lies elsewhere: it may have come to share memory with the state.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[TTTState, _Known] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[KnownStates], tuple[()]]:
        """Copies and pickles know nothing."""
        return KnownStates, ()

    def memory(self, state: TTTState, x: Tensor, own: Sequence[Tensor]) -> Memory | None:
        """The state's memory; None if it has to be checked.

        Args:
            state: before the tokens.
            x: tokens `[B,T,D]`.
            own: the parameters that fast weights start from.
        """
        known = self._known.get(state)
        if known is None or known.tokens != (x.shape, x.dtype, x.is_cpu):
            return None
        same = known.places == _places(known.written, own) and all(map(operator.is_, known.written, state.written()))
        return known.memory if same else None

    def add(self, state: TTTState, x: Tensor, own: Sequence[Tensor]) -> Memory:
        """Keep that a state has been checked; arguments as in `memory`."""
        written = state.written()
        memory = Memory(Stream(state.weights, state.gradients, state.count), state.factors)
        self._known[state] = _Known(memory, written, _places(written, own), (x.shape, x.dtype, x.is_cpu))
        return memory


def _places(written: Sequence[Tensor], own: Sequence[Tensor]) -> list[object]:
    """Where tensors lie, and in which shape and order; of parameters, where they lie."""
    found: list[object] = [x.data_ptr() for x in (*own, *written)]
    found += [x.shape for x in written]
    found += [x.is_contiguous() for x in written]
    return found


def step(
    layer: Layer, x: Tensor, state: TTTState, memory: Memory, rows: Tensor | None, rotary: Rotary | None
) -> Tensor:
    """`TTTLayer.step_`, once its arguments have been checked.

    Args:
        layer: whose.
        x: tokens `[B,1,D]`.
        state: which is written to.
        memory: of the state.
        rows: which read, `[B]`; None means all.
        rotary: as in `TTTLayer.forward`.

    Returns:
        `y [B,1,D]` in the type of `x`.
    """
    count, on_cpu = state.count, x.is_cpu
    counts = count.tolist() if on_cpu and count is not None else None
    parts = None if layer.held is None else layer.held.parts(layer, x.dtype, memory.batch)
    # Of tensors that autograd can never see, each operation takes less time.
    alone = torch.inference_mode() if layer.sharing.alone else contextlib.nullcontext()
    with alone:
        kept_out = nonfinite(x) if layer.config.skip_nonfinite_tokens else None
        if state.skipped is not None and kept_out is not None:
            skipped = kept_out.flatten()
            state.skipped.add_(skipped if rows is None else skipped & rows)
        if parts is None:
            parts = parts_of(layer, torch.promote_types(x.dtype, torch.float32), memory.batch)
        token = token_of(layer, parts, x, kept_out, Turn(counts, count, rotary))
        z_R1F = learn_token_(token, memory, parts.inner, rows, counts, wait=on_cpu)
        z_BD, eps = z_R1F.view(memory.batch, -1), layer.post_norm.eps
        normed_BD = layer.sharing.layer_norm(z_BD, parts.post_gamma_D, parts.post_beta_D, eps=eps)
        if normed_BD.dtype != x.dtype:
            normed_BD = normed_BD.to(x.dtype)
    y_BD = layer.project("o_proj", normed_BD) if parts.answer is None else product(normed_BD, *parts.answer)
    y = y_BD.unsqueeze(1)
    return y if kept_out is None else torch.where(kept_out, 0, y)


class Turn(NamedTuple):
    """What the angles by which pairs turn depend on."""

    counts: Sequence[int] | None
    """How many tokens the streams have read of their open mini-batches; None if that is not known on the host."""
    count_B: Tensor | None
    """The same, `[B]`; None means none."""
    rotary: Rotary | None
    """As in `TTTLayer.forward`."""


def token_of(layer: Layer, parts: Parts, x: Tensor, kept_out: Tensor | None, turn: Turn) -> Token:
    """Key, query, target and rate of one token of each stream.

    Args:
        layer: whose.
        parts: of its parameters.
        x: tokens `[B,1,D]`.
        kept_out: those that are skipped, `[B,1,1]`; None if the layer does not look for them.
        turn: of its pairs.
    """
    config, width, dtype = layer.config, layer.head_width, parts.gamma_H1F.dtype
    if kept_out is not None:
        x = torch.where(kept_out, 0, x)
    x_BD = layer.sharing.entering(x).squeeze(1)
    wide_BD = x_BD if x_BD.dtype == dtype else x_BD.to(dtype)
    if config.input_norm == "rms":
        wide_BD = rms_norm(wide_BD, eps=config.ln_eps)
        x_BD = wide_BD.to(x.dtype)
    both_B2HF, v_BHF = _projected(layer, parts, x_BD, dtype)
    if config.normalize_qk:
        both_B2HF = normalize(both_B2HF)
    angle = _angle(layer, turn, dtype)
    if angle is not None:
        pairs = torch.view_as_complex(both_B2HF.view(x_BD.shape[0], 2, -1, width // 2, 2))
        both_B2HF = torch.view_as_real(pairs * angle).view(both_B2HF.shape)
    both_R2F = both_B2HF.transpose(1, 2).flatten(0, 1)
    target_R1F = v_BHF.reshape(-1, 1, width) - both_R2F.narrow(1, 0, 1)
    if config.normalize_target:
        heads = (x_BD.shape[0], -1, 1, width)
        target_BH1F = normalize_target(target_R1F.view(heads), parts.gamma_H1F, parts.beta_H1F, eps=config.target_eps)
        target_R1F = target_BH1F.view(-1, 1, width)
    rate_BH = F.linear(wide_BD, *parts.rates).sigmoid_().mul_(parts.base_rate)
    if kept_out is not None:
        rate_BH = torch.where(kept_out.squeeze(1), 0, rate_BH)
    return Token(both_R2F, target_R1F, rate_BH.view(-1, 1, 1))


def _projected(layer: Layer, parts: Parts, x_BD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and queries `[B,2,H,F]` and values `[B,H,F]`."""
    batch, width = x_BD.shape[0], layer.head_width
    if parts.read is None:
        k_BHF, q_BHF, v_BHF = (
            layer.project(name, x_BD).to(dtype).view(batch, -1, width) for name in ("k_proj", "q_proj", "v_proj")
        )
        return torch.stack((k_BHF, q_BHF), 1), v_BHF
    all_B3D = product(x_BD, *parts.read)
    if all_B3D.dtype != dtype:
        all_B3D = all_B3D.to(dtype)
    all_B3HF = all_B3D.view(batch, 3, -1, width)
    return all_B3HF.narrow(1, 0, 2), all_B3HF.select(1, 2)


def _angle(layer: Layer, turn: Turn, dtype: torch.dtype) -> Tensor | None:
    """`cos + i sin` of the angles by which pairs turn, broadcastable to `[B,2,H,F/2]`; None if they do not."""
    config = layer.config
    if config.rope == "none":
        return None
    if turn.rotary is not None:
        cos, sin = (layer.sharing.angles(angle).to(dtype) for angle in turn.rotary)
        angle = torch.complex(cos, sin)
        return angle if angle.dim() < 3 else angle.transpose(-2, -3)  # from `[…,H,1,F/2]`
    if turn.count_B is None:  # a mini-batch of one token has the position 0 alone
        return None
    if turn.counts is None:
        cos, sin = rotary_angles(turn.count_B, layer.head_width, theta=config.rope_theta, dtype=dtype)
        return torch.complex(cos, sin)[:, None, None]
    table = _table(config.mini_batch_size, layer.head_width, config.rope_theta, dtype)
    if min(turn.counts) == max(turn.counts):
        return table[turn.counts[0]]
    return torch.stack([table[count] for count in turn.counts])[:, None, None]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _table(size: int, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`cos + i sin` for each position in the mini-batch, `[F/2]`, on the CPU; not to be written to."""
    positions = torch.arange(size, device="cpu")
    return torch.complex(*rotary_angles(positions, width, theta=theta, dtype=dtype)).unbind()
