"""What the machine must have (TTT6xx)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ttt.check.rules.rule import FACTS, Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.machine import launch_is_incomplete, processes_launched, why_unusable
from ttt.parallel.layout import NO_HEADS, NOT_COMPILED, Layout, layout_of, planned_layout, uneven, uneven_heads

_code = partial(Code, family=Family.ENVIRONMENT, blames=Blame.MACHINE, of_training=True, home=__name__)
TTT601 = _code("TTT601", "a run_dir that cannot be written", Severity.ERROR)
TTT602 = Code(
    "TTT602",
    "processes that cannot share the run",
    Severity.ERROR,
    family=Family.ENVIRONMENT,
    blames=Blame.CONFIG,
    of_training=True,
    home=__name__,
)


@rule(TTT601, reads=("run_dir",))
def run_dir_can_be_made(context: Context) -> Iterator[Finding]:
    """The run's folder can be created and written to."""
    run_dir = context.config.run_dir
    cause = None if run_dir is None else why_unusable(run_dir)
    if run_dir is not None and cause:
        yield TTT601.at(
            "run_dir",
            message=f"{_shortened(run_dir)!r} cannot hold the run: {cause}",
            fix="write a folder that can be made there, or null for a new one under runs/",
            value=run_dir,
        )


def _shortened(path: str) -> str:
    return path if len(path) <= 300 else f"{path[:300]}…"


@rule(TTT602, reads=("train",))
def processes_can_share_the_run(context: Context) -> Iterator[Finding]:
    """The processes of a launch know each other, are as many as `train.parallel` says, and divide the rows evenly."""
    incomplete, train = launch_is_incomplete(), context.config.train
    if incomplete:
        yield TTT602.at(
            "run_dir",
            message=f"{incomplete}, so the processes cannot find each other, and each would train a run of its own",
            fix="start them with `ttt train CONFIG --nproc N`, `torchrun` or `ttt submit`",
            value=incomplete,
        )
        return
    count = processes_launched()
    try:
        layout: Layout | None = layout_of(train.parallel, count) if count > 1 else planned_layout(train.parallel)
    except ValueError as error:
        yield TTT602.at(
            "train.parallel",
            message=f"{count} processes were started, but {error}",
            fix=f"start as many, or write sizes whose product is {count}",
            value=count,
        )
        return
    cannot = None if layout is None else uneven(train, layout)
    if cannot and layout is not None:
        yield TTT602.at(
            "train.batch_size",
            message=cannot,
            fix=f"write a multiple of {layout.data_size}, or a larger parallel.tensor: processes that share heads read "
            "the same rows",
            value=train.batch_size,
        )


@rule(TTT602, reads=(FACTS, "ttt", "train"))
def heads_can_be_shared(context: Context) -> Iterator[Finding]:
    """`train.parallel.tensor` divides the heads of the TTT layers, which are there, and are not compiled."""
    train, tensor = context.config.train, context.config.train.parallel.tensor
    if tensor == 1:
        return
    heads = context.config.ttt.num_heads or context.facts.num_heads
    cannot = uneven_heads(heads, tensor) if context.has_layers else NO_HEADS
    if cannot:
        yield TTT602.at(
            "train.parallel.tensor",
            message=cannot,
            fix=f"write a number that divides {heads}" if context.has_layers else "write 1",
            value=tensor,
        )
    elif train.compile:
        yield TTT602.at(
            "train.compile", message=NOT_COMPILED, fix="write compile: false, or parallel: {tensor: 1}", value=True
        )
