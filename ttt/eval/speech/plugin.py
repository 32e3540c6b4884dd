"""The hook of the tasks on speech. Its entry point is this distribution's own."""

from __future__ import annotations

from collections.abc import Sequence

from ttt.plugins import AnyEvalTask, hookimpl


@hookimpl
def ttt_eval_tasks() -> Sequence[AnyEvalTask]:
    """The tasks on speech."""
    from ttt.eval.speech.librilight import LibriLight
    from ttt.eval.speech.pairs import pair_tasks

    return [*pair_tasks(), LibriLight()]
