"""The hook of the tasks on video. Its entry point is this distribution's own."""

from __future__ import annotations

from collections.abc import Sequence

from ttt.plugins import AnyEvalTask, hookimpl


@hookimpl
def ttt_eval_tasks() -> Sequence[AnyEvalTask]:
    """The tasks on what a backbone denoises, and on samples that it makes."""
    from ttt.eval.video.denoising import DiffusionLoss
    from ttt.eval.video.samples import Samples
    from ttt.eval.video.vbench import VBenchTask

    return [DiffusionLoss(), Samples(), VBenchTask()]
