"""One optimiser step: forward and backward over its batches, the update, and its metrics.

Between the first forward pass and the update, the host reads nothing from the device but one tensor with all numbers of
the step, once (`ttt.train.host_copy`). So losses and gradients that are not finite are found when every pass is done.

Of several processes each reads its rows of every pass. The numbers are of all rows, and every process has all of them,
so that all go on or all stop.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttt.adapter import carried
from ttt.evidence import Observation
from ttt.parallel.gradients import make_equal_
from ttt.parallel.world import World
from ttt.plugins import Batch
from ttt.state import TTTState
from ttt.train.active import require_active, require_gradient, require_reached
from ttt.train.divergence import StepNotFiniteError
from ttt.train.host_copy import HostCopy
from ttt.train.loading import Loader
from ttt.train.lora import mean_share
from ttt.train.means import Share, added, even_shares, means_of, shares, weighs_rows
from ttt.train.metrics import finite
from ttt.train.order import Reading
from ttt.train.parts import Parts
from ttt.train.parts_of_a_step import BACKWARD, FORWARD, NUMBERS, part_of_step
from ttt.train.passes import (
    describe,
    drawing_for,
    fresh_rows,
    load_batch,
    mixed_precision,
    reset_rows,
    rows_of_process,
    states_to_carry,
    to_device,
    training_rows,
)
from ttt.train.progress import Progress
from ttt.train.setup import peak_memory_bytes


@dataclass(frozen=True)
class _Pass:
    """A forward and backward pass over this process's rows; its numbers are still on the device."""

    number: int
    states: Mapping[str, TTTState]
    """The carried fast weights before it."""
    after: Mapping[str, TTTState]
    """Those after it."""
    loss: Tensor
    """The batch's own loss."""
    share: Tensor
    """What it adds to the step's loss."""
    tokens: int
    """Positions that the pass read."""
    metrics: Mapping[str, Tensor]
    """What it adds to the step's metrics."""


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a step, on the host."""

    loss: float
    norm: float
    metrics: Mapping[str, float]
    tokens: int
    losses: Sequence[Sequence[float]]
    """Of each pass, of each process's rows in it."""


