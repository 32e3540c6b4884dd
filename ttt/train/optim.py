"""The optimiser of a run, in float32 for parameters of any type: its rates, gradients, and state in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ttt.config.schema import TrainConfig
from ttt.errors import EnvironmentProblem, NonFiniteError
from ttt.parallel.gathering import is_split, split_like
from ttt.parallel.gradients import clip_
from ttt.train.averages import KIND, Averages
from ttt.train.learnable import Learnable, learning_rate_factor
from ttt.train.parts_of_a_step import OPTIMIZER, part_of_step
from ttt.train.updates import Room, Update, updates

_HALF = {torch.bfloat16, torch.float16}
_MASTER = "master"


class Optimizer:
    """`train.optimizer` over learnable parameters, with a float32 master copy of each parameter in half precision.

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
        self._updates = updates(learnable, self._targets, config)
        self._update_of: dict[str, Update] = {name: each for each in self._updates for name in each.targets}
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
        if any(map(is_split, gradients)):
            return clip_(gradients, self._config.max_norm)
        return nn.utils.clip_grad_norm_(self._targets.values(), self._config.max_norm)

    @part_of_step(OPTIMIZER)
    def step(self, step: int) -> dict[str, float]:
        """Update the parameters at optimiser step `step` (from 0) and clear the gradients.

        Returns:
            The learning rates before the multipliers of the groups: `lr`, and `backbone_lr` if the backbone has its own
            schedule.
        """
        peak = self._config.lr
        groups = [group for each in self._updates for group in each.groups]
        for group in groups:
            group["lr"] = peak * learning_rate_factor(step, self._config, group["role"]) * group["multiplier"]
        rates = {"lr": peak * learning_rate_factor(step, self._config)}
        learns = any(group["role"] == "backbone" for group in groups)
        if learns and self._config.backbone_lr_schedule not in (None, self._config.lr_schedule):
            rates["backbone_lr"] = peak * learning_rate_factor(step, self._config, "backbone")
        try:
            for each in self._updates:
                each.step()
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
        state = sum(room.nbytes for name in self._targets for room in self._keeps(name).values())
        masters = sum(target.numel() * 4 for name, target in self._targets.items() if self._has_master(name))
        averages = 0 if self.averages is None else sum(target.numel() * 4 for target in self._targets.values())
        return state + masters + averages

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors: what `train.optimizer` keeps of each parameter, as `exp_avg.NAME`; `master.NAME` of
        masters; and `ema.NAME` of averages.
        """
        averages = {} if self.averages is None else self.averages.tensors()
        state = {f"{KIND}.{name}": average for name, average in averages.items()}
        for name, target in self._targets.items():
            for kind, value in self._update_of[name].state(name).items():
                state[f"{kind}.{name}"] = value
            if self._has_master(name):
                state[f"{_MASTER}.{name}"] = target.detach()
        return state

    def _keeps(self, name: str) -> dict[str, Room]:
        """What is kept of a parameter beside its master and its average, by kind."""
        return self._update_of[name].keeps(name)

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
        return {key: self._room(*key.split(".", 1)) for key in shapes}

    def _room(self, kind: str, name: str) -> Tensor:
        target = self._targets[name].detach()
        room = self._keeps(name).get(kind)
        if room is None or room.shape == target.shape:
            return torch.zeros_like(target, dtype=None if room is None else room.dtype)
        return torch.zeros(room.shape, dtype=room.dtype)

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
                if _MASTER in state:
                    target.copy_(split_like(state.pop(_MASTER), target))
                self._update_of[name].load(name, state)

    def _checked(self, tensors: Mapping[str, Tensor], place: str) -> dict[str, dict[str, Tensor]]:
        """Check that the tensors fit, and return them by parameter and kind."""
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self._targets}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            target = self._targets.get(name)
            if target is None:
                raise EnvironmentProblem(f"{place}: holds {key!r}, which no learnable parameter of this run has")
            room = Room(target.shape, torch.float32) if kind in (_MASTER, KIND) else self._keeps(name).get(kind)
            if room is None:
                raise self._of_another(place, key)
            if kind != "step" and tuple(value.shape) != tuple(room.shape):
                raise EnvironmentProblem(
                    f"{place}: {key!r} has shape {list(value.shape)}, the parameter {list(room.shape)}"
                )
            states[name][kind] = value
        for name in self._targets:
            is_master = self._has_master(name)
            if is_master != (_MASTER in states[name]):
                there = "lacks" if is_master else "holds"
                raise EnvironmentProblem(f"{place}: {there} a float32 copy of {name!r}")
            if (KIND in states[name]) != any(KIND in state for state in states.values()):
                raise EnvironmentProblem(f"{place}: lacks the average of {name!r}, and has those of others")
            kept = self._keeps(name).keys()
            if 0 < len(kept & states[name].keys()) < len(kept):
                raise EnvironmentProblem(f"{place}: the moments of {name!r} are not complete")
        return states

    def _of_another(self, place: str, key: str) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"{place}: holds {key!r}, which train.optimizer: {self._config.optimizer} does not keep; write the "
            f"optimizer with which the checkpoint was trained"
        )
