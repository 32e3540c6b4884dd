"""The content of a checkpoint: the adapter, trained backbone parameters, the optimiser, carried states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt.adapter_file import load_adapter, save_adapter
from ttt.errors import EnvironmentProblem
from ttt.files import read_tensors, write_tensors
from ttt.inject import Injection
from ttt.state import TTTState
from ttt.train.optim import Optimizer

OPTIMIZER = "optimizer.safetensors"
CARRIED = "carried_states.safetensors"


def write_content(
    folder: Path,
    injection: Injection,
    trained: Mapping[str, Tensor],
    optimizer: Optimizer,
    states: Mapping[str, TTTState] | None,
    *,
    backbone: Mapping[str, Any],
    training: Mapping[str, Any],
) -> None:
    """Write everything but `trainer_state.json` into a folder.

    Args:
        folder: an existing folder.
        injection: the adapters.
        trained: backbone parameters by name that differ from what the backbone was built with, because they learn in
            this run or learned before it; they are written beside the adapter.
        optimizer: its state is written.
        states: carried states by site, if the run carries any.
        backbone: name and options, for the adapter file.
        training: a record of the training, for the adapter file.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written.
    """
    save_adapter(
        folder,
        injection,
        backbone=backbone,
        backbone_tensors=trained,
        training=training,
    )
    write_tensors(folder / OPTIMIZER, optimizer.tensors(), {"format": "ttt-optimizer"})
    if states is not None:
        named = {f"{site}/{name}": tensor for site in states for name, tensor in states[site].tensors().items()}
        write_tensors(folder / CARRIED, named, {"format": "ttt-states"})


def read_content(
    folder: Path,
    injection: Injection,
    optimizer: Optimizer,
    *,
    backbone: Mapping[str, Any],
    persistent: bool,
    device: torch.device,
    verify: bool = True,
) -> dict[str, TTTState]:
    """Load everything that `write_content` wrote; returns the carried states.

    Args:
        folder: the checkpoint's folder.
        injection: the adapters to load into.
        optimizer: the optimiser to load into.
        backbone: name and options.
        persistent: whether the run carries states.
        device: device of the carried states.
        verify: compare the files with their checksums; false if that is already done.

    Raises:
        AdapterMismatchError: the run was started with another backbone.
        EnvironmentProblem: a file is damaged.
    """
    load_adapter(folder, injection.model, injection=injection, backbone=backbone, verify=verify)
    optimizer.load(read_tensors(folder / OPTIMIZER, verify=verify), place=str(folder / OPTIMIZER))
    return _read_states(folder / CARRIED, device, verify=verify) if persistent else {}


def content_bytes(injection: Injection, trained: Mapping[str, Tensor], optimizer: Optimizer) -> int:
    """About how many bytes `write_content` writes."""
    kept = [*trained.values(), *injection.state_dict().values()]
    adapters = 1 if optimizer.averages is None else 2
    return optimizer.nbytes() + adapters * sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _read_states(path: Path, device: torch.device, *, verify: bool) -> dict[str, TTTState]:
    by_site: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(path, device=device, verify=verify).items():
        site, _, name = key.rpartition("/")
        by_site.setdefault(site, {})[name] = tensor
    try:
        return {site: TTTState.from_tensors(tensors) for site, tensors in by_site.items()}
    except ValueError as error:
        raise EnvironmentProblem(f"{path}: {error}") from None
