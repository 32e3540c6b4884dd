"""`get_ttt_model`: TTT goes into a model, and everything else is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ttt.config import TTTConfig
from ttt.errors import UsageError
from ttt.facade.attached import attached_to, is_attached
from ttt.facade.injecting import inject_frozen
from ttt.facade.model import TTTModel, as_ttt_model, wrapper_as_ttt_model
from ttt.facade.recognising import inner_model, recognise, require_a_plain_model
from ttt.plugins import Site


def get_ttt_model(
    model: nn.Module,
    config: TTTConfig | None = None,
    *,
    sites: Sequence[Site] | None = None,
    causal: bool | None = None,
    seed: int = 0,
) -> Any:
    """Put TTT into a model, in place, and freeze everything else. The model is returned, and is a `TTTModel` now.

    Args:
        model: a causal language model of `transformers`, one that an installed backbone plugin knows, or any model
            with `sites`. Of a model that PEFT has wrapped, PEFT's adapters stay trainable beside TTT; if TTT is inside
            already, both are trained and saved from now on.
        config: the settings of TTT; None is `TTTConfig()`, or what the plugin of the model has instead.
        sites: where TTT can go; None finds them.
        causal: whether a token of the model sees none after it. None is what is known with the sites; for given ones
            that is true, which is the safe answer.
        seed: of the adapters' initial values.

    Raises:
        UsageError: an argument is wrong, or there is TTT in the model already.
        InjectionError: the model is not understood, or the settings do not fit it. It is then unchanged.
    """
    inner = inner_model(require_a_plain_model(model))
    if config is not None and not isinstance(config, TTTConfig):
        raise UsageError(f"config must be a ttt.TTTConfig, not {type(config).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed must be a whole number, not {seed!r:.60}")
    if is_attached(inner):
        return _lifted(model, inner, config, sites)
    found = recognise(inner, sites, causal)
    settings = TTTConfig.model_validate(dict(found.defaults)) if config is None else config
    attached = inject_frozen(inner, found, settings, seed=seed, wrapped=inner is not model)
    return as_ttt_model(attached, model)


def _lifted(model: nn.Module, inner: nn.Module, config: TTTConfig | None, sites: Sequence[Site] | None) -> Any:
    """PEFT's wrapper around a model with TTT, made a `TTTModel` too.

    Raises:
        UsageError: it is one already, or other settings are given than those of the TTT inside.
    """
    attached = attached_to(inner)
    if inner is model or isinstance(model, TTTModel):
        raise UsageError("there is TTT in this model already; call model.unload() first")
    if sites is not None or (config is not None and config != attached.injection.config):
        raise UsageError(
            "there is TTT with other settings inside this model of PEFT; leave config and sites out to train and save "
            "both, or call unload() on the model with TTT first"
        )
    return wrapper_as_ttt_model(attached, model)