class Stepper:
    """Makes the optimiser steps of a run, one at a time."""

    def __init__(self, parts: Parts, progress: Progress, loader: Loader) -> None:
        self._parts = parts
        self._progress = progress
        self._loader = loader
        self.updating = False
        """Whether the optimiser is changing the weights; if an error occurs then, they may be half updated."""

    def advance(self) -> None:
        """Make the next step. Progress changes only when the step is done.

        Raises:
            StepNotFiniteError: a loss or the gradient is not finite; the weights are those before the step.
            InactiveLayerError: it is the first step, and a TTT layer does not act.
        """
        parts, progress = self._parts, self._progress
        started = time.monotonic()
        parts.model.train()
        evidence = Observation(parts.injection) if self._measures(progress.done + 1) else None
        passes, states = self._passes(evidence)
        make_equal_((gradient for _, gradient in parts.optimizer.gradients() if gradient is not None), parts.world)
        numbers = _read(passes, parts.optimizer.clip(), parts.world)
        self._require_finite(passes, numbers)
        if progress.done == 0 and evidence:
            require_active(evidence.layers(self._mean_of_processes), parts)
        rates = self._update()
        seconds = time.monotonic() - started
        line = self._line(numbers, rates, tokens_per_second=numbers.tokens / max(seconds, 1e-9), evidence=evidence)
        progress.seconds += seconds
        progress.tokens += numbers.tokens
        progress.states = states
        progress.line = line
        progress.done += 1

    def _measures(self, step: int) -> bool:
        """Whether to measure evidence in a step (from 1)."""
        train = self._parts.config.train
        return step % train.evidence_freq == 0 or step in (1, train.max_steps)

    def _passes(self, evidence: Observation | None) -> tuple[list[_Pass], dict[str, TTTState]]:
        """Run every forward and backward pass of the step; also returns the states to carry on from it."""
        parts, count = self._parts, self._parts.config.train.num_microbatches
        numbers = range(self._progress.done * count, (self._progress.done + 1) * count)
        own = self._parts.world.rows(self._parts.config.train.batch_size)
        readings = [self._parts.order.at(number).part(own) for number in numbers]
        states = self._progress.states
        passes: list[_Pass] = []
        for number, reading, (batch, share) in zip(numbers, readings, self._batches(numbers), strict=True):
            watched = evidence if not passes else None
            with watched or contextlib.nullcontext(), parts.engine.backward(last=len(passes) == count - 1):
                done, states = self._pass(number, reading, batch, share, states, watched)
            passes.append(done)
        return passes, states

    def _batches(self, numbers: Sequence[int]) -> Iterator[tuple[Batch, Share]]:
        """The batch of each pass, and what it is of the step.

        If rows do not count alike, all are read before the first is used: only then is known how much each weighs.
        """
        parts = self._parts
        if weighs_rows(parts.backbone):
            of_step = even_shares(len(numbers), parts.world, parts.device)
            for number, share in zip(numbers, of_step, strict=True):
                yield self._loader.batch(number), share
            return
        batches = [self._loader.read(number) for number in numbers]
        of_step = shares(parts.backbone, parts.config, batches, parts.world, parts.device)
        for batch, share in zip(batches, of_step, strict=True):
            yield to_device(batch, parts.device), share

    def _pass(
        self,
        number: int,
        reading: Reading,
        batch: Batch,
        share: Share,
        carried_in: Mapping[str, TTTState],
        evidence: Observation | None,
    ) -> tuple[_Pass, dict[str, TTTState]]:
        """Run forward and backward over one batch; also returns the states to carry."""
        parts, config = self._parts, self._parts.config
        # from the starts of all rows: every process resets rows, or none does
        states, fresh = fresh_rows(carried_in, parts.order.at(number).starts, parts.world, parts.device)
        rows = training_rows(config.train, number, parts.world.rows(config.train.batch_size))
        carried_on, carrying = dict(carried_in), config.ttt.persistent_states
        # a recomputation reads the states too, so backward runs inside this context
        with carried(parts.injection, states, fresh=fresh) if carrying else contextlib.nullcontext() as carry:
            with mixed_precision(config.train, parts.device), drawing_for(rows), part_of_step(FORWARD):
                output = parts.engine.loss(batch)
            if evidence and self._progress.done == 0:
                require_reached(evidence, parts)
            require_gradient(output, parts.backbone)
            if self._progress.done == 0:  # one pass alone needs no weights, but the first evaluation will
                means_of(output, parts.backbone.loss_weights(batch, config), parts.backbone)
            own = share.of_loss(output, parts.backbone)
            with part_of_step(BACKWARD):
                own.backward()
            if carry is not None:
                carried_on = states_to_carry(carry, parts.injection, backbone=parts.backbone.name)
        parts.optimizer.collect()
        return _Pass(
            number,
            states,
            carried_on,
            loss=output.loss.detach(),
            share=own.detach(),
            tokens=output.tokens,
            metrics=share.of_metrics(output, parts.backbone),
        ), carried_on

    def _require_finite(self, passes: Sequence[_Pass], numbers: _Numbers) -> None:
        """Require that every loss and the gradient are finite.

        Raises:
            StepNotFiniteError: one is not.
        """
        for read, losses in zip(passes, numbers.losses, strict=True):
            for data_rank, loss in enumerate(losses):
                if not math.isfinite(loss):
                    windows = self._reading(read, data_rank).windows
                    raise self._not_finite("the loss", loss, windows, read, data_rank, of_gradient=False)
        if not math.isfinite(numbers.norm):
            windows = tuple(window for read in passes for window in self._parts.order.at(read.number).windows)
            raise self._not_finite("the gradient", numbers.norm, windows, passes[0], 0, of_gradient=True)

    def _reading(self, read: _Pass, data_rank: int) -> Reading:
        """What the processes of a data rank read in a pass."""
        rows = rows_of_process(self._parts.world, self._parts.config.train.batch_size, data_rank)
        return self._parts.order.at(read.number).part(rows)

    def _not_finite(
        self, what: str, value: float, windows: Sequence[int], read: _Pass, data_rank: int, *, of_gradient: bool
    ) -> StepNotFiniteError:
        """The error, with a pass and a process's rows in which to look for the cause: every process looks there."""
        parts = self._parts
        rows = rows_of_process(parts.world, parts.config.train.batch_size, data_rank)
        return StepNotFiniteError(
            f"step {self._progress.done + 1}: {what} is {value} on "
            f"{describe(parts.dataset, list(dict.fromkeys(windows)))}; stopped before the optimiser step, weights "
            f"unchanged",
            of_gradient=of_gradient,
            rows=training_rows(parts.config.train, read.number, rows),
            batch=load_batch(parts.dataset, self._reading(read, data_rank).windows, parts.device),
            states=self._states_of(read, data_rank),
        )

    def _states_of(self, read: _Pass, data_rank: int) -> Mapping[str, TTTState]:
        """The fast weights with which a process began a pass; none if parameters are split: they cannot be reset."""
        before = _states_of(data_rank, read, self._parts.world)
        if self._parts.engine.is_sharded:
            return {}
        return reset_rows(self._parts.injection, before, self._reading(read, data_rank).starts)

    def _update(self) -> dict[str, float]:
        """Change the weights; returns the learning rates."""
        self.updating = True
        rates = self._parts.optimizer.step(self._progress.done)
        self.updating = False
        return rates

    def _line(
        self,
        numbers: _Numbers,
        rates: Mapping[str, float],
        *,
        tokens_per_second: float,
        evidence: Observation | None,
    ) -> dict[str, Any]:
        """The step's line of `metrics.jsonl`."""
        line: dict[str, Any] = {
            **numbers.metrics,
            "step": self._progress.done + 1,
            "loss": numbers.loss,
            **rates,
            "grad_norm": numbers.norm,
            "tokens_per_second": tokens_per_second,
            "peak_memory_bytes": peak_memory_bytes(self._parts.device),
        }
        if evidence and self._parts.injection.lora is not None:
            line["lora_share"] = mean_share(self._parts.injection.lora)
        if evidence:
            layers = evidence.layers(self._mean_of_processes)
            line["layers"] = {name: vars(layer) for name, layer in layers.items()}
        checked: dict[str, Any] = finite(line)
        return checked

    def _mean_of_processes(self, measured: Tensor) -> Tensor:
        """The mean of what each process has measured on equally many rows."""
        world = self._parts.world
        return measured if world.data_size == 1 else world.sum(measured) / world.data_size


