"""A causal language model's decoder and its layers, found from the structure of its modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ttt.errors import InjectionError

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What versions and architectures of `transformers` call the cache that a model or a layer is given."""


@dataclass(frozen=True)
class Decoder:
    """The decoder of a causal language model."""

    path: str
    """Dotted path of `module` in the model; empty if it is the model itself."""
    module: nn.Module
    """What calls the layers one after another, and is given the attention mask."""
    layers_path: str
    """Dotted path of the list of layers in the model."""
    layers: tuple[nn.Module, ...]
    dim: int
    """Width of the tokens between the layers."""
    num_heads: int
    """Heads that queries have."""


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder of a model, in a wrapper such as PEFT's too.

    Decoder layers are the entries of a `ModuleList` that are of one class, hold the `layer_idx` by which attention
    finds its entry in a cache, and whose `forward` takes a cache. What calls them takes an `attention_mask`.

    Raises:
        InjectionError: there is no such list, or more than one, or the model is an encoder and a decoder; the message
            says what was looked for and what was found.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise InjectionError(
            f"{type(model).__name__} is an encoder and a decoder; TTT is injected into causal language models, which "
            f"are decoders alone"
        )
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    why_not = {path: _why_not_layers(module) for path, module in lists}
    found = [(path, module) for path, module in lists if not why_not[path]]
    if len(found) != 1:
        raise InjectionError(_not_understood(model, [path for path, _ in found], why_not))
    layers_path, layers = found[0]
    path = layers_path.rpartition(".")[0]
    decoder = model.get_submodule(path)
    if "attention_mask" not in _parameters(decoder):
        raise InjectionError(
            f"{_named(path, decoder)} calls the decoder layers, but its forward takes no attention_mask, which says "
            f"which tokens are padding; it takes {', '.join(_parameters(decoder))}"
        )
    if not {"input_ids", "inputs_embeds"} & set(_parameters(decoder)):
        raise InjectionError(
            f"{_named(path, decoder)} calls the decoder layers, but its forward takes neither input_ids nor "
            f"inputs_embeds; it takes {', '.join(_parameters(decoder))}"
        )
    _require_counting_cache(decoder, path)
    dim, heads = _sizes(decoder, path)
    return Decoder(path, decoder, layers_path, tuple(layers), dim, heads)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as the model has it: if TTT is in the module, the class that it had before."""
    return getattr(type(module), "ttt_class", type(module))


def cache_index(layer: nn.Module) -> int:
    """The entry of a cache that is a decoder layer's: the `layer_idx` of its attention."""
    (index,) = _layer_indices(layer)
    return index


def _why_not_layers(modules: nn.ModuleList) -> str:
    """What keeps the modules of a list from being decoder layers; empty if they are."""
    if not len(modules):
        return "is empty"
    kinds = sorted({own_class(module).__name__ for module in modules})
    if len(kinds) > 1:
        return f"holds modules of several classes ({', '.join(kinds)})"
    for number, module in enumerate(modules):
        indices = _layer_indices(module)
        if indices != {number}:
            held = ", ".join(map(str, sorted(indices))) or "none"
            return f"number {number}, a {kinds[0]}, should hold the layer_idx {number}, and holds {held}"
    if any(getattr(part, "is_causal", True) is False for part in modules.modules()):
        return f"the attention of {kinds[0]} is not causal"
    taken = _parameters(modules[0])
    if not any(_takes_cache(name, parameter) for name, parameter in taken.items()):
        return f"the forward of {kinds[0]} takes no cache; it takes {', '.join(taken)}"
    return ""


def _layer_indices(layer: nn.Module) -> set[int]:
    found = (getattr(module, "layer_idx", None) for module in layer.modules())
    return {index for index in found if isinstance(index, int) and not isinstance(index, bool)}


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a module's forward, as its class has it before any decorator."""
    return {name: p for name, p in inspect.signature(own_class(module).forward).parameters.items() if name != "self"}


def _takes_cache(name: str, parameter: inspect.Parameter) -> bool:
    return name in CACHE_NAMES or "Cache" in str(parameter.annotation)


def _sizes(decoder: nn.Module, path: str) -> tuple[int, int]:
    config = getattr(decoder, "config", None)
    sizes = [getattr(config, name, None) for name in ("hidden_size", "num_attention_heads")]
    for name, size in zip(("hidden_size", "num_attention_heads"), sizes, strict=True):
        if not isinstance(size, int):
            raise InjectionError(f"{_named(path, decoder)}: its config has no {name}, or not as one number: {size!r}")
    return sizes[0], sizes[1]  # type: ignore[return-value]


def _require_counting_cache(decoder: nn.Module, path: str) -> None:
    """Refuse a model whose cache counts no tokens: nothing would show that it lost the states of TTT."""
    from transformers import DynamicCache

    try:
        DynamicCache(config=getattr(decoder, "config")).get_seq_length()  # noqa: B009 -- a module has any attribute
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InjectionError(
            f"{_named(path, decoder)} is not understood: looked for attention layers, whose cache counts its tokens; "
            f"transformers says of its cache: {error}"
        ) from None


def _named(path: str, module: nn.Module) -> str:
    return f"{path} ({type(module).__name__})" if path else type(module).__name__


def _not_understood(model: nn.Module, found: list[str], why_not: dict[str, str]) -> str:
    looked = (
        "looked for one list of decoder layers: modules of one class that hold the layer_idx of their entry in a cache "
        "and whose forward takes a cache"
    )
    if found:
        return f"{type(model).__name__} is not understood: {looked}; found {len(found)}: {', '.join(found)}"
    seen = "; ".join(_first(f"{path} {reason}" for path, reason in why_not.items()))
    return f"{type(model).__name__} is not understood: {looked}; found {seen or 'no list of modules at all'}"


def _first(reasons: Iterator[str], count: int = 4) -> Iterator[str]:
    for number, reason in enumerate(reasons):
        if number == count:
            yield "and more"
            return
        yield reason


def describe_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The types of a call's arguments, for messages."""
    parts = [type(value).__name__ for value in args]
    return ", ".join([*parts, *(f"{name}: {type(value).__name__}" for name, value in kwargs.items())])
