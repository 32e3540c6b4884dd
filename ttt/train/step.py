"""One optimiser step: forward and backward over its batches, the update, and its metrics.

Between the first forward pass and the update, the host reads nothing from the device but one tensor with all numbers of
the step, once (`ttt.train.host_copy`). So losses and gradients that are not finite are found when every pass is done.
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
from ttt.plugins import Batch
from ttt.plugins.rows import reading_rows
from ttt.state import TTTState
from ttt.train.active import require_active, require_gradient, require_reached
from ttt.train.divergence import StepNotFiniteError
from ttt.train.host_copy import HostCopy
from ttt.train.loading import Loader
from ttt.train.lora import mean_share
from ttt.train.means import Share, added, even_shares, shares, weighs_rows
from ttt.train.metrics import finite
from ttt.train.order import Reading
from ttt.train.parts import Parts
from ttt.train.passes import (
    describe,
    load_batch,
    mixed_precision,
    reset_rows,
    seed_pass,
    states_to_carry,
    to_device,
    training_rows,
)
from ttt.train.progress import Progress
from ttt.train.setup import peak_memory_bytes


@dataclass(frozen=True)
class _Pass:
    """A forward and backward pass over one batch; its numbers are still on the device."""

    number: int
    reading: Reading
    states: Mapping[str, TTTState]
    """The carried fast weights before it."""
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
    losses: Sequence[float]
    """Of each pass."""


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
        numbers = _read(passes, parts.optimizer.clip())
        self._require_finite(passes, numbers)
        if progress.done == 0 and evidence:
            require_active(evidence, parts)
        rates = self._update()
        seconds, tokens = time.monotonic() - started, sum(read.tokens for read in passes)
        line = self._line(numbers, rates, tokens_per_second=tokens / max(seconds, 1e-9), evidence=evidence)
        progress.seconds += seconds
        progress.tokens += tokens
        progress.states = states
        progress.line = line
        progress.done += 1

    def _measures(self, step: int) -> bool:
        """Whether to measure evidence in a step (from 1)."""
        train = self._parts.config.train
        return step % train.evidence_freq == 0 or step in (1, train.max_steps)

    def _passes(self, evidence: Observation | None) -> tuple[list[_Pass], dict[str, TTTState]]:
        """Run every forward and backward pass of the step; also returns the states to carry on from it."""
        count = self._parts.config.train.num_microbatches
        numbers = range(self._progress.done * count, (self._progress.done + 1) * count)
        readings = [self._parts.order.at(number) for number in numbers]
        states = self._progress.states
        passes: list[_Pass] = []
        for number, reading, (batch, share) in zip(numbers, readings, self._batches(numbers), strict=True):
            watched = evidence if not passes else None
            with watched or contextlib.nullcontext():
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
        states = reset_rows(parts.injection, carried_in, reading.starts)
        seed_pass(config.train.seed, "train", number)
        carried_on = dict(carried_in)
        # a recomputation reads the states too, so backward runs inside this context
        with carried(parts.injection, states) if config.ttt.persistent_states else contextlib.nullcontext() as carry:
            with (
                mixed_precision(config.train, parts.device),
                reading_rows(training_rows(config.train, number)),
            ):
                output = parts.backbone.loss(parts.model, batch, config)
            if evidence and self._progress.done == 0:
                require_reached(evidence, parts)
            require_gradient(output, parts.backbone)
            own = share.of_loss(output, parts.backbone)
            own.backward()
            if carry is not None:
                carried_on = states_to_carry(carry, parts.injection, backbone=parts.backbone.name)
        parts.optimizer.collect()
        return _Pass(
            number,
            reading,
            states,
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
        for read, loss in zip(passes, numbers.losses, strict=True):
            if not math.isfinite(loss):
                raise self._not_finite("the loss", loss, [read], of_gradient=False)
        if not math.isfinite(numbers.norm):
            raise self._not_finite("the gradient", numbers.norm, passes, of_gradient=True)

    def _not_finite(self, what: str, value: float, passes: Sequence[_Pass], *, of_gradient: bool) -> StepNotFiniteError:
        dataset, first = self._parts.dataset, passes[0]
        windows = list(dict.fromkeys(window for read in passes for window in read.reading.windows))
        return StepNotFiniteError(
            f"step {self._progress.done + 1}: {what} is {value} on {describe(dataset, windows)}; stopped "
            f"before the optimiser step, weights unchanged",
            of_gradient=of_gradient,
            number=first.number,
            batch=load_batch(dataset, first.reading.windows, self._parts.device),
            states=first.states,
        )

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
            line["layers"] = {name: vars(layer) for name, layer in evidence.layers().items()}
        checked: dict[str, Any] = finite(line)
        return checked


def _read(passes: Sequence[_Pass], norm: Tensor) -> _Numbers:
    """The numbers of a step; waits for the device, once."""
    metrics = added([read.metrics for read in passes])
    own = [read.share for read in passes]
    values = [norm.detach(), *metrics.values(), *own, *(read.loss for read in passes)]
    copied = HostCopy(torch.stack([value.to(own[0].device, torch.float64) for value in values])).numbers()
    found, count = iter(copied), len(passes)
    return _Numbers(
        norm=next(found),
        metrics={name: next(found) for name in metrics},
        loss=math.fsum(next(found) for _ in range(count)),
        losses=list(found),
    )
