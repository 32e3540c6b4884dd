"""Why a loss or a gradient is not finite, and how to go on from there.

It asks these questions in order, and reports the first one that is answered yes as the cause: Do the weights hold
values that are not finite? Does the batch? Do the carried fast weights? Is the loss of the previous step's batch no
longer finite at these weights? Is the loss of the plain backbone finite, with gates closed and LoRA off?
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ttt.config.lora import Adapter
from ttt.config.schema import LITERATURE_BASE_LR, RunConfig, TrainConfig
from ttt.errors import NonFiniteError
from ttt.evidence import Observation
from ttt.inject import Injection
from ttt.plugins.rows import StepRows
from ttt.printable import shell_word
from ttt.state import TTTState
from ttt.train.rundir import RunDir
from ttt.train.stored_config import CONFIG
from ttt.words import first_few


class StepNotFiniteError(NonFiniteError):
    """The loss or gradient of a training step was not finite; holds what the step read, to search for the cause."""

    def __init__(
        self, message: str, *, of_gradient: bool, rows: StepRows, batch: Any, states: Mapping[str, TTTState]
    ) -> None:
        super().__init__(message)
        self.of_gradient = of_gradient
        self.rows = rows
        """The rows of the forward pass."""
        self.batch = batch
        self.states = states
        """The carried fast weights before the pass."""


@dataclass(frozen=True)
class Diagnosis:
    """Why the loss or the gradient of a pass was not finite."""

    cause: str
    """What is wrong and what to do about it, in sentences."""
    sound: bool
    """Whether the weights before the step are good, so that a run can go on from them."""
    changes: dict[str, float] = field(default_factory=dict)
    """Config keys with the values that a new run should have; empty if the data is the cause."""


def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or an infinity; waits for the device once for each device and type."""
    candidates = [(name, tensor) for name, tensor in named if tensor.is_floating_point() or tensor.is_complex()]
    answers = [torch.isfinite(tensor.detach()).all() for _, tensor in candidates]
    if not answers:
        return []
    finite = torch.stack([answer.to(answers[0].device) for answer in answers]).tolist()
    return [name for (name, _), good in zip(candidates, finite, strict=True) if not good]


