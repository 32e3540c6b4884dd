"""Which parameters learn, their learning rates, and the optimiser: AdamW in float32 for parameters of any type."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ttt.adapter import Gate
from ttt.config.schema import TrainConfig
from ttt.errors import ConfigError, EnvironmentProblem, NonFiniteError
from ttt.inject import Injection
from ttt.parallel.gathering import split_like, whole
from ttt.parallel.gradients import are_mixed, clip_
from ttt.train.averages import KIND, Averages
from ttt.train.parts_of_a_step import OPTIMIZER, part_of_step

Role = Literal["ttt", "gate", "lora", "backbone"]

_HALF = {torch.bfloat16, torch.float16}
_ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}

_MULTIPLIERS: dict[Role, str] = {
    "ttt": "weight_lr_multiplier",
    "gate": "alpha_lr_multiplier",
    "lora": "lora_lr_multiplier",
    "backbone": "backbone_lr_multiplier",
}
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
    model: nn.Module, injection: Injection, config: TrainConfig, *, is_attention: Callable[[str], bool]
) -> list[Learnable]:
    """Set `requires_grad` of every parameter as `train.trainable` says, and list those that learn.

    A group whose learning-rate multiplier is 0 is frozen. Shared parameters are listed once.

    Raises:
        ConfigError: nothing would learn, or `train.trainable` names attention that is not there.
    """
    roles = _roles(injection)
    unfrozen = _unfrozen(injection, config.trainable, is_attention)
    learnable = []
    attention_found = False
    for name, parameter in model.named_parameters():
        role = roles.get(id(parameter), "backbone")
        wanted = role != "backbone" or unfrozen(name)
        attention_found |= role == "backbone" and wanted
        learns = wanted and parameter.is_floating_point() and getattr(config, _MULTIPLIERS[role]) > 0
        parameter.requires_grad_(learns)
        if learns:
            learnable.append(Learnable(name, parameter, role, role != "gate" and _decays(name, parameter)))
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


class Optimizer:
    """AdamW over learnable parameters, with a float32 master copy of each parameter in half precision.

    A bfloat16 parameter has 8 bits of precision: an update smaller than 1/512 of it would be rounded away at every
    step. So gradients, moments and updates use a float32 copy, which is then rounded into the parameter.

    Call `collect` after each backward pass, then `clip`, then `step`.
    """

    def __init__(
        self, learnable: list[Learnable], config: TrainConfig, *, used_in: Mapping[str, torch.dtype] | None = None
    ) -> None:
        """If `used_in` names float32 parameters that are used in half precision, they are their own masters."""
        self._config = config
        self._used_in = dict(used_in or {})
        self._parameters = {entry.name: entry.parameter for entry in learnable}
        self._targets = {
            entry.name: entry.parameter
            if entry.parameter.dtype not in _HALF
            else nn.Parameter(entry.parameter.detach().to(torch.float32, copy=True))
            for entry in learnable
        }
        groups: dict[tuple[Role, bool], list[nn.Parameter]] = {}
        for entry in learnable:
            groups.setdefault((entry.role, entry.decays), []).append(self._targets[entry.name])
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "role": role,
                    "multiplier": getattr(config, _MULTIPLIERS[role]),
                    "weight_decay": config.weight_decay if decays else 0.0,
                }
                for (role, decays), parameters in groups.items()
            ],
            lr=config.lr,
            betas=config.betas,
        )
        self.averages = None if config.ema_decay is None else Averages(self._targets, config.ema_decay)
        """Averages of the weights, if the run keeps them."""

    @part_of_step(OPTIMIZER)
    def collect(self) -> None:
        """Add the gradients of the last backward pass to those of the masters, and free the former."""
        for name, parameter in self._parameters.items():
            target = self._targets[name]
            if target is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.to(torch.float32)
            target.grad = gradient if target.grad is None else target.grad.add_(gradient)
            parameter.grad = None

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """The gradient of each learnable parameter by name; None if backward did not reach it."""
        for name, target in self._targets.items():
            yield name, target.grad

    @part_of_step(OPTIMIZER)
    def clip(self) -> Tensor:
        """Scale all gradients down to a total norm of at most `max_norm`; returns the norm before, on their device."""
        gradients = [target.grad for target in self._targets.values() if target.grad is not None]
        if are_mixed(gradients):
            return clip_(gradients, self._config.max_norm)
        return whole(nn.utils.clip_grad_norm_(self._targets.values(), self._config.max_norm))

    @part_of_step(OPTIMIZER)
    def step(self, step: int) -> dict[str, float]:
        """Update the parameters at optimiser step `step` (from 0) and clear the gradients.

        Returns:
            The learning rates before the multipliers of the groups: `lr`, and `backbone_lr` if the backbone has its own
            schedule.
        """
        peak = self._config.lr
        for group in self._adamw.param_groups:
            group["lr"] = peak * learning_rate_factor(step, self._config, group["role"]) * group["multiplier"]
        rates = {"lr": peak * learning_rate_factor(step, self._config)}
        learns = any(group["role"] == "backbone" for group in self._adamw.param_groups)
        if learns and self._config.backbone_lr_schedule not in (None, self._config.lr_schedule):
            rates["backbone_lr"] = peak * learning_rate_factor(step, self._config, "backbone")
        try:
            self._adamw.step()
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise NonFiniteError(
                f"step {step + 1}: train.lr ({peak:g}), its multipliers, betas and weight_decay make a step that "
                f"float32 cannot hold; lower them"
            ) from error
        self.clear()
        if self.averages is not None:
            self.averages.update()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self._targets[name] is not parameter:
                    parameter.copy_(self._targets[name])
        return rates

    def clear(self) -> None:
        """Clear the gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = self._targets[name].grad = None

    def nbytes(self) -> int:
        """Bytes of the state in a checkpoint, once every parameter has had its first step."""
        moments = sum(2 * target.numel() * 4 + 4 for target in self._targets.values())
        masters = sum(target.numel() * 4 for name, target in self._targets.items() if self._has_master(name))
        averages = 0 if self.averages is None else sum(target.numel() * 4 for target in self._targets.values())
        return moments + masters + averages

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`, and `master.NAME` of masters; and
        `ema.NAME` of averages.
        """
        averages = {} if self.averages is None else self.averages.tensors()
        state = {f"{KIND}.{name}": average for name, average in averages.items()}
        for name, target in self._targets.items():
            for key, value in self._adamw.state.get(target, {}).items():
                state[f"{key}.{name}"] = value
            if self._has_master(name):
                state[f"master.{name}"] = target.detach()
        return state

    def _has_master(self, name: str) -> bool:
        return self._targets[name] is not self._parameters[name] or name in self._used_in

    def as_used(self, name: str, value: Tensor) -> Tensor:
        """A parameter's value in the type in which the model uses it."""
        return value.to(self._used_in.get(name, value.dtype))

    def room_for(self, shapes: Mapping[str, tuple[int, ...]], *, place: str) -> dict[str, Tensor]:
        """Tensors of these whole shapes to read a state into, each split as its parameter is; errors name `place`.

        Raises:
            EnvironmentProblem: they are not of the state of these parameters.
        """
        self._checked({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, place)
        return {
            key: torch.zeros(shape) if not shape else torch.zeros_like(self._targets[key.partition(".")[2]].detach())
            for key, shape in shapes.items()
        }

    def load(self, tensors: Mapping[str, Tensor], *, place: str) -> None:
        """Load the state that `tensors()` returned; errors name `place`.

        Raises:
            EnvironmentProblem: it is not the state of these parameters; then nothing is loaded.
        """
        states = self._checked(tensors, place)
        averages = {
            name: split_like(state.pop(KIND), self._targets[name]) for name, state in states.items() if KIND in state
        }
        if self.averages is not None:
            self.averages.load(averages)
        with torch.no_grad():
            for name, target in self._targets.items():
                state = states[name]
                if "master" in state:
                    target.copy_(split_like(state.pop("master"), target))
                self._adamw.state[target] = {
                    # the step count stays on the CPU, where AdamW itself keeps it
                    key: value.clone() if key == "step" else split_like(value.to(target.device, copy=True), target)
                    for key, value in state.items()
                }

    def _checked(self, tensors: Mapping[str, Tensor], place: str) -> dict[str, dict[str, Tensor]]:
        """Check that the tensors fit, and return them by parameter and kind."""
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self._targets}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            target = self._targets.get(name)
            if kind not in {*_ADAMW_STATE, "master", KIND} or target is None:
                raise EnvironmentProblem(f"{place}: holds {key!r}, which no learnable parameter of this run has")
            if kind != "step" and value.shape != target.shape:
                raise EnvironmentProblem(
                    f"{place}: {key!r} has shape {list(value.shape)}, the parameter {list(target.shape)}"
                )
            states[name][kind] = value
        for name in self._targets:
            is_master = self._has_master(name)
            if is_master != ("master" in states[name]):
                there = "lacks" if is_master else "holds"
                raise EnvironmentProblem(f"{place}: {there} a float32 copy of {name!r}")
            if (KIND in states[name]) != any(KIND in state for state in states.values()):
                raise EnvironmentProblem(f"{place}: lacks the average of {name!r}, and has those of others")
            if 0 < len(_ADAMW_STATE & states[name].keys()) < len(_ADAMW_STATE):
                raise EnvironmentProblem(f"{place}: the moments of {name!r} are not complete")
        return states
