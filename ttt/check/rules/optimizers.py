"""Whether `train.optimizer` can run: on this machine (TTT610), and in the layout of the processes (TTT609)."""

from __future__ import annotations

from collections.abc import Iterator

from ttt.check.estimate import written_layout
from ttt.check.rules.rule import Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.machine import missing_for_8bit, processes_launched
from ttt.parallel.layout import NOT_SPLIT, Layout, layout_of, needs_whole_matrices

TTT610 = Code(
    "TTT610",
    "an optimizer that this machine lacks",
    Severity.ERROR,
    family=Family.ENVIRONMENT,
    blames=Blame.MACHINE,
    of_training=True,
    home=__name__,
)
TTT609 = Code(
    "TTT609",
    "an optimizer that cannot update split parameters",
    Severity.ERROR,
    family=Family.ENVIRONMENT,
    blames=Blame.CONFIG,
    of_training=True,
    home=__name__,
)


@rule(TTT610, reads=("train.optimizer", "train.device"))
def optimizer_runs_here(context: Context) -> Iterator[Finding]:
    """The optimiser's package is installed, and the run is not on a CPU if it needs a GPU."""
    train = context.config.train
    missing = missing_for_8bit(train.device) if train.optimizer == "adamw_8bit" else None
    if missing is not None:
        yield TTT610.at("train.optimizer", message=missing.problem, fix=missing.fix, value=train.optimizer)


@rule(TTT609, reads=("train.optimizer", "train.parallel"))
def optimizer_has_whole_matrices(context: Context) -> Iterator[Finding]:
    """No process has only a part of a parameter that the optimiser needs whole."""
    train = context.config.train
    split = needs_whole_matrices(train, _least_split(context))
    if split is not None:
        yield TTT609.at("train.optimizer", message=split, fix=f"write {NOT_SPLIT}", value=train.optimizer)


def _least_split(context: Context) -> Layout:
    """The layout of the processes that were started; if they are not as many, the sizes that are written."""
    parallel = context.config.train.parallel
    try:
        return layout_of(parallel, processes_launched())
    except ValueError:
        return written_layout(context.config.train)
