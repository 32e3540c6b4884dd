"""Measures the items of tasks under each arm, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ttt.checksums import file_digest
from ttt.errors import EnvironmentProblem, PluginError, TTTError
from ttt.eval.bench import Bench
from ttt.eval.items import Item, Measured, Row
from ttt.eval.tasks import ItemTask, Setup
from ttt.plugins.asking import WrongAnswer, is_out_of_memory, with_its_type
from ttt.plugins.capabilities import Scoring
from ttt.plugins.eval_tasks import EvalContext
from ttt.seeds import generator_states, restore_generators
from ttt.words import first_line

MOST_FAILED = 0.01
"""The part of a task's items that may fail. If more do, its numbers are not to be trusted."""


@dataclass(frozen=True)
class Batch:
    """Items that were measured together."""

    rows: tuple[Row, ...]
    arrays: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
    """Arrays by item and arm."""


def setup_of(task: ItemTask, context: EvalContext, options: Any) -> Setup:
    """What a task knows before the model."""
    return Setup(context.config, context.backbone, options, task.folder)


def batches(task: ItemTask, items: Sequence[Item], *, size: int) -> list[tuple[Item, ...]]:
    """The items as they are measured together. A run that goes on measures the same ones together again."""
    step = size if task.batched else 1
    return [tuple(items[start : start + step]) for start in range(0, len(items), step)]


def measured(task: ItemTask, bench: Bench, items: Sequence[Item], arms: Sequence[str]) -> Batch:
    """Measure items under every arm. If that fails, each by itself; those that fail again get an error.

    Raises:
        PluginError: the task's answer is not what `ItemTask.measure` describes.
        EnvironmentProblem: there is not enough memory.
    """
    try:
        return _together(task, bench, items, arms)
    except WrongAnswer as error:
        raise PluginError(f"the task {task.name} returned {error}") from None
    except Exception as error:  # of the data, the backbone or the task
        if len(items) == 1:
            return _failed(items[0], error)
    parts = [measured(task, bench, [item], arms) for item in items]
    arrays = {key: value for part in parts for key, value in part.arrays.items()}
    return Batch(tuple(row for part in parts for row in part.rows), arrays)


def _failed(item: Item, error: Exception) -> Batch:
    if is_out_of_memory(error):
        raise EnvironmentProblem(
            f"out of memory at the item {item.id}: {first_line(error)} What takes less: a smaller eval.eval_batch_size"
        ) from error
    told = str(error) if isinstance(error, TTTError) else f"{type(error).__name__}: {first_line(error)}"
    return Batch((Row(item, {}, _digests(item, missing_is_error=False), told),), {})


def _together(task: ItemTask, bench: Bench, items: Sequence[Item], arms: Sequence[str]) -> Batch:
    by_arm: dict[str, Sequence[Measured]] = {}
    generators = generator_states()
    for arm in arms:
        restore_generators(generators)  # so that each arm draws the same random numbers
        with bench.under(arm), torch.no_grad():
            by_arm[arm] = _checked(task, task.measure(bench, items), len(items))
    rows = tuple(
        Row(item, {arm: dict(by_arm[arm][place].numbers) for arm in arms}, _digests(item))
        for place, item in enumerate(items)
    )
    arrays = {
        (item.id, arm): by_arm[arm][place].arrays
        for place, item in enumerate(items)
        for arm in arms
        if by_arm[arm][place].arrays
    }
    return Batch(rows, arrays)


def _checked(task: ItemTask, answer: Any, count: int) -> Sequence[Measured]:
    good = isinstance(answer, Sequence) and all(isinstance(each, Measured) for each in answer)
    if not good or len(answer) != count:
        raise WrongAnswer(f"{with_its_type(answer)}, not a Measured for each of {count} items")
    for each in answer:
        for name, number in each.numbers.items():
            if not math.isfinite(number):
                raise ValueError(f"{name} is {number}, not a finite number")
    return answer


def _digests(item: Item, *, missing_is_error: bool = True) -> dict[str, str]:
    digests = {}
    for file in item.files:
        try:
            digests[str(file)] = file_digest(file)
        except OSError as error:
            if missing_is_error:
                raise EnvironmentProblem(f"{file}: cannot be read: {error.strerror or error}") from None
    return digests


def rows_of(
    task: ItemTask,
    bench: Bench,
    items: Sequence[Item],
    arms: Sequence[str],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Batch]:
    """Measure all items, batch by batch, until `stop` returns true."""
    if Scoring in task.requires:
        bench.reader  # noqa: B018 - if the codec is missing, that is not the fault of an item
    bench.items_left = items
    for part in batches(task, items, size=bench.config.eval.eval_batch_size):
        if stop():
            return
        yield measured(task, bench, part, arms)


def too_many_failed(rows: Sequence[Row]) -> bool:
    """Whether more items failed than may."""
    return sum(row.error is not None for row in rows) > MOST_FAILED * len(rows)
