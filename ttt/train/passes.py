"""What forward passes of training and evaluation share: the batch, the random numbers, the carried states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ttt.adapter import Carry
from ttt.config.schema import TrainConfig
from ttt.errors import InactiveLayerError
from ttt.inject import Injection
from ttt.parallel.world import World
from ttt.plugins import Batch, WindowDataset
from ttt.plugins.rows import StepRows, reading_rows
from ttt.seeds import pass_seed, seed_generators, words_of
from ttt.seeds import seed_pass as seed_pass
from ttt.state import TTTState
from ttt.train.workers import read_window


def training_rows(config: TrainConfig, number: int, rows: slice | None = None) -> StepRows:
    """Which rows of its step training's forward pass `number` (from 0) reads; of the pass, all or some `rows`."""
    step, within = divmod(number, config.num_microbatches)
    size = config.batch_size
    own = range(size)[rows or slice(None)]
    first, total = within * size + own.start, size * config.num_microbatches
    seeds = tuple(pass_seed(config.seed, "train", step * total + place) for place in range(first, first + len(own)))
    return StepRows(first, len(own), total, step_seed(config.seed, "train", step), seeds)


def rows_of_process(world: World, count: int, data_rank: int) -> slice:
    """The rows of a batch of `count` that the processes of a `data_rank` read; see `World.rows`."""
    return replace(world, rank=data_rank * world.tensor).rows(count)


@contextlib.contextmanager
def drawing_for(rows: StepRows) -> Iterator[None]:
    """A context in which a forward pass of these rows draws its random numbers.

    The global generators are seeded with the seed of the first row, so that processes with other rows draw others.
    """
    seed_generators(rows.seeds[0])
    with reading_rows(rows):
        yield


def step_seed(seed: int, purpose: str, step: int) -> int:
    """A seed that all passes of a step share; a function of the run's seed, the purpose and the step."""
    words = words_of(seed, f"rows of {purpose}", step)
    return words[0] << 31 | words[1] >> 1


def mixed_precision(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The autocast of `train.autocast`, for one forward pass; backward runs outside.

    PyTorch's cache of casts is off. With it, a weight that is first used under `no_grad`, as in a reentrant checkpoint,
    may get no gradient. And a checkpointed forward may find a cast in the cache that its recomputation has to make,
    which a checkpoint refuses (github.com/pytorch/pytorch, issues 112583, 158232, 141896 and 193338). Without the cache
    a weight is cast at each use; most are used once in a forward pass.
    """
    if config.autocast == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def load_batch(dataset: WindowDataset, windows: Sequence[int], device: torch.device) -> Batch:
    """Read windows and collate them to a batch on the device."""
    return to_device(read_batch(dataset, windows), device)


def read_batch(dataset: WindowDataset, windows: Sequence[int]) -> Batch:
    """Read windows and collate them to a batch, where the dataset has it."""
    return dataset.collate([read_window(dataset, window) for window in windows])


def describe(dataset: WindowDataset, windows: Sequence[int]) -> str:
    """Name windows as the data names them: the first four, and how many more there are."""
    described = [dataset.describe(window) for window in windows[:4]]
    if len(windows) > 4:
        described.append(f"{len(windows) - 4} windows more")
    return "; ".join(described)


def to_device(batch: Any, device: torch.device) -> Any:
    """Nested tuples, lists and dicts, with every tensor moved to the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def reset_rows(injection: Injection, states: Mapping[str, TTTState], starts: Sequence[bool]) -> dict[str, TTTState]:
    """The states, with a fresh state in every row that starts a file; no states if every row does.

    A fresh row is the layer's own initial weights, so the gradient reaches them.
    """
    if not states or all(starts):
        return {}
    if not any(starts):
        return dict(states)
    reset = {}
    for name, state in states.items():
        mask = torch.tensor(starts).to(state.weights[0].device, non_blocking=True)  # not waiting for the device
        reset[name] = injection.adapters[name].layer.reset(state, mask)  # type: ignore[union-attr, operator]
    return reset


def fresh_rows(
    states: Mapping[str, TTTState], starts: Sequence[bool], world: World, device: torch.device
) -> tuple[dict[str, TTTState], Tensor | None]:
    """What a forward pass starts from: states, and which of this process's rows `[B]` start fresh all the same.

    A fresh row is the layer's own initial weights, so the gradient reaches them. What is given depends on `starts` of
    all rows alone: processes use the same parameters, and have states of the same kind.

    Args:
        states: of this process's rows.
        starts: which of all rows start a file.
        world: the processes.
        device: of the mask.
    """
    if not states or all(starts):
        return {}, None
    if not any(starts):
        return dict(states), None
    own = starts[world.rows(len(starts))]
    return dict(states), torch.tensor(own).to(device, non_blocking=True)  # not waiting for the device


def states_to_carry(carry: Carry, injection: Injection, *, backbone: str) -> dict[str, TTTState]:
    """The states of every adapter after a forward pass under `carried`.

    Raises:
        InactiveLayerError: an adapter returned no state, so that `persistent_states` would do nothing there.
    """
    states = carry.states
    for name in injection.adapters:
        if name not in states:
            raise InactiveLayerError(
                f"{name}: ttt.persistent_states: true, but the forward pass hands no state of this TTT layer on to the "
                f"next window: the backbone {backbone} does not call the adapter there, or not by its forward, as "
                f"self.ttt(x); write persistent_states: false, or tell who made the plugin"
            )
    return states