@part_of_step(NUMBERS)
def _read(passes: Sequence[_Pass], norm: Tensor, world: World) -> _Numbers:
    """The numbers of a step, of all processes; waits for the device, once."""
    metrics = added([read.metrics for read in passes])
    device = passes[0].loss.device
    tokens = torch.tensor(float(sum(read.tokens for read in passes)), dtype=torch.float64)
    summed = [*metrics.values(), tokens.to(device, non_blocking=True)]
    grids = [[read.share for read in passes], [read.loss for read in passes]]
    packed = torch.cat([_stacked(summed), *(_of_processes(_stacked(grid), world) for grid in grids)])
    packed = torch.cat([world.sum(packed), _stacked([norm.detach().to(device)])])
    found = iter(HostCopy(packed).numbers())
    by_name = {name: next(found) for name in metrics}
    read_tokens = round(next(found))
    shares, losses = ([[next(found) for _ in passes] for _ in range(world.data_size)] for _ in grids)
    return _Numbers(
        loss=math.fsum(share for of_process in shares for share in of_process),
        norm=next(found),
        metrics=by_name,
        tokens=read_tokens,
        losses=list(zip(*losses, strict=True)),
    )


def _stacked(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(torch.float64) for value in values])


def _of_processes(own: Tensor, world: World) -> Tensor:
    """Numbers `[P]` at this process's place among those of all, which are zero: the sum over processes has all."""
    if world.data_size == 1:
        return own
    grid = own.new_zeros(world.data_size, len(own))
    grid[world.data_rank] = own
    return grid.flatten()


def _states_of(data_rank: int, read: _Pass, world: World) -> Mapping[str, TTTState]:
    """The fast weights that a process had before a pass, in every process."""
    if world.data_size == 1:
        return read.states
    mine = world.data_rank == data_rank
    if not world.any(mine and bool(read.states)):
        return {}
    found = {}
    for name, after in read.after.items():  # every process has states of these shapes
        own = read.states[name].opened().counting() if mine else after.opened().counting()
        found[name] = TTTState.from_tensors(
            {key: world.sum(value if mine else torch.zeros_like(value)) for key, value in own.tensors().items()}
        )
    return found
