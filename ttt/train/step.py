"""One optimiser step: forward and backward over its batches, the update, and its metrics."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttt.adapter import carried
from ttt.evidence import Observation
from ttt.plugins.rows import reading_rows
from ttt.state import TTTState
from ttt.train.active import require_active, require_gradient, require_reached
from ttt.train.divergence import StepNotFiniteError
from ttt.train.lora import mean_share
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
    training_rows,
)
from ttt.train.progress import Progress
from ttt.train.setup import peak_memory_bytes


@dataclass(frozen=True)
class _Pass:
    """The result of a forward and backward pass over one batch."""

    loss: float
    tokens: int
    """Positions that the pass read."""
    metrics: dict[str, float]
    """The backbone's own metrics."""


class Stepper:
    """Makes the optimiser steps of a run, one at a time."""

    def __init__(self, parts: Parts, progress: Progress) -> None:
        self._parts = parts
        self._progress = progress
        self.updating = False
        """Whether the optimiser is changing the weights; if an error occurs then, they may be half updated."""

    def advance(self) -> None:
        """Make the next step. Progress changes only when the step is done.

        Raises:
            StepNotFiniteError: a loss or the gradient is not finite; the weights are those before the step.
            InactiveLayerError: it is the first step, and a TTT layer does not act.
        """
        parts, progress = self._parts, self._progress
        step, count = progress.done, parts.config.train.num_microbatches
        started = time.monotonic()
        parts.model.train()
        evidence = Observation(parts.injection) if self._measures(step + 1) else None
        states = progress.states
        readings: list[Reading] = []
        passes: list[_Pass] = []
        for number in range(step * count, (step + 1) * count):
            readings.append(parts.order.at(number))
            watched = evidence if len(readings) == 1 else None
            with watched or contextlib.nullcontext():
                read, states = self._pass(number, readings[-1], states, watched)
            passes.append(read)
        if step == 0 and evidence:
            require_active(evidence, parts)
        norm = self._clip(readings, states)
        rates = self._update()
        seconds, tokens = time.monotonic() - started, sum(read.tokens for read in passes)
        line = self._line(passes, rates, norm, tokens_per_second=tokens / max(seconds, 1e-9), evidence=evidence)
        progress.seconds += seconds
        progress.tokens += tokens
        progress.states = states
        progress.line = line
        progress.done += 1

    def _measures(self, step: int) -> bool:
        """Whether to measure evidence in a step (from 1)."""
        train = self._parts.config.train
        return step % train.evidence_freq == 0 or step in (1, train.max_steps)

    def _pass(
        self, number: int, reading: Reading, carried_in: Mapping[str, TTTState], evidence: Observation | None
    ) -> tuple[_Pass, dict[str, TTTState]]:
        """Run forward and backward over one batch; also returns the states to carry."""
        parts, config = self._parts, self._parts.config
        batch = load_batch(parts.dataset, reading.windows, parts.device)
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
            loss = float(output.loss.detach())
            if not math.isfinite(loss):
                message = self._not_finite("the loss", loss, [reading])
                raise StepNotFiniteError(message, of_gradient=False, number=number, batch=batch, states=states)
            (output.loss / config.train.num_microbatches).backward()
            if carry is not None:
                carried_on = states_to_carry(carry, parts.injection, backbone=parts.backbone.name)
        parts.optimizer.collect()
        metrics = {name: float(value) for name, value in output.metrics.items()}
        return _Pass(loss, output.tokens, metrics), carried_on

    def _clip(self, readings: Sequence[Reading], states: Mapping[str, TTTState]) -> float:
        """Clip the gradient; returns its norm before.

        Raises:
            StepNotFiniteError: the gradient is not finite.
        """
        norm = self._parts.optimizer.clip()
        if not math.isfinite(norm):
            first = self._progress.done * self._parts.config.train.num_microbatches
            batch = load_batch(self._parts.dataset, readings[0].windows, self._parts.device)
            message = self._not_finite("the gradient", norm, readings)
            raise StepNotFiniteError(message, of_gradient=True, number=first, batch=batch, states=states)
        return norm

    def _update(self) -> dict[str, float]:
        """Change the weights; returns the learning rates."""
        self.updating = True
        rates = self._parts.optimizer.step(self._progress.done)
        self.updating = False
        return rates

    def _line(
        self,
        passes: Sequence[_Pass],
        rates: Mapping[str, float],
        norm: float,
        *,
        tokens_per_second: float,
        evidence: Observation | None,
    ) -> dict[str, Any]:
        """The step's line of `metrics.jsonl`."""
        metrics: dict[str, float] = {}
        for read in passes:
            for name, value in read.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value / len(passes)
        line: dict[str, Any] = {
            **metrics,
            "step": self._progress.done + 1,
            "loss": math.fsum(read.loss for read in passes) / len(passes),
            **rates,
            "grad_norm": norm,
            "tokens_per_second": tokens_per_second,
            "peak_memory_bytes": peak_memory_bytes(self._parts.device),
        }
        if evidence and self._parts.injection.lora is not None:
            line["lora_share"] = mean_share(self._parts.injection.lora)
        if evidence:
            line["layers"] = {name: vars(layer) for name, layer in evidence.layers().items()}
        checked: dict[str, Any] = finite(line)
        return checked

    def _not_finite(self, what: str, value: float, readings: Sequence[Reading]) -> str:
        windows = list(dict.fromkeys(window for reading in readings for window in reading.windows))
        return (
            f"step {self._progress.done + 1}: {what} is {value} on {describe(self._parts.dataset, windows)}; stopped "
            f"before the optimiser step, weights unchanged"
        )
