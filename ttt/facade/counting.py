"""How many parameters of a model are trained, and whose they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ttt.words import first_entries


def trainable_in_words(model: nn.Module, adapters: Iterable[nn.Parameter], layers: int) -> str:
    """PEFT's sentence about a model, and a second one that says what is frozen and what else is trained.

    Args:
        model: what is counted.
        adapters: the parameters of TTT.
        layers: how many layers have TTT.
    """
    trained, total = count(model.parameters())
    share = 100 * trained / max(1, total)
    own = list(adapters)
    of_ttt, all_ttt = count(own)
    known = {id(parameter) for parameter in own}
    others = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in known
    }
    ours = f"TTT in {layers} {'layer' if layers == 1 else 'layers'}: {_of_ours(of_ttt, all_ttt)}"
    rest = f"the rest is frozen: {total - trained - (all_ttt - of_ttt):,}"
    told = "; ".join([ours, *_of_others(others), rest])
    return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}\n{told}"


def count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """How many values are trained, and how many there are."""
    trained = total = 0
    for parameter in parameters:
        total += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    return trained, total


def _of_ours(trained: int, total: int) -> str:
    if trained == total:
        return f"{total:,}"
    return f"{total:,}, frozen" if not trained else f"{total:,}, of which {trained:,} are trained"


def _of_others(others: dict[str, int]) -> list[str]:
    """What is trained beside TTT: that of PEFT, known by its names, and the backbone's own."""
    of_lora = sum(size for name, size in others.items() if "lora_" in name)
    own = {name: size for name, size in others.items() if "lora_" not in name}
    told = [f"also trained: {of_lora:,} of LoRA"] if of_lora else []
    if own:
        listed = ", ".join(first_entries(list(own), 3))
        told.append(f"also trained: {sum(own.values()):,} of the backbone ({listed})")
    return told
