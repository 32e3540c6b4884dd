"""Where the sites of a model come from: its caller, its structure, or an installed backbone plugin."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ttt.adapter import Gate
from ttt.errors import InjectionError, TTTError, UsageError
from ttt.hf import CausalLMBackbone
from ttt.plugins import Site, get_backbone, names


@dataclass(frozen=True)
class Recognised:
    """What is known of a model into which TTT goes."""

    sites: Sequence[Site]
    causal: bool
    backbone: Mapping[str, Any]
    """What adapter files say of it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the `ttt` section if the user gives none."""


def is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a model of `transformers`; does not import that package."""
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    return kind is not None and isinstance(model, kind)


def is_peft_model(model: object) -> bool:
    """Whether it is a model that PEFT has wrapped; does not import that package."""
    kind = getattr(sys.modules.get("peft"), "PeftModel", None)
    return kind is not None and isinstance(model, kind)


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper; the model itself if there is none."""
    inner: nn.Module = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
    return inner


def recognise(model: nn.Module, sites: Sequence[Site] | None, causal: bool | None) -> Recognised:
    """Find the sites of a model, unless its caller gives them.

    Args:
        model: without PEFT's wrapper.
        sites: what the caller gives.
        causal: what the caller says; None is what is known with the sites. Of given ones nothing is known: then the
            strict answer is taken, that lets no token see a later one.

    Raises:
        InjectionError: the model is not understood, or two plugins take it for theirs; the message says what was tried.
    """
    if any(isinstance(module, Gate) for module in model.modules()):
        raise UsageError(
            "there is TTT in this model already, put in by ttt.inject or a plugin; eject that first: injection.eject()"
        )
    if sites is not None and not all(isinstance(site, Site) for site in sites):
        raise UsageError(
            "sites must be ttt.Site objects, one for each layer, as a backbone plugin's sites(model) gives"
        )
    found = _found(model) if sites is None else Recognised(sites, True, _told_by(model, sites))
    return found if causal is None else replace(found, causal=causal)


def _told_by(model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
    return {**described(model), **(sites[0].known_options if sites else {})}


def _found(model: nn.Module) -> Recognised:
    refusals = []
    if is_transformers_model(model):
        from ttt.hf import causal_lm_sites

        try:
            return Recognised(causal_lm_sites(model), True, described(model))
        except InjectionError as error:
            refusals.append(str(error))
    else:
        refusals.append(f"{type(model).__name__} is no model of transformers")
    return _of_a_plugin(model, refusals)


def described(model: nn.Module) -> dict[str, Any]:
    """What an adapter file says of a model that no config describes: what the plugin `transformers` says of it."""
    if not is_transformers_model(model):
        return {"name": type(model).__name__}
    from ttt.hf import attention_limit

    window, sinks = attention_limit(model)
    return {"name": "transformers", "attention_window": window, "attention_sinks": sinks}


def origin(model: nn.Module) -> dict[str, Any]:
    """Where a model of `transformers` comes from, for people: nothing is compared by a path or a commit."""
    if not is_transformers_model(model):
        return {}
    config = getattr(model, "config", None)
    found = {
        "repository": getattr(model, "name_or_path", None) or None,
        "commit": getattr(config, "_commit_hash", None),
    }
    return {
        "architecture": architecture(model),
        "provenance": {key: value for key, value in found.items() if isinstance(value, str)},
    }


def architecture(model: nn.Module) -> str | None:
    """What `transformers` calls the model's architecture; None for others."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if is_transformers_model(model) and isinstance(found, str) else None


def _of_a_plugin(model: nn.Module, refusals: list[str]) -> Recognised:
    found: dict[str, Recognised] = {}
    asked = []
    for name in names():
        try:
            backbone = get_backbone(name)
            if isinstance(backbone, CausalLMBackbone):  # which would say the same as the model's structure
                continue
            asked.append(name)
            sites = backbone.sites(model)
        except TTTError:  # it is broken, or the model is not its own
            continue
        if sites:
            known = {"name": name, **sites[0].known_options}
            found[name] = Recognised(sites, backbone.causal, known, backbone.ttt_defaults)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise InjectionError(
            f"{type(model).__name__} is taken for theirs by the backbones {' and '.join(found)}; give "
            f"sites=ttt.plugins.get_backbone(NAME).sites(model) of the right one"
        )
    tried = f"none of the installed backbones knows it ({', '.join(asked)})" if asked else "no backbone is installed"
    raise InjectionError(f"{'; '.join(refusals)}; {tried}; give the places for TTT as sites=")


_WRAPPERS = ("torch._dynamo.", "torch.nn.parallel", "torch.distributed.", "accelerate.", "deepspeed.")


def require_a_plain_model(model: object) -> nn.Module:
    """Refuse what is no model, or one into which TTT must go before something else is done with it.

    Raises:
        UsageError: one sentence says what to give instead.
    """
    if not isinstance(model, nn.Module):
        hint = "; load it first: AutoModelForCausalLM.from_pretrained(name)" if isinstance(model, str) else ""
        raise UsageError(f"TTT goes into a model (torch.nn.Module), not {_with_type(model)}{hint}")
    kind = type(model)
    if kind.__module__.startswith(_WRAPPERS):
        raise UsageError(
            f"{kind.__name__} wraps the model; put TTT into the model inside first, and wrap what comes out"
        )
    if kind.__name__ == "PeftMixedModel":
        raise UsageError("PEFT can neither save nor load a PeftMixedModel; use peft.get_peft_model without mixed")
    require_peft_outside(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("the model, or a part of it, is on the device meta and has no values; load its weights first")
    return model


def require_peft_outside(model: nn.Module) -> None:
    """Refuse LoRA that `transformers` has put into the model itself, for there is one place for both one's files.

    Raises:
        UsageError: there is some.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            "this model got its LoRA by model.add_adapter, and would be saved without it; use peft.get_peft_model, "
            "before or after TTT"
        )


def _with_type(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"
