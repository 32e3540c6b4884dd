"""What users of `transformers`, `Trainer`, `accelerate` and PEFT give to `save_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ttt.config.spelling import nearest
from ttt.errors import UsageError

PUSHING = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")
"""Those that say where and how it is pushed to the hub."""
_OF_PEFT = ("selected_adapters", "save_embedding_layers", "path_initial_model_for_weight_conversion")
_WITHOUT_EFFECT = ("save_function", "max_shard_size", "save_peft_format", "save_original_format")
"""About how `transformers` writes a backbone's weights, of which none are written here."""
_ACTING = ("is_main_process", "state_dict", "push_to_hub", "safe_serialization", "variant", "distributed_checkpoint")


@dataclass(frozen=True)
class SaveOptions:
    """Those that act."""

    is_main_process: bool = True
    """Only that process writes."""
    state_dict: Mapping[str, Any] | None = None
    """The model's, gathered from several processes."""
    push_to_hub: bool = False
    pushing: Mapping[str, Any] = field(default_factory=dict)
    of_peft: Mapping[str, Any] = field(default_factory=dict)
    """What PEFT takes, for a model with LoRA."""


def read_options(given: Mapping[str, Any], *, beside_peft: bool) -> SaveOptions:
    """Sort the arguments of `save_pretrained`.

    Raises:
        UsageError: one is unknown, or cannot be honoured.
    """
    known = (*_ACTING, *PUSHING, *_WITHOUT_EFFECT, *_OF_PEFT)
    for name in given:
        if name not in known:
            close = nearest(name, known)
            raise UsageError(
                f"save_pretrained knows no argument {name}" + (f"; did you mean {close}?" if close else "")
            )
    _require_honoured(given, beside_peft=beside_peft)
    pushed = bool(given.get("push_to_hub"))
    return SaveOptions(
        bool(given.get("is_main_process", True)),
        given.get("state_dict"),
        pushed,
        {name: given[name] for name in PUSHING if name in given},
        {name: given[name] for name in _OF_PEFT if name in given},
    )


def _require_honoured(given: Mapping[str, Any], *, beside_peft: bool) -> None:
    if given.get("safe_serialization", True) is not True:
        raise UsageError("safe_serialization=False would write a pickle; adapters are written as safetensors only")
    for name in ("variant", "distributed_checkpoint"):
        if given.get(name):
            raise UsageError(f"save_pretrained of a model with TTT takes no {name}; leave it out")
    for name in _OF_PEFT:
        if name in given and not beside_peft:
            raise UsageError(f"{name} is for PEFT's adapters, and there are none in this model; leave it out")
    for name in ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr"):
        if given.get(name) is not None and not given.get("push_to_hub"):
            raise UsageError(f"{name} acts with push_to_hub=True only; give that, or leave it out")
