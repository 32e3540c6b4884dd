"""Evaluation: the outer loss of the model with its gates open and with its gates closed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ttt.adapter import carried, gates_closed
from ttt.config.lora import Adapter
from ttt.config.schema import STAND_IN_WINDOWS, RunConfig
from ttt.inject import Injection
from ttt.plugins import Backbone, Batch, LossOutput, WindowDataset
from ttt.plugins.rows import StepRows, reading_rows
from ttt.state import TTTState
from ttt.train.loading import Loader
from ttt.train.order import once
from ttt.train.passes import mixed_precision, reset_rows, seed_pass, states_to_carry, step_seed


@dataclass(frozen=True)
class Evaluation:
    """Mean losses over all positions of the windows read."""

    split: str
    """`eval`, or `train` if there is no held-out data."""
    windows: int
    loss: float
    loss_gates_closed: float
    available: int = 0
    """How many windows the data has."""
    first_not_finite: tuple[int, ...] = field(default=(), compare=False)
    """Windows of the first batch whose loss was not finite, with open or closed gates."""
    not_finite_pass: tuple[int, StepRows] | None = field(default=None, compare=False)
    """Number and rows of that batch's pass."""
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
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation | None:
    """Read the windows in order, each batch with open and with closed gates and the same random numbers.

    If the loss calls `ttt.plugins.rows.rows_of_step`, the whole evaluation counts as one step: its draws are spread
    over all windows.

    With `persistent_states`, fast weights are carried from window to window of a file, as in training.

    Args:
        model: the model with TTT injected.
        injection: its adapters.
        backbone: computes the loss.
        config: the run's config.
        dataset: the data to read.
        split: `eval`, or `train` if there is no held-out data.
        device: the model's device.
        stop: asked between two batches whether to stop.
        tell: called with the numbers of windows read and to read, before each batch and at the end.

    Returns:
        The evaluation; None if `stop` returned true.
    """
    every = once(dataset.files, batch_size=config.train.batch_size, lanes=config.ttt.persistent_states)
    readings = every[: _batches(config, split)]
    total = sum(len(reading.windows) for reading in readings)
    seed = step_seed(config.train.seed, "eval", 0)
    tally = _Tally()
    states: dict[str, TTTState] = {}
    loader = Loader(
        dataset,
        lambda number: readings[number].windows,
        passes=len(readings),
        device=device,
        workers=config.data.num_workers,
    )
    with eval_mode(model), loader:
        for number, reading in enumerate(readings):
            if stop():
                return None
            tell(tally.windows, total)
            batch = loader.batch(number)
            rows = StepRows(tally.windows, len(reading.windows), total, seed)
            states = reset_rows(injection, _first_rows(states, rows.count), reading.starts)
            losses, states = _both_losses(model, injection, backbone, config, batch, states, rows, number, device)
            tally.add(*losses, reading.windows, (number, rows))
        tell(tally.windows, total)
    available = sum(len(reading.windows) for reading in every)
    return Evaluation(
        split,
        tally.windows,
        *tally.means(),
        available,
        tally.first_not_finite,
        tally.not_finite_pass,
        adapter=config.adapter,
    )


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
    """Sums over the windows read so far."""

    def __init__(self) -> None:
        self.windows = 0
        self.first_not_finite: tuple[int, ...] = ()
        self.not_finite_pass: tuple[int, StepRows] | None = None
        self._tokens = 0
        self._open = self._closed = 0.0

    def add(
        self, output: LossOutput, closed: LossOutput, windows: tuple[int, ...], of_pass: tuple[int, StepRows]
    ) -> None:
        """Add a batch: its loss with open and with closed gates, its windows, and its pass's number and rows."""
        loss, control = float(output.loss), float(closed.loss)
        self._open += loss * output.tokens
        self._closed += control * output.tokens
        if not self.first_not_finite and not math.isfinite(loss + control):
            self.first_not_finite, self.not_finite_pass = windows, of_pass
        self._tokens += output.tokens
        self.windows += len(windows)

    def means(self) -> tuple[float, float]:
        """The mean loss of a position, with open and with closed gates."""
        return self._open / self._tokens, self._closed / self._tokens


def _both_losses(
    model: nn.Module,
    injection: Injection,
    backbone: Backbone,
    config: RunConfig,
    batch: Batch,
    states: dict[str, TTTState],
    rows: StepRows,
    number: int,
    device: torch.device,
) -> tuple[tuple[LossOutput, LossOutput], dict[str, TTTState]]:
    """The loss of a batch with open and with closed gates, with the same random numbers; and the states to carry."""
    seed_pass(config.train.seed, "eval", number)
    with (
        reading_rows(rows),
        carried(injection, states) if config.ttt.persistent_states else contextlib.nullcontext() as carry,
        mixed_precision(config.train, device),
    ):
        output = backbone.loss(model, batch, config)
    if carry is not None:
        states = states_to_carry(carry, injection, backbone=backbone.name)
    seed_pass(config.train.seed, "eval", number)
    with reading_rows(rows), gates_closed(model), mixed_precision(config.train, device):
        closed = backbone.loss(model, batch, config)
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
