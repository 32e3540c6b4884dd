"""The content of a checkpoint: the adapter, trained backbone parameters, the optimiser, carried states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt.adapter_file import BackboneWeights, save_adapter
from ttt.errors import EnvironmentProblem
from ttt.files import read_tensors, write_tensors
from ttt.inject import Injection
from ttt.parallel.gathering import on_first, rows_on_first
from ttt.parallel.heads import whole_states
from ttt.parallel.world import World
from ttt.state import TTTState
from ttt.train.averages import KIND
from ttt.train.optim import Optimizer
from ttt.train.shards import read_shards, shard_files

OPTIMIZER = "optimizer.safetensors"
CARRIED = "carried_states.safetensors"


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Content:
    """The tensors of a checkpoint, whole; on all processes but the first there are none."""

    adapters: Mapping[str, Tensor]
    """Those of the adapters, LoRA included."""
    trained: Mapping[str, Tensor]
    """Backbone parameters by name that differ from what the backbone was built with, because they learn in this run or
    learned before it; they are written beside the adapter."""
    optimizer: Mapping[str, Tensor] | None
    """The optimiser's state; None if several processes write it, each its part (`ttt.train.shards`)."""
    averages: Mapping[str, Tensor]
    """Averages of what learns, if the run keeps any, by their names in the optimiser's state."""
    states: Mapping[str, Tensor] | None
    """Carried states of every row by `site/name`, if the run carries any."""

    @classmethod
    def gathered(
        cls,
        injection: Injection,
        trained: Mapping[str, Tensor],
        optimizer: Optimizer,
        states: Mapping[str, TTTState] | None,
        world: World,
    ) -> Content:
        """Put together what the processes have; all of them call it."""
        averages = {name: value for name, value in optimizer.tensors().items() if name.startswith(f"{KIND}.")}
        found = whole_states(states or {}, world)
        named = {f"{site}/{name}": tensor for site in found for name, tensor in found[site].tensors().items()}
        return cls(
            on_first({name: optimizer.as_used(name, value) for name, value in injection.state_dict().items()}, world),
            on_first(trained, world),
            optimizer.tensors() if world.alone else None,
            on_first(averages, world),
            None if states is None else rows_on_first(named, world),
        )

    def copied(self) -> Content:
        """The same in the CPU's memory, so that the run may change what it was made of."""
        return Content(
            _copied(self.adapters),
            _copied(self.trained),
            None if self.optimizer is None else _copied(self.optimizer),
            _copied(self.averages),
            None if self.states is None else _copied(self.states),
        )


def write_content(
    folder: Path,
    injection: Injection,
    content: Content,
    *,
    backbone: Mapping[str, Any],
    training: Mapping[str, Any],
    weights: BackboneWeights | None = None,
) -> None:
    """Write everything but `trainer_state.json` into a folder.

    Args:
        folder: an existing folder.
        injection: the adapters.
        content: the tensors to write.
        backbone: name and options, for the adapter file.
        training: a record of the training, for the adapter file.
        weights: by what the backbone is known again, if it cannot be looked at.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written.
    """
    save_adapter(
        folder,
        injection,
        backbone=backbone,
        backbone_tensors=content.trained,
        training=training,
        tensors=content.adapters,
        weights=weights,
    )
    if content.optimizer is not None:
        write_tensors(folder / OPTIMIZER, content.optimizer, {"format": "ttt-optimizer"})
    if content.states is not None:
        write_tensors(folder / CARRIED, content.states, {"format": "ttt-states"})


def read_content(
    folder: Path,
    optimizer: Optimizer,
    *,
    persistent: bool,
    device: torch.device,
    rows: slice = slice(None),
    verify: bool = True,
) -> dict[str, TTTState]:
    """Load what `write_content` wrote besides the adapter and the trained parameters; returns the carried states.

    Args:
        folder: the checkpoint's folder.
        optimizer: the optimiser to load into.
        persistent: whether the run carries states.
        device: device of the carried states.
        rows: which rows of them to take.
        verify: compare the files with their checksums; false if that is already done.

    Raises:
        EnvironmentProblem: a file is damaged.
    """
    if shard_files(folder):
        of_optimizer = read_shards(folder, lambda shapes: optimizer.room_for(shapes, place=str(folder)))
        optimizer.load(of_optimizer, place=str(folder))
    else:
        optimizer.load(read_tensors(folder / OPTIMIZER, verify=verify), place=str(folder / OPTIMIZER))
    return _read_states(folder / CARRIED, device, rows, verify=verify) if persistent else {}


def content_bytes(injection: Injection, trained: Mapping[str, Tensor], optimizer: Optimizer) -> int:
    """About how many bytes `write_content` writes."""
    kept = [*trained.values(), *injection.state_dict().values()]
    adapters = 1 if optimizer.averages is None else 2
    return optimizer.nbytes() + adapters * sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _read_states(path: Path, device: torch.device, rows: slice, *, verify: bool) -> dict[str, TTTState]:
    by_site: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(path, device=device, verify=verify).items():
        site, _, name = key.rpartition("/")
        by_site.setdefault(site, {})[name] = tensor[rows]
    try:
        return {site: TTTState.from_tensors(tensors) for site, tensors in by_site.items()}
    except ValueError as error:
        raise EnvironmentProblem(f"{path}: {error}") from None
