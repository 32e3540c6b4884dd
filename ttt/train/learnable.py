"""Which parameters learn, and their learning rates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ttt.adapter import Gate
from ttt.config.schema import TrainConfig
from ttt.errors import ConfigError
from ttt.inject import Injection

Role = Literal["ttt", "gate", "lora", "backbone"]

MULTIPLIERS: dict[Role, str] = {
    "ttt": "weight_lr_multiplier",
    "gate": "alpha_lr_multiplier",
    "lora": "lora_lr_multiplier",
    "backbone": "backbone_lr_multiplier",
}
"""The field with the multiplier of `lr` for each role."""
_NO_DECAY = re.compile(r"norm|bias|(^|\.)b\d+$|learnable_ttt_lr|learnable_token_idx", re.IGNORECASE)
"""Names of norms, biases (the inner model's `b1`, `b2`, … too) and learned rates."""


@dataclass(frozen=True)
class Learnable:
    """A parameter that learns."""

    name: str
    parameter: nn.Parameter
    role: Role
    decays: bool
    """Whether weight decay applies."""
    is_matrix: bool = False
    """Whether it is a matrix with which a layer multiplies, or a stack of such, one for each head: what Muon is for."""


def learning_rate_factor(step: int, config: TrainConfig, role: Role = "ttt") -> float:
    """Multiplier of the peak learning rate at optimiser step `step` (from 0) for parameters of a role.

    It rises linearly to the peak over `warmup_steps` steps. Then the role's schedule falls to `min_lr_ratio` at the
    last step, as half a cosine or linearly, or stays at the peak.
    """
    schedule = (config.backbone_lr_schedule if role == "backbone" else None) or config.lr_schedule
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - 1 - config.warmup_steps))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left


def choose_learnable(
    model: nn.Module,
    injection: Injection,
    config: TrainConfig,
    *,
    is_attention: Callable[[str], bool],
    blocks: Sequence[nn.Module] = (),
) -> list[Learnable]:
    """Set `requires_grad` of every parameter as `train.trainable` says, and list those that learn.

    A group whose learning-rate multiplier is 0 is frozen. Shared parameters are listed once.

    Args:
        model: the model, with its adapters.
        injection: what was added to it.
        config: the `train` section.
        is_attention: whether a parameter of this name belongs to the backbone's attention.
        blocks: the backbone's layers, which say what a matrix of a layer is (`Learnable.is_matrix`); what is outside of
            them is none, such as embeddings and heads.

    Raises:
        ConfigError: nothing would learn, or `train.trainable` names attention that is not there.
    """
    roles = _roles(injection)
    unfrozen = _unfrozen(injection, config.trainable, is_attention)
    inside = _inside(blocks)
    learnable = []
    attention_found = False
    for name, parameter in model.named_parameters():
        role = roles.get(id(parameter), "backbone")
        wanted = role != "backbone" or unfrozen(name)
        attention_found |= role == "backbone" and wanted
        learns = wanted and parameter.is_floating_point() and getattr(config, MULTIPLIERS[role]) > 0
        parameter.requires_grad_(learns)
        if learns:
            decays = role != "gate" and _decays(name, parameter)
            is_matrix = decays and _is_matrix(parameter, role, inside)
            learnable.append(Learnable(name, parameter, role, decays, is_matrix))
    if "attention" in config.trainable and not attention_found:
        raise ConfigError(_no_attention(injection, config.trainable))
    if not learnable:
        raise ConfigError(
            "train.trainable: nothing would learn: there is no TTT layer (ttt.layers), no LoRA (adapter) and no "
            "unfrozen backbone parameter, or their learning-rate multipliers are 0"
        )
    return learnable


def _roles(injection: Injection) -> dict[int, Role]:
    """The role of each parameter that was added to the backbone, by its `id`."""
    roles: dict[int, Role] = {id(parameter): "lora" for parameter in injection.lora_parameters.values()}
    for adapter in injection.adapters.values():
        roles |= {id(parameter): "ttt" for parameter in adapter.parameters()}
        gates = [module for module in adapter.modules() if isinstance(module, Gate)]
        roles |= {id(parameter): "gate" for gate in gates for parameter in gate.parameters()}
    return roles


def _unfrozen(injection: Injection, trainable: str, is_attention: Callable[[str], bool]) -> Callable[[str], bool]:
    """Which of the backbone's parameters learn, by name."""
    if trainable == "all":
        return lambda name: True
    if trainable == "ttt+attention":
        return is_attention
    if trainable == "ttt+ttt_layer_attention":
        layers = tuple(f"{site.layer_path}." for site in injection.sites)
        return lambda name: name.startswith(layers) and is_attention(name)
    return lambda name: False


def _no_attention(injection: Injection, trainable: str) -> str:
    why = "the backbone names none of its parameters as attention"
    if trainable != "ttt+attention":
        why = f"{why} in the layers that have TTT" if injection.sites else "no layer has TTT"
    return f"train.trainable: {trainable}: {why}; write ttt or all"


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, but not to norms, biases and learned rates."""
    return sum(size > 1 for size in parameter.shape) > 1 and not _NO_DECAY.search(name)


def _inside(blocks: Sequence[nn.Module]) -> set[int]:
    """The parameters of layers, by their `id`, without those of tables of embeddings."""
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    tables = [module for block in blocks for module in block.modules() if isinstance(module, nn.Embedding)]
    return inside - {id(parameter) for table in tables for parameter in table.parameters()}


def _is_matrix(parameter: Tensor, role: Role, inside: set[int]) -> bool:
    """Whether it is a matrix of a layer, or of what was added to one; of a TTT layer also a stack of one a head."""
    if role == "ttt":
        return parameter.dim() in (2, 3)
    return parameter.dim() == 2 and (role == "lora" or id(parameter) in inside)
