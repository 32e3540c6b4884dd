"""What a run reads, and what it is measured on (TTT5xx)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ttt.config.diagnostics import Finding, Severity
from ttt.config.rules.rule import Context, rule


@rule("data.train_data", "data.eval_data")
def files_exist(context: Context) -> Iterator[Finding]:
    """The data that a config names is there."""
    for key in ("train_data", "eval_data"):
        written = getattr(context.config.data, key)
        if written is None or _exists(written):
            continue
        where = "" if Path(written).is_absolute() else f" in {Path.cwd()}, from where relative paths are read"
        home = "; ~ is not expanded" if written.startswith("~") else ""
        yield Finding(
            code="TTT501",
            severity=Severity.ERROR,
            path=f"data.{key}",
            message=f"{written!r} does not exist{where}{home}",
            fix="write the path of the data" + (", or null for the demo data" if key == "train_data" else ", or null"),
            value=written,
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


@rule("data.train_data", "data.eval_data")
def measures_unseen_data(context: Context) -> Iterator[Finding]:
    """Own training data comes with own held-out data."""
    data = context.config.data
    same = data.eval_data is not None and data.eval_data == data.train_data
    if data.train_data is not None and _exists(data.train_data) and (data.eval_data is None or same):
        yield Finding(
            code="TTT502",
            severity=Severity.NOTE,
            path="data.eval_data" if same else "data.train_data",
            message="the evaluation reads the training data, so it does not tell learning from memorising",
            fix="write data.eval_data with data that is held out",
        )


@rule("eval.eval_freq", "train.max_steps")
def evaluates(context: Context) -> Iterator[Finding]:
    """An evaluation that is asked for comes before the run ends."""
    freq, steps = context.config.eval.eval_freq, context.config.train.max_steps
    if freq > steps:
        yield Finding(
            code="TTT503",
            severity=Severity.WARNING,
            path="eval.eval_freq",
            message=f"an evaluation every {freq} steps never comes in a run of {steps}; only the one at the end does",
            fix=f"write eval_freq: 0 for the end alone, or at most {steps}",
            value=freq,
        )


RULES = (files_exist, measures_unseen_data, evaluates)