def tensors_in(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, tuples and lists, with the path to it."""
    if isinstance(batch, Tensor):
        yield name or "the batch", batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(batch, (tuple, list)):
        keys = getattr(batch, "_fields", range(len(batch)))
        for key, value in zip(keys, batch, strict=True):
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))


def tensors_of(states: Mapping[str, TTTState]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of carried states, each with its site and name."""
    for site, state in states.items():
        for key, tensor in state.tensors().items():
            yield f"{site}/{key}", tensor


def lowered(config: RunConfig, *keys: str) -> dict[str, float]:
    """Smaller values for `train.lr` and `ttt.base_lr`: a tenth, but at most the literature's values."""
    usual = {
        "train.lr": (config.train.lr, TrainConfig.model_fields["lr"].default),
        "ttt.base_lr": (config.ttt.base_lr, LITERATURE_BASE_LR[config.ttt.layer_type]),
    }
    return {key: float(f"{min(usual[key][0] / 10, usual[key][1]):.3g}") for key in keys}


_WITHOUT: Mapping[Adapter, tuple[str, str]] = {
    "ttt": ("With the gates closed", "the TTT layers"),
    "lora": ("With LoRA off", "LoRA"),
    "ttt+lora": ("With the gates closed and LoRA off", "the TTT layers or LoRA"),
}
"""How the plain backbone is reached, and what is to blame if its loss is finite."""


class Examination:
    """Looks for the cause of a loss or gradient that was not finite; it changes nothing.

    Args:
        config: the run's config.
        model: the model with the weights of the pass.
        injection: its adapters.
        done: optimiser steps done.
        batch: the batch of the pass.
        states: the carried fast weights before the pass.
        measure: returns the loss of a batch, without gradient; with `closed`, that of the plain backbone.
        before: returns the first batch of the previous step and its loss.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        injection: Injection,
        *,
        done: int,
        batch: Any,
        states: Mapping[str, TTTState],
        measure: Callable[[Any, bool], float],
        before: Callable[[], tuple[Any, float | None]] | None,
    ) -> None:
        self._config = config
        self._model = model
        self._injection = injection
        self._done = done
        self._batch = batch
        self._states = states
        self._measure = measure
        self._before = before

    def of_loss(self) -> Diagnosis:
        """Why the loss is not finite."""
        return self._of_values() or self._of_update() or self._of_layers()

    def of_gradient(self) -> Diagnosis:
        """Why the gradient of a finite loss is not finite."""
        found = self._of_values() or self._of_update()
        if found is not None:
            return found
        names = not_finite(
            (name, parameter.grad) for name, parameter in self._model.named_parameters() if parameter.grad is not None
        )
        keys = ("ttt.base_lr",) if self._done == 0 else ("train.lr", "ttt.base_lr")
        which = f" (of {listed(names)})" if names else ""
        return Diagnosis(
            f"The loss and every weight are finite, so the backward pass{which} overflows: lower "
            f"{self._in_words(keys)}{self._or_precision()}; or look at that data",
            sound=True,
            changes=lowered(self._config, *keys),
        )

    def _of_values(self) -> Diagnosis | None:
        """Blame a weight, the batch or a carried state if it is not finite before anything is computed."""
        weights = not_finite(self._model.named_parameters())  # buffers may be masks of -inf
        if weights and self._done == 0:
            start = self._config.train.init_from
            return Diagnosis(
                f"The weights that the run starts with are not finite ({listed(weights)}): "
                + (f"look at train.init_from: {start}" if start else "look at the backbone's weights"),
                sound=False,
            )
        if weights:
            return Diagnosis(
                f"The optimiser step before made weights not finite ({listed(weights)}): lower "
                f"{self._in_words(['train.lr'])}",
                sound=False,
                changes=lowered(self._config, "train.lr"),
            )
        values = not_finite(tensors_in(self._batch))
        if values:
            return Diagnosis(
                f"The batch itself holds values that are not finite ({listed(values)}): mend that data",
                sound=not not_finite(tensors_of(self._states)),
            )
        states = not_finite(tensors_of(self._states))
        if states:
            return Diagnosis(
                f"The fast weights carried from earlier windows are not finite ({listed(states)}): lower "
                f"{self._in_words(['ttt.base_lr'])}",
                sound=False,
                changes=lowered(self._config, "ttt.base_lr"),
            )
        return None

    def _of_update(self) -> Diagnosis | None:
        """Blame the previous step's update if the loss of its batch is no longer finite."""
        if self._before is None:
            return None
        batch, loss = self._before()
        now = self._measure(batch, False)
        if math.isfinite(now):
            return None
        was = "" if loss is None else f", and was {loss:.4g} before it"
        return Diagnosis(
            f"Training diverged: the loss on what step {self._done} read is {now} after that step{was}; lower "
            f"{self._in_words(['train.lr'])}",
            sound=False,
            changes=lowered(self._config, "train.lr"),
        )

    def _of_layers(self) -> Diagnosis:
        """Blame what was added to the backbone if the loss is finite without it, else the backbone."""
        closed = self._measure(self._batch, True)
        without, added = _WITHOUT[self._config.adapter]
        if math.isfinite(closed):
            with Observation(self._injection) as evidence:
                self._measure(self._batch, False)
            sites = [
                site
                for site, layer in evidence.layers().items()
                if not all(map(math.isfinite, (layer.inner_loss_before, layer.inner_loss_after, layer.movement)))
            ]
            where = f" ({listed(sites)}: the inner loss is not finite)" if sites else ""
            of_ttt = ("ttt.base_lr",) if self._injection.sites else ()
            keys = of_ttt if of_ttt and self._done == 0 else (*of_ttt, "train.lr")
            if self._done == 0 and not of_ttt:  # LoRA that starts anew changes nothing yet
                told = "start it from other values than those of lora.init_from"
                return Diagnosis(
                    f"{without} the loss is {closed:.4g}, so it is {added}: {told}", sound=False, changes={}
                )
            return Diagnosis(
                f"{without} the loss is {closed:.4g}, so it is {added}{where}: lower {self._in_words(keys)}",
                sound=self._done > 0,
                changes=lowered(self._config, *keys),
            )
        return Diagnosis(
            f"{without} it is {closed} too, and every weight is finite, so the backbone cannot read this: look at that "
            f"data; if it is sound, lower train.lr{self._or_precision()}",
            sound=self._done > 0,
            changes=lowered(self._config, "train.lr") if self._done else {},
        )

    def _in_words(self, keys: Iterable[str]) -> str:
        values = {"train.lr": self._config.train.lr, "ttt.base_lr": self._config.ttt.base_lr}
        return " or ".join(f"{key} ({values[key]:g})" for key in keys)

    def _or_precision(self) -> str:
        train = self._config.train
        if train.autocast != "none":
            return ", or write train.autocast: none"
        return ", or write train.param_dtype: float32" if train.param_dtype != "float32" else ""


def listed(names: list[str]) -> str:
    """The first two names, and how many more there are."""
    return first_few(names, 2)


def examined(look: Callable[[], Diagnosis]) -> Diagnosis:
    """The diagnosis of an inspection; if the inspection itself fails, for instance from lack of memory, a general one.

    Then nothing is known about the weights, and they are saved rather than lost; no other checkpoint is pruned.
    """
    try:
        return look()
    except Exception:
        return Diagnosis("Look at that data; if it is sound, lower train.lr or ttt.base_lr", sound=True)


def way_on(run: RunDir, config: RunConfig, changes: Mapping[str, float], *, before: int) -> str:
    """A sentence with the command that goes on from the newest good checkpoint with other values.

    Args:
        run: the run that failed.
        config: its config.
        changes: config keys with their new values.
        before: only checkpoints before this step are good.
    """
    newest = next((checkpoint for checkpoint in run.complete() if checkpoint.step < before), None)
    settings = {key: f"{value:g}" for key, value in changes.items()}
    if newest is not None:
        settings |= {"train.init_from": str(newest.path), "run_dir": str(run.beside())}
        return f"the last good weights are in {newest.path}; a new run goes on from them: `{_command(run, settings)}`"
    if run.complete():
        settings["run_dir"] = str(run.beside())
    return f"no checkpoint is from before that; start anew: `{_command(run, settings)}`"


def _command(run: RunDir, settings: Mapping[str, str]) -> str:
    words = [shell_word(run / CONFIG)]
    for key, value in settings.items():
        plain = re.fullmatch(r"[\w./+-]+", value)
        words += ["--set", shell_word(f"{key}={value if plain else json.dumps(value)}")]
    return " ".join(["ttt", "train", *words])
