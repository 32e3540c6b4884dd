"""Evaluation: the outer loss of the model with its gates open and with its gates closed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapter import carried, gates_closed
from ttt.config.lora import Adapter
from ttt.config.schema import STAND_IN_WINDOWS, RunConfig
from ttt.inject import Injection
from ttt.parallel.world import World
from ttt.plugins import Backbone, Batch, LossOutput, WindowDataset
from ttt.plugins.rows import StepRows
from ttt.seeds import pass_seed
from ttt.state import TTTState
from ttt.train.host_copy import HostCopy
from ttt.train.loading import Loader
from ttt.train.means import means_of, weights_of
from ttt.train.order import Reading, once
from ttt.train.passes import drawing_for, fresh_rows, mixed_precision, states_to_carry, step_seed, to_device


@dataclass(frozen=True)
class Evaluation:
    """Mean losses over all windows read, as of a single batch of them all."""

    split: str
    """`eval`, or `train` if there is no held-out data."""
    windows: int
    loss: float
    loss_gates_closed: float
    available: int = 0
    """How many windows the data has."""
    first_not_finite: tuple[int, ...] = field(default=(), compare=False)
    """Windows of the first pass whose loss was not finite, with open or closed gates."""
    not_finite_pass: StepRows | None = field(default=None, compare=False)
    """Rows of that pass."""
    tasks: Mapping[str, float] = field(default_factory=dict)
    """The numbers of `eval.tasks` by `task/metric`; a task that failed has none."""
    adapter: Adapter = "ttt"
    """What the plain backbone is compared with."""
    loss_ema: float | None = None
    """The loss with averaged weights; None if the run keeps no averages."""

    @property
    def is_finite(self) -> bool:
        """Whether both losses are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.loss_gates_closed)

    def as_line(self) -> dict[str, Any]:
        """The evaluation's entries in `metrics.jsonl`."""
        return {
            "eval_split": self.split,
            "eval_windows": self.windows,
            "eval_windows_available": self.available,
            "eval_loss": self.loss,
            "eval_loss_gates_closed": self.loss_gates_closed,
            **({} if self.loss_ema is None else {"eval_loss_ema": self.loss_ema}),
            **self.tasks,
        }

    def tasks_in_words(self) -> list[str]:
        """A line for each task, with its numbers."""
        by_task: dict[str, list[str]] = {}
        for key, number in self.tasks.items():
            task, _, metric = key.partition("/")
            by_task.setdefault(task, []).append(f"{metric} {number:.5g}")
        return [f"{task}: {', '.join(numbers)}" for task, numbers in by_task.items()]

    def in_words(self) -> str:
        """A sentence with both losses."""
        count = f"{self.windows:,}" if self.windows >= self.available else f"{self.windows:,} of {self.available:,}"
        where = (
            f"{count} held-out windows"
            if self.split == "eval"
            else f"{count} training windows (there is no held-out data)"
        )
        change = (self.loss - self.loss_gates_closed) / self.loss_gates_closed if self.loss_gates_closed else math.nan
        if not math.isfinite(change):
            effect = "cannot be compared"
        elif change == 0:
            effect = "makes no difference"
        else:
            effect = f"{'lowers' if change < 0 else 'RAISES'} it by {abs(change):.2%}"
        closed, added = _IN_WORDS[self.adapter]
        averaged = "" if self.loss_ema is None else f"with averaged weights {self.loss_ema:.4f}; "
        return (
            f"outer loss on {where}: {self.loss:.4f}; {averaged}{closed} {self.loss_gates_closed:.4f}: {added} {effect}"
        )


_IN_WORDS: Mapping[Adapter, tuple[str, str]] = {
    "ttt": ("with the gates closed", "TTT"),
    "lora": ("with LoRA off", "LoRA"),
    "ttt+lora": ("with the gates closed and LoRA off", "TTT with LoRA"),
}
"""How the plain backbone is reached, and what it is compared with."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    injection: Injection,
    backbone: Backbone,
    config: RunConfig,
    dataset: WindowDataset,
    *,
    split: str,
    device: torch.device,
    world: World | None = None,
    loss: Callable[[Batch], LossOutput] | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation | None:
    """Read the windows in order, each batch with open and with closed gates and the same random numbers.

    The whole evaluation counts as one step of `ttt.plugins.rows.rows_of_step`: draws are spread over all windows, and
    those of a window are its own.

    With `persistent_states`, fast weights are carried from window to window of a file, as in training.

    Several processes share the rows of each batch, and all return the same. One that has no row left reads one of the
    others' and forgets it, since all must run the same forward passes.

    Args:
        model: the model with TTT injected.
        injection: its adapters.
        backbone: computes the loss.
        config: the run's config.
        dataset: the data to read.
        split: `eval`, or `train` if there is no held-out data.
        device: the model's device.
        world: the processes that evaluate together; None is this one alone.
        loss: of a batch, where that is more than the backbone's of the model.
        stop: asked between two batches whether to stop; every process must get the same answer.
        tell: called with the numbers of windows read and to read, before each batch and at the end.

    Returns:
        The evaluation; None if `stop` returned true.
    """
    world = world or World()
    loss = loss or (lambda batch: backbone.loss(model, batch, config))
    every = once(dataset.files, batch_size=config.train.batch_size, lanes=config.ttt.persistent_states)
    readings = every[: _batches(config, split)]
    total = sum(len(reading.windows) for reading in readings)
    tally = _Tally(backbone, world)
    states: dict[str, TTTState] = {}
    parts = _parts_of(readings, world, config.train.seed)
    own = parts[world.data_rank]
    loader = Loader(
        dataset,
        lambda number: own[number].reading.windows,
        passes=len(own),
        device=device,
        workers=config.data.num_workers,
    )
    with eval_mode(model), loader:
        for number, part in enumerate(own):
            if stop():
                return None
            tell(part.before, total)
            batch = loader.read(number)
            weights = weights_of(backbone, config, batch, device)
            batch = to_device(batch, device)
            start = fresh_rows(_first_rows(states, part.rows.count), part.reading.starts, World(), device)
            losses, states = _both_losses(model, injection, backbone, config, batch, loss, start, part.rows, device)
            tally.add(*losses, weights, counts=part.counts)
        tell(total, total)
    return tally.evaluation(
        split, parts, windows=total, available=sum(len(reading.windows) for reading in every), adapter=config.adapter
    )


@dataclass(frozen=True)
class _Part:
    """What one process reads of a batch."""

    reading: Reading
    rows: StepRows
    before: int
    """Windows that all processes have read before the batch."""
    counts: bool
    """Whether the rows are this process's own, and not some that it reads only to keep step."""


