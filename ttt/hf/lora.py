"""The linear layers of a causal language model of `transformers` that LoRA can go into."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ttt.config.lora import Linears
from ttt.errors import UsageError
from ttt.hf.structure import find_decoder
from ttt.plugins.lora_site import LoraSite


def lora_sites(model: nn.Module, linears: Linears, *, is_attention: Callable[[str], bool]) -> list[LoraSite]:
    """The linear layers that `lora.linears` names, in the order of the model's modules.

    `all` has the output head too, which PEFT's `all-linear` leaves out.

    Raises:
        UsageError: there are none, as in GPT-2, whose layers are of a class of its own.
    """
    inside = f"{find_decoder(model).layers_path}."

    def is_named(path: str) -> bool:
        if linears in ("all", "transformer"):
            return linears == "all" or path.startswith(inside)
        return path.startswith(inside) and is_attention(path) == (linears == "attention")

    found = [
        LoraSite(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_named(path)
    ]
    if not found:
        raise UsageError(
            f"lora.linears: {linears}: {type(model).__name__} has no torch.nn.Linear there, and LoRA goes into nothing "
            f"else; write adapter: ttt"
        )
    return found
