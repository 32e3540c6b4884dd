"""The hook of the tasks on memory. Its entry point is this distribution's own."""

from __future__ import annotations

from collections.abc import Sequence

from ttt.plugins import AnyEvalTask, hookimpl


@hookimpl
def ttt_eval_tasks() -> Sequence[AnyEvalTask]:
    """The tasks on memory."""
    from ttt.eval.memory.recall import Recall

    return [Recall()]
