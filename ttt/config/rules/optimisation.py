"""Whether training can train (TTT7xx)."""

from __future__ import annotations

from collections.abc import Iterator

from ttt.config.diagnostics import Finding, Severity
from ttt.config.rules.rule import Context, rule


@rule("train.warmup_steps", "train.max_steps")
def warms_up_in_time(context: Context) -> Iterator[Finding]:
    """The learning rate reaches its peak before the run ends."""
    warmup, steps = context.config.train.warmup_steps, context.config.train.max_steps
    if warmup > steps:
        yield Finding(
            code="TTT701",
            severity=Severity.WARNING,
            path="train.warmup_steps",
            message=(
                f"the run ends after {steps} steps, in the middle of a warm-up of {warmup}: the learning rate only "
                f"reaches {steps / warmup:.0%} of train.lr"
            ),
            fix=f"write warmup_steps: {steps // 10} or so, or a larger max_steps",
            value=warmup,
        )


@rule("ttt.layers", "train.trainable")
def something_learns(context: Context) -> Iterator[Finding]:
    """There is something to train."""
    if context.config.ttt.layers in ("none", ()) and context.config.train.trainable == "ttt":
        yield Finding(
            code="TTT702",
            severity=Severity.ERROR,
            path=context.first_written("ttt.layers", "train.trainable"),
            message="nothing learns: trainable: ttt trains TTT layers, and the config has none",
            fix="name layers in ttt.layers, or write train.trainable: all for a run without TTT",
        )


RULES = (warms_up_in_time, something_learns)
