"""Averaged weights (`train.ema_decay`) evaluated beside a run's own, and saved as an adapter.

The adapter, in the folder `ema` of a checkpoint, is for everything that reads adapters. A resumed run goes on from the
averages in the optimiser's state, which are all float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt.adapter_file import BackboneWeights, save_adapter
from ttt.checkpoint_folder import EMA
from ttt.files import sync
from ttt.inject import Injection
from ttt.train.averages import KIND, applied
from ttt.train.evaluation import Evaluation
from ttt.train.learnable import Learnable
from ttt.train.parts import Parts


def with_averages(parts: Parts, evaluate: Callable[[], Evaluation | None]) -> Evaluation | None:
    """Evaluate; if the run keeps averages, once more with these, whose loss the evaluation then has too."""
    evaluation, averages = evaluate(), parts.optimizer.averages
    if evaluation is None or averages is None or not averages.tensors():
        return evaluation
    parts.engine.settle()  # what was gathered for the first evaluation is of other weights
    with applied({entry.name: entry.parameter for entry in parts.learnable}, averages.tensors()):
        again = evaluate()
        parts.engine.settle()
    return None if again is None else replace(evaluation, loss_ema=again.loss)


def write_averages(
    checkpoint: Path,
    injection: Injection,
    learnable: Sequence[Learnable],
    *,
    state: Mapping[str, Tensor],
    adapters: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    decay: float | None,
    backbone: Mapping[str, Any],
    training: Mapping[str, Any],
    weights: BackboneWeights | None = None,
) -> None:
    """Write the averages as an adapter into the folder `ema` of a checkpoint, if the optimiser's state has any.

    Args:
        checkpoint: the checkpoint's folder.
        injection: the adapters.
        learnable: what learns.
        state: the optimiser's state, with the averages as `ema.NAME`.
        adapters: the tensors of the adapters, as `injection.state_dict` names them.
        trained: the backbone's parameters that the checkpoint holds, by name.
        decay: `train.ema_decay`, for the record.
        backbone: name and options, for the adapter file.
        training: a record of the training, for the adapter file.
        weights: by what the backbone is known again, if it cannot be looked at.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written.
    """
    averages = {name.removeprefix(f"{KIND}."): value for name, value in state.items() if name.startswith(f"{KIND}.")}
    if not averages:
        return
    named = _names_in_files(injection)
    of_adapters = {
        named[id(entry.parameter)]: averages[entry.name] for entry in learnable if id(entry.parameter) in named
    }
    save_adapter(
        checkpoint / EMA,
        injection,
        tensors=_replaced(adapters, of_adapters),
        backbone_tensors=_replaced(trained, averages),
        backbone=backbone,
        training={**training, "ema_decay": decay},
        weights=weights,
    )
    sync(checkpoint / EMA)


def _replaced(tensors: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each in its own type, with the values of the averages where there are any."""
    return {name: averages[name].to(value.dtype) if name in averages else value for name, value in tensors.items()}


def _names_in_files(injection: Injection) -> dict[int, str]:
    """The names that the parameters of the adapters have in an adapter file, by `id`."""
    of_ttt = {
        id(parameter): f"{site}.{name}"
        for site, adapter in injection.adapters.items()
        for name, parameter in adapter.named_parameters()
    }
    return {**of_ttt, **{id(parameter): name for name, parameter in injection.lora_parameters.items()}}
