"""The hook of the tasks on text, and on whatever a backbone reads. Its entry point is this distribution's own."""

from __future__ import annotations

from collections.abc import Sequence

from ttt.plugins import AnyEvalTask, hookimpl


@hookimpl
def ttt_eval_tasks() -> Sequence[AnyEvalTask]:
    """The tasks that need no sound."""
    from ttt.eval.inner_loss import InnerLoss
    from ttt.eval.positions import TextPositions
    from ttt.eval.recall import Recall

    return [InnerLoss(), Recall(), TextPositions()]
