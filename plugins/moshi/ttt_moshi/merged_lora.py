"""A LoRA by moshi-finetune, merged into Moshi's weights: `W + scaling · B A`, as kyutai's `replace_lora_with_linear`.

Its `lora.safetensors` has `….lora_A.weight [rank, in]` and `….lora_B.weight [out, rank]` for linears of the model. If
it was trained with `ft_embed`, it also has whole embeddings, which take the place of the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from ttt.errors import EnvironmentProblem
from ttt.files import read_header, read_tensors
from ttt.words import first_few
from ttt_moshi.weight_kinds import kind_of_weights

_DOWN, _UP, _FROZEN = ".lora_A.weight", ".lora_B.weight", ".frozen_W.weight"
_KEY = "backbone.lora_path"
_FIX = "write the path of a lora.safetensors by moshi-finetune, trained on this very model"


class _Factors(NamedTuple):
    """The low rank factors of what is added to a weight `[out, in]`."""

    down: Tensor
    """A, `[rank, in]`."""
    up: Tensor
    """B, `[out, rank]`."""


@torch.no_grad()
def merge_lora(model: nn.Module, file: Path, *, scaling: float) -> None:
    """Merge a LoRA into a model's weights, in their dtype. Nothing is changed unless all of it fits.

    Args:
        model: kyutai's `LMModel`.
        file: the `lora.safetensors`.
        scaling: what `B A` is multiplied by.

    Raises:
        EnvironmentProblem: the file cannot be read, or belongs to another model.
    """
    weights = dict(model.named_parameters())
    try:
        tensors = in_todays_names(read_tensors(file, device=next(iter(weights.values())).device), weights)
    except EnvironmentProblem as problem:
        raise EnvironmentProblem(str(problem), key=_KEY, fix=_FIX) from None
    _require_fit(file, tensors, weights)
    for name in _replaced(tensors):
        weights[name.replace(_FROZEN, ".weight")].copy_(tensors[name])
    for name in _adapted(tensors):
        own = weights[name + ".weight"]
        low = _Factors(tensors[name + _DOWN].to(own.dtype), tensors[name + _UP].to(own.dtype))
        own.copy_(own + scaling * (low.up @ low.down))


def _adapted(names: Mapping[str, object]) -> Iterator[str]:
    """The linears that a LoRA has factors for."""
    return (name.removesuffix(_DOWN) for name in names if name.endswith(_DOWN))


def _replaced(names: Mapping[str, object]) -> Iterator[str]:
    """The weights that it brings whole."""
    return (name for name in names if not name.endswith((_DOWN, _UP)))


_OLD: Final = re.compile(r"(.*self_attn)\.(in|out)_proj\.(lora_[AB]\.weight)$")
"""The names of attention in older versions of kyutai's package, whose factors are stacked."""


def in_todays_names(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with attention's older names split into today's, as kyutai's own loading does.

    Args:
        tensors: of a LoRA. What cannot be split keeps its name.
        weights: the model's parameters by name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = _OLD.match(name)
        parts = 0
        while old is not None and f"{old[1]}.{old[2]}_projs.{parts}.weight" in weights:
            parts += 1
        if old is None or parts == 0 or tensor.dim() != 2 or tensor.shape[0] % parts:
            renamed[name] = tensor
            continue
        for number, part in enumerate(tensor.view(parts, -1, tensor.shape[1])):
            renamed[f"{old[1]}.{old[2]}_projs.{number}.{old[3]}"] = part
    return renamed


def _require_fit(file: Path, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not any(name.endswith(_DOWN) for name in shapes):
        kind = kind_of_weights(read_header(file))
        looks = "" if kind is None else f"; it looks like {kind.words}"
        raise EnvironmentProblem(
            f"{file} holds no LoRA by moshi-finetune: none of its {len(shapes)} tensors is a lora_A{looks}",
            key=_KEY,
            fix=_FIX,
        )
    odd = [told for told in (_misfit(name, shapes, weights) for name in shapes) if told]
    if odd:
        raise EnvironmentProblem(
            f"{file} is no LoRA of this model: {len(odd)} of its {len(shapes)} tensors do not fit: {first_few(odd)}",
            key=_KEY,
            fix=_FIX,
        )


def _misfit(name: str, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> str | None:
    """Why a tensor of the file has no place in the model; None if it has one."""
    if not name.endswith((_DOWN, _UP)):
        own = weights.get(name.replace(_FROZEN, ".weight"))
        return None if own is not None and tuple(own.shape) == shapes[name] else name
    linear = name.removesuffix(_DOWN).removesuffix(_UP)
    own, down, up = weights.get(linear + ".weight"), shapes.get(linear + _DOWN), shapes.get(linear + _UP)
    if own is None or down is None or up is None or len(down) != 2 or len(up) != 2:
        return name
    return None if (up[0], down[1]) == tuple(own.shape) and down[0] == up[1] else name