def _parts_of(readings: Sequence[Reading], world: World, seed: int) -> list[list[_Part]]:
    """The parts of each process, one for each batch.

    A process keeps its rows from batch to batch, so that it has the fast weights that they carry; rows leave a batch at
    its end.
    """
    total, of_step = sum(len(reading.windows) for reading in readings), step_seed(seed, "eval", 0)
    share = -(-max(len(reading.windows) for reading in readings) // world.data_size)
    found: list[list[_Part]] = [[] for _ in range(world.data_size)]
    before = 0
    for reading in readings:
        count = len(reading.windows)
        for data_rank, parts in enumerate(found):
            own = range(count)[data_rank * share : (data_rank + 1) * share]
            rows = own or range(1)
            part = reading.part(slice(rows.start, rows.stop))
            seeds = tuple(pass_seed(seed, "eval", window) for window in part.windows)
            of_rows = StepRows(before + rows.start, len(rows), total, of_step, seeds)
            parts.append(_Part(part, of_rows, before, counts=bool(own)))
        before += count
    return found


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Tally:
    """Sums over what this process has read so far, on the device; nothing is read on the host before the end."""

    def __init__(self, backbone: Backbone, world: World) -> None:
        self._backbone = backbone
        self._world = world
        self._sums: list[Tensor] = []
        """Of each pass: weights, and means times weights with open and with closed gates, `[3,K]`."""
        self._not_finite: list[Tensor] = []
        """Of each pass: 1 if one of both losses was not finite."""

    def add(self, output: LossOutput, closed: LossOutput, weights: Tensor, *, counts: bool) -> None:
        """Add a pass: its loss with open and with closed gates, and its weights; nothing of it if it does not count."""
        means = [means_of(each, weights, self._backbone).to(torch.float64) for each in (output, closed)]
        sums = torch.stack((weights, means[0] * weights, means[1] * weights))
        bad = ~(output.loss + closed.loss).isfinite()
        self._sums.append(sums if counts else torch.zeros_like(sums))
        self._not_finite.append(bad.to(torch.float64) if counts else torch.zeros_like(bad, dtype=torch.float64))

    def evaluation(
        self, split: str, parts: Sequence[Sequence[_Part]], *, windows: int, available: int, adapter: Adapter
    ) -> Evaluation:
        """What all processes have found; waits for the device, once."""
        world, passes = self._world, len(self._sums)
        bad = torch.stack(self._not_finite)
        grid = bad.new_zeros(world.data_size, passes)
        grid[world.data_rank] = bad
        sums = torch.stack(self._sums).sum(0)
        numbers = HostCopy(world.sum(torch.cat((grid.flatten(), sums.flatten())))).numbers()
        weights, opened, closed = torch.tensor(numbers[grid.numel() :], dtype=torch.float64).view_as(sums).unbind()
        totals = torch.where(weights > 0, weights, 1)
        places = [(number, rank) for number in range(passes) for rank in range(world.data_size)]
        first = next((parts[rank][number] for number, rank in places if numbers[rank * passes + number]), None)
        return Evaluation(
            split,
            windows,
            float((opened / totals).sum()),
            float((closed / totals).sum()),
            available,
            () if first is None else first.reading.windows,
            None if first is None else first.rows,
            adapter=adapter,
        )


def _both_losses(
    model: nn.Module,
    injection: Injection,
    backbone: Backbone,
    config: RunConfig,
    batch: Batch,
    loss: Callable[[Batch], LossOutput],
    start: tuple[dict[str, TTTState], Tensor | None],
    rows: StepRows,
    device: torch.device,
) -> tuple[tuple[LossOutput, LossOutput], dict[str, TTTState]]:
    """The loss of a batch with open and with closed gates, with the same random numbers; and the states to carry."""
    states, fresh = start
    with (
        drawing_for(rows),
        carried(injection, states, fresh=fresh) if config.ttt.persistent_states else contextlib.nullcontext() as carry,
        mixed_precision(config.train, device),
    ):
        output = loss(batch)
    if carry is not None:
        states = states_to_carry(carry, injection, backbone=backbone.name)
    with drawing_for(rows), gates_closed(model), mixed_precision(config.train, device):
        closed = loss(batch)
    return (output, closed), states


def _batches(config: RunConfig, split: str) -> int | None:
    """How many batches to read; None for all."""
    if config.eval.max_batches is not None or split == "eval":
        return config.eval.max_batches
    return -(-STAND_IN_WINDOWS // config.train.batch_size)


def _first_rows(states: dict[str, TTTState], rows: int) -> dict[str, TTTState]:
    """The states of the first `rows` rows; the lanes of the others have no windows left."""
    return {
        name: TTTState.from_tensors({key: tensor[:rows] for key, tensor in state.tensors().items()})
        for name, state in states.items()
    }
