"""TTT put into a model whose own parameters are frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from ttt import inject
from ttt.config import TTTConfig
from ttt.errors import InjectionError
from ttt.facade.attached import Attached
from ttt.facade.recognising import Recognised, origin
from ttt.inject import Injection


def inject_frozen(model: nn.Module, found: Recognised, config: TTTConfig, *, seed: int, wrapped: bool) -> Attached:
    """Inject TTT and freeze the model's own parameters.

    Args:
        model: the model of the sites.
        found: what is known of it.
        config: the settings of TTT.
        seed: of the adapters.
        wrapped: whether PEFT has wrapped it, and says what of it is trained.

    Raises:
        InjectionError: the settings do not fit the model, or name no layer; it is unchanged.
    """
    if not inject.plan(found.sites, config, causal=found.causal, model=model).sites:
        raise InjectionError(f"ttt.layers: {config.layers!r} names no layer, so there would be no TTT in the model")
    injection = inject.apply(model, found.sites, config, causal=found.causal, seed=seed)
    return frozen(model, injection, found, wrapped=wrapped)


def frozen(model: nn.Module, injection: Injection, found: Recognised, *, wrapped: bool) -> Attached:
    """Freeze what is not TTT's; if PEFT has wrapped the model, it has done that, and trains what is its own."""
    training: dict[str, Any] = dict(origin(model))
    attached = Attached(injection, model, type(model), found.backbone, [], training=training)
    if not wrapped:
        own = set(map(id, attached.adapter_parameters().values()))
        backbone = [(name, each) for name, each in model.named_parameters() if id(each) not in own]
        attached.flags = [(name, each.requires_grad) for name, each in backbone]
        for _, parameter in backbone:
            parameter.requires_grad_(False)
    return attached
