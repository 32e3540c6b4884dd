"""Knowing a backbone's weights again by a few values of each parameter."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttt.inject import Injection

_SAMPLES = 8
"""Values of each backbone parameter that an adapter file keeps, to know the backbone again."""


@dataclass(frozen=True)
class BackboneWeights:
    """By what an adapter file knows the backbone again."""

    fingerprint: str | None
    """As `weights_fingerprint` gives it."""
    dtype: str | None
    """As `backbone_dtype` gives it."""

    @classmethod
    def of(cls, injection: Injection, *, without: set[str] | frozenset[str] = frozenset()) -> BackboneWeights:
        """Of a backbone, without some of its parameters."""
        return cls(weights_fingerprint(injection, without=without), backbone_dtype(injection, without=without))


def weights_fingerprint(injection: Injection, *, without: set[str] | frozenset[str] = frozenset()) -> str | None:
    """Some values of each backbone parameter in bfloat16, the same from float32 and bfloat16, on every device.

    It holds values and not a hash of them: a model that is drawn at random differs in the last place on another
    processor, so that now and then a value rounds to its neighbour. `same_weights` compares.

    Args:
        injection: of the model; its adapters are left out.
        without: names of parameters to leave out.

    Returns:
        `bf16:NAMES:VALUES`, a hash of names and shapes, and the values in base64; None if the model has no values
        (device `meta`).
    """
    names, samples = hashlib.sha256(), []
    for name, parameter in _backbone_parameters(injection, without):
        if parameter.is_meta:
            return None
        names.update(f"{name} {list(parameter.shape)}\n".encode())
        values = _sampled(parameter, _SAMPLES).tolist()
        samples.append(struct.pack(f"<{len(values)}h", *values))
    return f"bf16:{names.hexdigest()[:16]}:{base64.b64encode(b''.join(samples)).decode()}"


def same_weights(fingerprint: str, injection: Injection, *, without: set[str] | frozenset[str] = frozenset()) -> bool:
    """Whether a fingerprint is of this backbone's weights.

    If values are drawn on another processor, about 1 in 14,000 rounds to the neighbour in bfloat16 (measured). If a
    training moved them by a thousandth, about every fifth does. So 1 in 1,000 may be a neighbour, and 2 of a small
    model.

    Args:
        fingerprint: as an adapter file has it; `sha256:…` is that of format 1, equal or not.
        injection: of the model.
        without: names of parameters to leave out.

    Returns:
        Whether it is; True, too, if either has no values.
    """
    if fingerprint.startswith("sha256:"):
        here = _hash_of_weights(injection, without)
        return here is None or here == fingerprint
    here = weights_fingerprint(injection, without=without)
    if here is None:
        return True
    head, _, values = here.rpartition(":")
    other_head, _, other_values = fingerprint.rpartition(":")
    one, other = _ranks(values), _ranks(other_values)
    if head != other_head or len(one) != len(other):
        return False
    away = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(away, default=0) <= 1 and sum(away) <= max(2, len(away) // 1000)


_EXACT = frozenset({"float32", "bfloat16", "float64"})
"""The dtypes in which the fingerprint of the same weights is the same."""


def backbone_dtype(injection: Injection, *, without: set[str] | frozenset[str] = frozenset()) -> str | None:
    """The dtype of most of a backbone's parameters, as `float16`; of quantised ones if it has any; None if it has none.

    Quantisation leaves embeddings and norms as they were, which may be most of a small model.
    """
    counted: Counter[torch.dtype] = Counter()
    for _, parameter in _backbone_parameters(injection, without):
        counted[parameter.dtype] += parameter.numel()
    quantised = Counter({dtype: count for dtype, count in counted.items() if not dtype.is_floating_point})
    most = (quantised or counted).most_common(1)
    return str(most[0][0]).removeprefix("torch.") if most else None


def other_weights(theirs: str | None, ours: str | None) -> str:
    """What is said of weights that are not those of a file: whether their dtype may be why, and the way out.

    Args:
        theirs: `backbone_dtype` of the backbone that the adapter was trained on; None if the file does not say.
        ours: that of the backbone here.
    """
    if ours not in _EXACT and ours != theirs and ours is not None:
        before = theirs or "bfloat16 or float32"
        kind = "in float16" if ours == "float16" else f"quantised or stored as {ours}"
        return (
            f"the backbone's weights: {kind} here, not in {before}, in which the adapter was trained and which has "
            f"other values; load the backbone in {before} (dtype=torch.{before.split()[0]})"
        )
    if theirs is not None and theirs not in _EXACT and ours != theirs:
        return (
            f"the backbone's weights: {ours} here, but the adapter was trained on them in {theirs}, which has other "
            f"values; load the backbone in {theirs} (dtype=torch.{theirs})"
        )
    return "the backbone's weights: other values here than those that it was trained on"


def _ranks(values: str) -> list[int]:
    """Whole numbers in the order of the bfloat16 values, neighbours one apart; empty if the text does not hold any."""
    try:
        content = base64.b64decode(values, validate=True)
        bits = [number for (number,) in struct.iter_unpack("<h", content)]
    except (ValueError, struct.error):
        return []
    return [-32768 - number if number < 0 else number for number in bits]


def _backbone_parameters(
    injection: Injection, without: set[str] | frozenset[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    wrapped = _wrapped_modules(injection.model)
    of_adapters = {id(parameter) for adapter in injection.adapters.values() for parameter in adapter.parameters()}
    of_adapters |= {id(parameter) for parameter in injection.lora_parameters.values()}
    for name, parameter in injection.model.named_parameters():
        plain = _plain_name(name, wrapped)
        if plain is not None and name not in without and id(parameter) not in of_adapters:
            yield plain, parameter


_WRAPPED = ("base_layer", "original_module")
"""What PEFT calls a module that it has wrapped, as LoRA does."""


def _wrapped_modules(model: nn.Module) -> list[tuple[str, str]]:
    """The modules that hold a wrapped one: their path and the name of that child, each with a dot."""
    return [
        (f"{path}.", f"{child}.")
        for path, module in model.named_modules()
        for child in _WRAPPED
        if path and child in module._modules
    ]


def _plain_name(name: str, wrapped: list[tuple[str, str]]) -> str | None:
    """A parameter's name in the model before PEFT wrapped some of its modules; None if it came with a wrapper."""
    for path, child in reversed(wrapped):  # the inner ones first, so that the outer paths still hold
        if name.startswith(path):
            if not name.startswith(path + child):
                return None
            name = path + name[len(path + child) :]
    return name


def _sampled(parameter: Tensor, count: int) -> Tensor:
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // count)][:count].to(torch.bfloat16).view(torch.int16).cpu()


def _hash_of_weights(injection: Injection, without: set[str] | frozenset[str]) -> str | None:
    """The fingerprint of format 1."""
    digest = hashlib.sha256()
    for name, parameter in _backbone_parameters(injection, without):
        if parameter.is_meta:
            return None
        digest.update(f"{name} {list(parameter.shape)} {_sampled(parameter, 16).tolist()}\n".encode())
    return f"sha256:{digest.hexdigest()}"
