"""The tasks of `eval.tasks`, measured at an evaluation.

If a task fails, that is reported and its numbers are missing from that evaluation; the run goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt.errors import PluginError
from ttt.eval.in_training import numbers_of
from ttt.eval.tasks import ItemTask
from ttt.eval.unchanged import changed_weight, weight_versions
from ttt.plugins.asking import WrongAnswer, asked, owner, with_its_type
from ttt.plugins.eval_tasks import AnyEvalTask, EvalContext, EvalTask
from ttt.plugins.installed_tasks import ChosenTask
from ttt.plugins.registry import in_its_name
from ttt.train.display import Display
from ttt.train.evaluation import eval_mode
from ttt.train.parts import Parts
from ttt.train.passes import mixed_precision, seed_pass

_METRIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,@%+-]{0,79}")


@torch.no_grad()
def measure(parts: Parts, step: int, *, stop: Callable[[], bool], display: Display) -> dict[str, float] | None:
    """Measure every task of a run.

    Args:
        parts: the run's parts.
        step: optimiser steps done.
        stop: asked after each task whether the run shall stop; every process must get the same answer.
        display: shows which task is measured, and which failed.

    Returns:
        Numbers by `task/metric`; None if `stop` returned true.

    Raises:
        PluginError: a task changed a weight, so that the run would go on with another model; or it failed in one of
            several processes that split the model, where the others would wait for this one.
    """
    numbers: dict[str, float] = {}
    context = EvalContext(
        parts.model,
        parts.backbone,
        parts.config,
        parts.eval_dataset,
        parts.device,
        step=step,
        stop=stop if parts.world.alone else lambda: False,  # tasks ask when they like, and processes together
        adapters=parts.injection.adapters,
    )
    parts.engine.unsplit()
    versions = weight_versions(parts.model)  # of what tasks see: a gathered parameter is counted by itself
    for chosen in parts.tasks:
        display.measuring(chosen.task.name)
        try:
            numbers |= _measured(chosen, context)
        except Exception as error:  # any error of the task's code, and a lack of memory
            told = in_its_name(chosen.plugin, error)
            _require_apart(parts, chosen, f"step {step}", told, error)
            display.say(f"warning: step {step}: the task {chosen.task.name} has no numbers ({told}); the run goes on")
        _require_unchanged(parts, versions, chosen)
        if stop():
            parts.engine.settle()
            return None
    parts.engine.settle()
    display.measuring(None)
    return numbers


def _require_apart(parts: Parts, chosen: ChosenTask, when: str, told: str, error: Exception) -> None:
    """End the run for a failed task if processes split the model: the others may wait for this one within the task.

    Raises:
        PluginError: they do.
    """
    if parts.engine.is_sharded or parts.world.tensor > 1:
        raise PluginError(
            f"{when}: the task {chosen.task.name} failed ({told}), and processes that split the model cannot go on "
            f"without each other; take it out of eval.tasks, and go on from the last checkpoint with "
            f"`{parts.directory.resume_command()}`"
        ) from error


def _require_unchanged(parts: Parts, versions: Mapping[str, int], chosen: ChosenTask) -> None:
    """Refuse to go on if a task has changed a weight.

    Raises:
        PluginError: a weight was changed.
    """
    changed = changed_weight(parts.model, versions)
    if changed is not None:
        raise PluginError(
            f"the task {chosen.task.name} of {owner(chosen.plugin)} changed the weight {changed}, so the run ends; "
            f"take it out of eval.tasks, and go on from the last checkpoint with `{parts.directory.resume_command()}`"
        )


def _measured(chosen: ChosenTask, context: EvalContext) -> dict[str, float]:
    """The numbers of one task, by `task/metric`.

    Raises:
        Exception: the task failed.
    """
    task, train = chosen.task, context.config.train
    name = "measure" if isinstance(task, ItemTask) else "run"
    seed_pass(train.seed, f"task {task.name}", 0)
    with (
        eval_mode(context.model),
        mixed_precision(train, context.device),
        asked(chosen.plugin, f"`{name}` of its task {task.name}", getattr(type(task), name, None)),
    ):
        answer = _answer(task, context, chosen.options)
        return {f"{task.name}/{name}": value for name, value in _numbers(answer)}


def _answer(task: AnyEvalTask, context: EvalContext, options: Any) -> Any:
    if isinstance(task, ItemTask):
        return numbers_of(task, context, options)
    if isinstance(task, EvalTask):
        return task.run(context, options)
    raise WrongAnswer(f"{with_its_type(task)}, neither an EvalTask nor an ItemTask")


def _numbers(answer: Any) -> list[tuple[str, float]]:
    """The numbers that a task returned, with their names.

    Raises:
        WrongAnswer: it did not return a mapping of names to numbers.
    """
    if not isinstance(answer, Mapping):
        raise WrongAnswer(f"{with_its_type(answer)}, not a mapping of names to numbers")
    for name, value in answer.items():
        if not isinstance(name, str) or not _METRIC.fullmatch(name):
            raise WrongAnswer(f"a number called {name!r:.80}; write a word, as 'acc'")
        whole = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not whole and not (isinstance(value, Tensor) and value.numel() == 1):
            raise WrongAnswer(f"for {name} {with_its_type(value)}, not one number")
    return [(name, float(value)) for name, value in answer.items()]
