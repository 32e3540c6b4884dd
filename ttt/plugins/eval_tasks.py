"""Evaluation tasks: what a config names under `eval.tasks`, measured at each evaluation of a run.

    eval:
      eval_freq: 500
      tasks: [{name: wordlist, data: words.csv}]

Each number of a task stands in `metrics.jsonl`, `summary.json` and every logger as `task/metric`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ttt.config.schema import RunConfig
from ttt.config.tasks import TaskOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ttt.plugins.backbone import Backbone
    from ttt.plugins.data import WindowDataset


@dataclass(frozen=True)
class EvalContext:
    """What a task gets to measure with. Later versions may add to it."""

    model: nn.Module
    """Injected, in eval mode; inside `ttt.adapter.gates_closed` it is the plain backbone. A task changes no weight."""
    backbone: Backbone
    """The model's backbone. Ask it for its capabilities, not for its name."""
    config: RunConfig
    """Resolved, of the run."""
    dataset: WindowDataset
    """The data of the run's own evaluation."""
    device: torch.device
    """Of the model."""
    step: int
    """Optimiser steps done."""
    stop: Callable[[], bool]
    """Whether the run is asked to stop. A long task checks it between two items and returns early. Its numbers are then
    dropped: the resumed run measures again."""
    adapters: Mapping[str, nn.Module] = field(default_factory=dict)
    """The TTT adapters by site name."""
    folder: Path | None = None
    """The folder of the evaluation, for a task that writes files; None while a run is trained."""
    imported_from: str | None = None
    """The program whose weights the adapter is of, for `SampleRequest`; None if it was learned here."""


class AnyEvalTask(ABC):
    """What every task has. A task is an `EvalTask`, which does all by itself, or an `ItemTask` of `ttt.eval`."""

    name: ClassVar[str]
    """As in `eval.tasks: [{name: NAME}]`: letters, digits, `_`, `-` and `.`."""
    options: ClassVar[type[TaskOptions]] = TaskOptions
    """Its options: a subclass of `ttt.config.TaskOptions`. `ttt check` checks a config by it."""


class EvalTask(AnyEvalTask):
    """A task that measures a model while it is trained. The class attributes must work without torch."""

    @abstractmethod
    def run(self, context: EvalContext, options: Any) -> Mapping[str, float]:
        """Measure the model.

        It is called without gradients, in the run's mixed precision, and with every global generator seeded by the
        run's seed and the task's name.

        Args:
            context: the model, and what it is measured by.
            options: those of the config, an instance of `options`.

        Returns:
            Numbers by name, as `{"acc": 0.61}`.

        Raises:
            Exception: anything. It is reported, this evaluation lacks the numbers, and the run goes on.
        """
