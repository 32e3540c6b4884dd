"""The result of a run, for the caller and in `summary.json`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt.checkpoint_folder import Checkpoint
from ttt.config.schema import RunConfig
from ttt.errors import ConfigError, DamagedFileWarning, EnvironmentProblem
from ttt.files import read_json, write_json
from ttt.train.claim import SUMMARY
from ttt.train.evaluation import Evaluation
from ttt.train.metrics import finite
from ttt.train.rundir import RunDir


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    run_dir: Path
    steps: int
    """Optimiser steps done, including those before the run was resumed."""
    interrupted: bool
    """Whether it was interrupted before its last step, or before its closing evaluation, was done."""
    loss: float | None
    """Training loss of the last step; None if no step was done."""
    evaluation: Evaluation | None
    """The closing outer loss, with open and with closed gates; None if the run was interrupted."""
    checkpoint: Path | None
    """The last checkpoint, with the adapter in it."""
    resume_command: str
    """Continues the run if it was interrupted, or once `train.max_steps` is raised."""


def write_summary(result: TrainResult, more: Mapping[str, Any]) -> None:
    """Write `summary.json` of a finished run, with the entries of `more` added."""
    assert result.checkpoint is not None
    assert result.evaluation is not None
    content = {
        "steps": result.steps,
        "final_checkpoint": result.checkpoint.relative_to(result.run_dir).as_posix(),
        "loss": result.loss,
        **result.evaluation.as_line(),
        **more,
    }
    write_json(result.run_dir / SUMMARY, finite(content))


def finished(run: RunDir, checkpoint: Checkpoint, config: RunConfig) -> TrainResult | None:
    """The result of a run that has nothing left to do; None if something is left.

    Raises:
        ConfigError: the run has done more steps than `train.max_steps`.
    """
    if checkpoint.step > config.train.max_steps:
        raise ConfigError(
            f"train.max_steps: {config.train.max_steps}, but {run.path} has done {checkpoint.step} steps; raise it"
        )
    if checkpoint.step < config.train.max_steps or not (run / SUMMARY).is_file():
        return None
    try:
        summary = read_json(run / SUMMARY, sealed=True)
    except EnvironmentProblem as problem:
        warnings.warn(f"{problem} (the run sums itself up anew)", DamagedFileWarning, stacklevel=2)
        return None
    if summary.get("steps") != checkpoint.step:
        return None
    try:
        evaluation = Evaluation(
            str(summary["eval_split"]),
            int(summary["eval_windows"]),
            _float(summary["eval_loss"]),
            _float(summary["eval_loss_gates_closed"]),
            int(summary.get("eval_windows_available", 0)),
            tasks={key: _float(value) for key, value in summary.items() if "/" in key},
            adapter=config.adapter,
            loss_ema=_float(summary["eval_loss_ema"]) if "eval_loss_ema" in summary else None,
        )
        loss = _float(summary["loss"])
    except (KeyError, TypeError, ValueError):
        return None  # edited by hand; the run writes its summary again
    if not evaluation.is_finite:
        return None  # the closing evaluation is not finite; the run evaluates again
    return TrainResult(
        run_dir=run.path,
        steps=checkpoint.step,
        interrupted=False,
        loss=loss,
        evaluation=evaluation,
        checkpoint=checkpoint.path,
        resume_command=run.resume_command(),
    )


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)
