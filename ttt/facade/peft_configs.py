"""PEFT around a model that has TTT already: what its wrapper does not know of is kept all the same.

`get_peft_model` freezes whatever is not its own, and its `save_pretrained` writes whatever is its own. It hands its
configs to the model that it wraps, and asks each of them to write itself when it saves. So a config becomes one that
writes TTT's files too, in a folder below.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt.facade.attached import Attached, attached_to, beside_peft, is_attached
from ttt.facade.options import SaveOptions
from ttt.facade.saving import BESIDE_PEFT, save

_MADE: dict[type[Any], type[Any]] = {}


class _SavesTTT:
    """A config of PEFT that writes the TTT of its model with itself."""

    ttt_model: weakref.ref[nn.Module]

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write the config, and TTT below."""
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]
        model = self.ttt_model()
        if model is not None and is_attached(model):
            keep_out_of_ttt(attached_to(model))  # of a second adapter
            save(attached_to(model), Path(save_directory) / BESIDE_PEFT, SaveOptions())


def keep_out_of_ttt(attached: Attached) -> None:
    """Take out again what PEFT has put into TTT's own matrices.

    They are called as a backbone's are, `q_proj`, so that PEFT finds them too. But they are trained as they are, and
    their files hold no LoRA.
    """
    for adapter in attached.injection.adapters.values():
        _keep_out_of(adapter)


def _keep_out_of(adapter: nn.Module) -> None:
    wrapped = [
        (module, name, own)
        for module in adapter.modules()
        for name, child in module.named_children()
        if (own := _wrapped(child)) is not None
    ]
    for module, name, own in wrapped:
        setattr(module, name, own)
    trained = any(parameter.requires_grad for parameter in adapter.parameters())
    for _, _, own in wrapped:  # PEFT freezes what it trains a copy of
        own.requires_grad_(trained)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module in a wrapper of PEFT's; None if it is none."""
    if "base_layer" in module._modules:
        return module.get_base_layer()  # type: ignore[operator]
    return module._modules.get("original_module") if "modules_to_save" in module._modules else None


def wrapped_by_peft(attached: Attached, configs: object) -> None:
    """What follows once PEFT has wrapped a model with TTT: TTT is trained still, and saved with the rest."""
    keep_out_of_ttt(attached)
    attached.train_adapters()
    if isinstance(configs, Mapping):
        for config in configs.values():
            _make_saving(config, attached.model)
    if not attached.guards:
        attached.guards.append(attached.model.register_load_state_dict_pre_hook(_warn_if_left_out))
        # PEFT's own wrapper tells nobody of an adapter that is added later.
        for site in attached.injection.sites:
            hook = functools.partial(_keep_out, site.attribute)
            attached.guards.append(site.module.register_forward_pre_hook(hook))


@torch.compiler.disable
def _keep_out(attribute: str, layer: nn.Module, _: object) -> None:
    """A hook of a layer with TTT."""
    _keep_out_of(getattr(layer, attribute))


def _warn_if_left_out(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """PEFT's wrapper loads what is its own, and knows of no folder below."""
    adapters = tuple(f"{prefix}{name}." for name in attached_to(module).injection.adapters)
    if beside_peft(module) and not any(name.startswith(adapters) for name in state_dict):
        warnings.warn(
            "PEFT loads its own weights into a model with TTT, and leaves TTT as it is; to load both, as a Trainer "
            "that resumes has to, give it ttt.get_ttt_model(peft_model)",
            UserWarning,
            stacklevel=2,
        )


def _make_saving(config: Any, model: nn.Module) -> None:
    kind = type(config)
    if not issubclass(kind, _SavesTTT):
        if kind not in _MADE:
            body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
            _MADE[kind] = type(kind.__name__, (_SavesTTT, kind), body)
        config.__class__ = _MADE[kind]
    config.ttt_model = weakref.ref(model)


def release(attached: Attached) -> None:
    """Make the configs what they were."""
    while attached.guards:
        attached.guards.pop().remove()
    configs = getattr(attached.model, "peft_config", None)
    for config in configs.values() if isinstance(configs, Mapping) else ():
        if isinstance(config, _SavesTTT):
            del config.ttt_model
            config.__class__ = type(config).__mro__[2]
