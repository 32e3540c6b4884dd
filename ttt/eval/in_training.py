"""A task of items at an evaluation of a run: its numbers alone, no files."""

from __future__ import annotations

from typing import Any

from ttt.errors import EnvironmentProblem
from ttt.eval.bench import Bench
from ttt.eval.engine import rows_of, setup_of, too_many_failed
from ttt.eval.listing import chosen_items
from ttt.eval.results import summed_up
from ttt.eval.tasks import ItemTask
from ttt.plugins.eval_tasks import EvalContext


def numbers_of(task: ItemTask, context: EvalContext, options: Any) -> dict[str, float]:
    """A task's numbers while a model is trained; none of a task that writes files, which `ttt eval` measures.

    Raises:
        TTTError: the backbone or the data does not fit the task, or more than 1 % of its items failed.
    """
    if task.writes_files:
        return {}
    setup, bench = setup_of(task, context, options), Bench(context, options)
    items = chosen_items(task, setup).items
    arms = task.arms_among(("ttt", "closed"))
    rows = [row for batch in rows_of(task, bench, items, arms, stop=context.stop) for row in batch.rows]
    if context.stop():
        return {}
    failed = [row for row in rows if row.error is not None]
    if too_many_failed(rows):
        raise EnvironmentProblem(
            f"{len(failed)} of {len(rows)} items failed, the first, {failed[0].item.id}: {failed[0].error}"
        )
    return summed_up(task, setup, rows, arms).as_metrics()
