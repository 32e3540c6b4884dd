"""The `eval` section of a config: how a run is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ttt.config.misfit import Misfit
from ttt.config.section import Section
from ttt.config.tasks import Tasks
from ttt.config.values import MOST_STEPS, MOST_WINDOWS, WholeNumber


class ScoreOptions(Section):
    """Base of a plugin's `eval.score` section: how the score of a clip is made."""

    normalise: Literal["mean", "sum", "continuation"] = "mean"
    """The mean over a clip's positions, their sum, or the mean over what follows the common beginning of a pair."""


class EvalConfig(Section):
    """The `eval` section."""

    eval_freq: Annotated[WholeNumber, Field(ge=0, le=MOST_STEPS)] = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    max_batches: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """How many batches an evaluation reads; null reads all held-out data, or 64 windows of training data instead."""
    tasks: Tasks = ()
    """Evaluation tasks of plugins, each `{name: …}` with its own options: measured at every evaluation."""
    score: ScoreOptions = Field(default_factory=ScoreOptions)
    """How the score of a clip is made, for tasks that compare likelihoods."""
    eval_batch_size: Annotated[int, Field(ge=1, le=MOST_WINDOWS)] = 8
    """Items that a task reads side by side."""
    reset_sec: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """After how many seconds the arm `reset` of `ttt eval` starts fast weights anew; null is 15."""
    reset_tokens: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """The same in positions, instead of seconds; for backbones that read no sound."""

    @model_validator(mode="after")
    def _one_reset(self) -> EvalConfig:
        if self.reset_sec is not None and self.reset_tokens is not None:
            raise Misfit(
                "reset_sec and reset_tokens both say when the arm `reset` starts anew",
                keys=("reset_sec", "reset_tokens"),
                fix="leave one of them out",
            )
        return self
