"""TTT put into a model whose own parameters are frozen."""

from __future__ import annotations

from torch import nn

from ttt import inject
from ttt.config import TTTConfig
from ttt.errors import InjectionError
from ttt.facade.attached import Attached
from ttt.facade.recognising import Recognised
from ttt.inject import Injection


def inject_frozen(model: nn.Module, found: Recognised, config: TTTConfig, *, causal: bool, seed: int) -> Attached:
    """Inject TTT and freeze the model's own parameters.

    Raises:
        InjectionError: the settings do not fit the model, or name no layer; it is unchanged.
    """
    if not inject.plan(found.sites, config, causal=causal, model=model).sites:
        raise InjectionError(f"ttt.layers: {config.layers!r} names no layer, so there would be no TTT in the model")
    injection = inject.apply(model, found.sites, config, causal=causal, seed=seed)
    return frozen(model, injection, found)


def frozen(model: nn.Module, injection: Injection, found: Recognised) -> Attached:
    """Freeze what is not TTT's."""
    attached = Attached(injection, model, found.backbone, [])
    own = set(map(id, attached.adapter_parameters().values()))
    attached.flags = [(each, each.requires_grad) for each in model.parameters() if id(each) not in own]
    for parameter, _ in attached.flags:
        parameter.requires_grad_(False)
    return attached
