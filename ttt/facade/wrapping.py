"""`get_ttt_model`: TTT goes into a model, and everything else is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ttt.config import TTTConfig
from ttt.errors import UsageError
from ttt.facade.attached import is_attached
from ttt.facade.injecting import inject_frozen
from ttt.facade.model import as_ttt_model
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
            with `sites`.
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
        raise UsageError(
            f"config must be a ttt.TTTConfig, not {type(config).__name__}; write ttt.TTTConfig(layers=...)"
        )
    if is_attached(inner):
        raise UsageError("there is TTT in this model already; call model.unload() first")
    found = recognise(inner, sites)
    settings = TTTConfig.model_validate(dict(found.defaults)) if config is None else config
    attached = inject_frozen(inner, found, settings, causal=found.causal if causal is None else causal, seed=seed)
    return as_ttt_model(attached)
