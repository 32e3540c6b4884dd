"""The optimisers of libraries behind `train.optimizer`: which parameters each updates, and what it keeps of them.

    adamw        torch.optim.AdamW for everything
    adamw_8bit   bitsandbytes.optim.AdamW8bit for everything: moments of 8 bits, of small tensors 32
    muon         torch.optim.Muon for the matrices of layers, torch.optim.AdamW for the rest

Muon orthogonalises the momentum of a whole matrix, so `torch.optim.Muon` takes parameters of two dimensions only. The
fast weights `W1 [H, in, out]` are a matrix for each head, which its tokens alone go through. So each head's matrix is
given to Muon as a parameter of its own, a view of the stack; a stack seen as one matrix would mix the heads. Muon is
for what a layer multiplies with: norms, biases, gates, learned rates, embeddings and what is outside the backbone's
layers, such as its heads, are AdamW's.

Muon's rate is scaled by 0.2·√max(rows, columns) ("match_rms_adamw", arXiv 2502.16982), so that an update is about as
large as one of AdamW, and `train.lr`, its multipliers and `weight_decay` mean the same for both. Its momentum is the
first of `train.betas`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttt.config.schema import TrainConfig
from ttt.costs import BLOCK_8BIT, SMALL_8BIT
from ttt.parallel.gathering import is_split, own_part, part_of_one_like, placed_like, split_like
from ttt.train.learnable import MULTIPLIERS, Learnable, Role


class Room(NamedTuple):
    """What a tensor of an optimiser's state is like."""

    shape: tuple[int, ...]
    """Its whole shape."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Update(abc.ABC):
    """A library's optimiser over some of a run's parameters, in groups of one role and decay.

    Args:
        entries: the parameters that it updates.
        targets: what is updated of each, by name: the parameter, or its float32 master.
        config: the `train` section.
    """

    def __init__(self, entries: Sequence[Learnable], targets: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self.targets = {entry.name: targets[entry.name] for entry in entries}
        self._made = self._make(self._groups(entries, config), config)

    @abc.abstractmethod
    def _make(self, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
        """The library's optimiser of these groups."""

    @abc.abstractmethod
    def keeps(self, name: str) -> dict[str, Room]:
        """What is kept of a parameter after its first step, by kind."""

    @abc.abstractmethod
    def state(self, name: str) -> dict[str, Tensor]:
        """What is kept of a parameter now, by kind; nothing before its first step."""

    @abc.abstractmethod
    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned; each is copied."""

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups; set `lr` of each to the rate of its `role` times its `multiplier` before a step."""
        return self._made.param_groups

    def step(self) -> None:
        """Update the parameters that have a gradient."""
        self._made.step()

    def _updated(self, name: str) -> Iterable[nn.Parameter]:
        """The parameters that the library is given for one of the run."""
        return (self.targets[name],)

    def _groups(self, entries: Iterable[Learnable], config: TrainConfig) -> list[dict[str, Any]]:
        groups: dict[tuple[Role, bool], list[nn.Parameter]] = {}
        for entry in entries:
            groups.setdefault((entry.role, entry.decays), []).extend(self._updated(entry.name))
        return [
            {
                "params": parameters,
                "role": role,
                "multiplier": getattr(config, MULTIPLIERS[role]),
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (role, decays), parameters in groups.items()
        ]


class _AdamW(Update):
    """`torch.optim.AdamW`. Its moments are split among processes as the parameters are.

    It updates each number by itself, so of a split parameter it is given this process's part as a tensor of its own.
    PyTorch would do the same, but plan how to split each of AdamW's operations anew for each shape.
    """

    def __init__(self, entries: Sequence[Learnable], targets: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self._parts = {entry.name: _own_parameter(targets[entry.name]) for entry in entries}
        super().__init__(entries, targets, config)

    def _updated(self, name: str) -> Iterable[nn.Parameter]:
        return (self._parts[name],)

    def step(self) -> None:
        """Update the parameters that have a gradient."""
        split = {name: part for name, part in self._parts.items() if part is not self.targets[name]}
        for name, part in split.items():
            target = self.targets[name]
            part.data = own_part(target.detach())  # where it is now
            part.grad = None if target.grad is None else own_part(placed_like(target.grad, target))
        super().step()
        for part in split.values():
            part.grad = None

    def _make(self, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)

    def keeps(self, name: str) -> dict[str, Room]:
        target = self.targets[name]
        moment = Room(target.shape, target.dtype)
        return {"step": Room((), torch.float32), "exp_avg": moment, "exp_avg_sq": moment}

    def state(self, name: str) -> dict[str, Tensor]:
        held = self._made.state.get(self._parts[name], {})
        target = self.targets[name]
        return {kind: value if kind == "step" else part_of_one_like(value, target) for kind, value in held.items()}

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        target = self.targets[name]
        self._made.state[self._parts[name]] = {
            # the step count stays on the CPU, where AdamW itself keeps it
            key: value.clone() if key == "step" else own_part(split_like(value.to(target.device, copy=True), target))
            for key, value in state.items()
        }


def _own_parameter(target: nn.Parameter) -> nn.Parameter:
    """This process's part of a split parameter, in the same memory; a whole one itself."""
    part = own_part(target.detach())
    return nn.Parameter(part) if is_split(target) else target


class _AdamW8bit(Update):
    """`bitsandbytes.optim.AdamW8bit`, which runs on a GPU alone.

    Of a parameter of 4096 numbers or more it keeps two moments of one byte each, and their scales, one for each 256
    numbers; of a smaller one two float32 moments.
    """

    def _make(self, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit

        made: torch.optim.Optimizer = AdamW8bit(groups, lr=config.lr, betas=config.betas, min_8bit_size=SMALL_8BIT)
        return made

    def keeps(self, name: str) -> dict[str, Room]:
        target = self.targets[name]
        step, scales = Room((), torch.float32), Room((-(-target.numel() // BLOCK_8BIT),), torch.float32)
        if target.numel() < SMALL_8BIT:
            moment = Room(target.shape, torch.float32)
            return {"step": step, "state1": moment, "state2": moment}
        moment = Room(target.shape, torch.uint8)
        return {"step": step, "state1": moment, "state2": moment, "absmax1": scales, "absmax2": scales}

    def state(self, name: str) -> dict[str, Tensor]:
        held = self._made.state.get(self.targets[name])
        if not held:
            return {}
        return {kind: torch.tensor(float(held[kind])) if kind == "step" else held[kind] for kind in self.keeps(name)}

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        target, made = self.targets[name], self._made
        if not state:
            made.state.pop(target, None)
            return
        held: dict[str, Any] = {key: value.to(target.device, copy=True) for key, value in state.items()}
        held["step"] = int(state["step"])
        if "absmax1" in held:  # what a byte stands for is the library's own, and the same for all tensors
            maps = made.name2qmap  # type: ignore[attr-defined]
            for key, kind in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
                held[key] = maps[kind] = maps[kind].to(target.device)
        made.state[target] = held


class _Muon(Update):
    """`torch.optim.Muon` over matrices, and over each matrix of stacks `[N, in, out]`; it keeps their momentum."""

    def __init__(self, entries: Sequence[Learnable], targets: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self._matrices = {entry.name: _matrices(targets[entry.name]) for entry in entries}
        self._momenta: dict[str, Tensor] = {}
        super().__init__(entries, targets, config)

    def _updated(self, name: str) -> Iterable[nn.Parameter]:
        return self._matrices[name]

    def _make(self, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.Muon(groups, lr=config.lr, momentum=config.betas[0], adjust_lr_fn="match_rms_adamw")

    def step(self) -> None:
        """Update the matrices that have a gradient: those of a stack see their part of its gradient and momentum."""
        for name, target in self.targets.items():
            if target.grad is None:
                continue
            momentum = self._momenta.setdefault(name, torch.zeros_like(target.detach()))
            for number, matrix in enumerate(self._matrices[name]):
                matrix.grad = _part(target.grad, number)
                self._made.state[matrix] = {"momentum_buffer": _part(momentum, number)}
        super().step()
        for name, target in self.targets.items():
            if target.dim() > 2:
                for matrix in self._matrices[name]:
                    matrix.grad = None

    def keeps(self, name: str) -> dict[str, Room]:
        target = self.targets[name]
        return {"momentum_buffer": Room(target.shape, target.dtype)}

    def state(self, name: str) -> dict[str, Tensor]:
        return {"momentum_buffer": self._momenta[name]} if name in self._momenta else {}

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        self._momenta.pop(name, None)
        for momentum in state.values():
            self._momenta[name] = momentum.to(self.targets[name].device, copy=True)


def _matrices(target: nn.Parameter) -> list[nn.Parameter]:
    """The matrices of a parameter: itself, or those of a stack as views of it."""
    return [target] if target.dim() == 2 else [nn.Parameter(matrix) for matrix in target.detach()]


def _part(stack: Tensor, number: int) -> Tensor:
    return stack if stack.dim() == 2 else stack[number]


def updates(
    learnable: Sequence[Learnable], targets: Mapping[str, nn.Parameter], config: TrainConfig
) -> tuple[Update, ...]:
    """The optimisers of `train.optimizer`; each parameter is updated by one of them."""
    if config.optimizer == "adamw_8bit":
        return (_AdamW8bit(learnable, targets, config),)
    if config.optimizer == "adamw":
        return (_AdamW(learnable, targets, config),)
    of_muon = [entry for entry in learnable if entry.is_matrix]
    rest = [entry for entry in learnable if not entry.is_matrix]
    made: list[tuple[Callable[..., Update], list[Learnable]]] = [(_Muon, of_muon), (_AdamW, rest)]
    return tuple(make(entries, targets, config) for make, entries in made if entries)
