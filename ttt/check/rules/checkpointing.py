"""What the checkpoints of the scan cost in this config (TTT2xx)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from ttt.amounts import show_bytes
from ttt.check.estimate import enclosing_checkpoints
from ttt.check.rules.rule import NEEDS, Context, rule
from ttt.config.findings import Code, Family, Finding, Severity
from ttt.config.group_size import GroupSizeCost, cost_of_groups_of_one, cost_of_nesting, times_in_words
from ttt.config.schema import TTTConfig
from ttt.costs import ScanCost

_code = partial(Code, family=Family.CHECKPOINTING, of_training=True, home=__name__)
TTT201 = _code("TTT201", "one checkpoint per mini-batch", Severity.WARNING)
TTT202 = _code("TTT202", "checkpoints nested in checkpoints", Severity.NOTE)
TTT203 = _code("TTT203", "a group size far from the best", Severity.NOTE)
TTT204 = _code("TTT204", "a group larger than the sequence", Severity.NOTE)

_FAR = 2.0
"""TTT203 is reported if a group size needs so many times the least memory,"""
_WORTH_BYTES = 64 << 20
"""and so many bytes more."""
_LITERATURE = TTTConfig.model_fields["scan_checkpoint_group_size"].default


def _finding(context: Context, cost: GroupSizeCost, more: str = "", *, code: Code, path: str) -> Finding:
    scan = context.needs.scan
    return code.at(path, cost.message + more, cost.fix, value=scan.groups if scan else None)


def _group_size(context: Context) -> int | None:
    """Mini-batches in a group; None if it is `auto` and the length of windows is unknown."""
    wanted, scan = context.config.ttt.scan_checkpoint_group_size, context.needs.scan
    if wanted == "auto":
        return None if scan is None else scan.group_size
    return wanted


@rule(TTT201, reads=NEEDS)
def one_checkpoint_per_mini_batch(context: Context) -> Iterator[Finding]:
    """A group of one keeps every carry and recomputes every step. Whether that saves memory depends on S and A."""
    ttt, facts, scan = context.config.ttt, context.facts, context.needs.scan
    if not context.has_layers or ttt.scan_checkpoint_group_size == "auto":
        return
    window = facts.window[:1].upper() + facts.window[1:] if facts.tokens_per_window is not None else None
    cost = cost_of_groups_of_one(
        ttt.scan_checkpoint_group_size, ttt.mini_batch_size, tokens=facts.tokens_per_window, window=window
    )
    if cost is not None:
        finding = _finding(context, cost, code=TTT201, path="ttt.scan_checkpoint_group_size")
        yield finding if scan is None or scan.groups < 2 else _by_the_numbers(finding, context, scan)


def _by_the_numbers(finding: Finding, context: Context, scan: ScanCost) -> Finding:
    """The finding about groups of one, with the memory that other groups need."""
    best, everything = scan.with_group_size(scan.best_group_size()), scan.with_group_size(0)
    usual = scan.with_group_size(_LITERATURE)
    if best.group_size == scan.group_size:
        return replace(
            finding,
            severity=Severity.NOTE,
            message=(
                f"{finding.message}; of all groups it needs the least memory, {show_bytes(scan.peak_bytes)} in each "
                f"layer's scan against {show_bytes(usual.peak_bytes)} at {_LITERATURE}, because a mini-batch's "
                f"activations ({show_bytes(scan.activation_bytes)}) outweigh its carry "
                f"({show_bytes(scan.carry_bytes)}); its price is as many checkpoints as mini-batches"
            ),
            fix=f"keep it if memory is short; else write {_LITERATURE}, as the literature trained with, or 0 to run "
            f"every step once",
        )
    worst = "the worst of both, " if scan.peak_bytes >= everything.peak_bytes else ""
    message = f"{finding.message}; {worst}{_compared(context, scan)}"
    if best.keeps_everything:
        return replace(finding, message=message, fix="write 0", replacement="0")
    least = f"write {best.group_size}, which needs least memory and as much time as 1"
    return replace(
        finding, message=message, fix=f"{least}, or 0 to run every step once", replacement=str(best.group_size)
    )


@rule(TTT202, reads=NEEDS)
def nested_checkpoints(context: Context) -> Iterator[Finding]:
    """Activation checkpointing around the scan runs every inner step once more per level."""
    scan, size = context.needs.scan, _group_size(context)
    if not context.has_layers or size is None or (scan is not None and scan.keeps_everything):
        return
    more = ""
    if scan is not None:
        everything = scan.with_group_size(0)
        more = (
            f"; in groups the scan of one layer takes {show_bytes(scan.peak_bytes)}, without them "
            f"{show_bytes(everything.peak_bytes)}"
        )
    own = context.config.train.gradient_checkpointing  # if false, options of the backbone ask for it
    path = "train.gradient_checkpointing" if own else "ttt.scan_checkpoint_group_size"
    cost = cost_of_nesting(
        size,
        context.config.ttt.mini_batch_size,
        scans=enclosing_checkpoints(context.config, context.facts),
        tokens=context.facts.tokens_per_window,
    )
    if cost is not None:
        yield _finding(context, cost, more, code=TTT202, path=path)


@rule(TTT203, reads=NEEDS)
def far_from_the_best_group(context: Context) -> Iterator[Finding]:
    """A group size needs about the least memory that recomputing can reach."""
    scan = context.needs.scan
    if not context.has_layers or scan is None or scan.keeps_everything or scan.group_size == 1:
        return
    best = scan.best_group_size()
    least = scan.with_group_size(best).peak_bytes
    if scan.peak_bytes >= _FAR * least and scan.peak_bytes - least >= _WORTH_BYTES:
        yield TTT203.at(
            "ttt.scan_checkpoint_group_size",
            message=(
                f"scan_checkpoint_group_size: {scan.group_size} is far from the group that needs least memory: "
                f"{scan.steps} mini-batches are {scan.groups} groups, and {_compared(context, scan)}"
            ),
            fix=f"write scan_checkpoint_group_size: {best}; the time and the gradients are the same",
            value=best,
        )


@rule(TTT204, reads=NEEDS)
def group_larger_than_the_sequence(context: Context) -> Iterator[Finding]:
    """A group is smaller than a window, or the default."""
    scan, size = context.needs.scan, context.config.ttt.scan_checkpoint_group_size
    if not context.has_layers or scan is None or size in ("auto", 0, _LITERATURE) or int(size) <= scan.steps:
        return
    if not context.is_written("ttt.scan_checkpoint_group_size"):
        return
    yield TTT204.at(
        "ttt.scan_checkpoint_group_size",
        message=(
            f"{context.facts.window} gives the scan {scan.steps} mini-batches, so groups of {size} never split it: "
            f"everything is kept ({show_bytes(scan.kept_bytes)} in each layer's scan) and no group runs again"
        ),
        fix=(
            f"write 0 to say so, or at most {max(scan.steps - 1, 1)} to recompute ({scan.best_group_size()} needs "
            f"least memory)"
            if scan.steps > 1
            else "write 0 to say so"
        ),
        value=scan.steps,
    )


def _compared(context: Context, scan: ScanCost) -> str:
    """Compare the memory of a group size with that of the best one, in a sentence."""
    scans = enclosing_checkpoints(context.config, context.facts)

    def forwards(cost: ScanCost) -> str:
        return times_in_words([cost.forwards(enclosing=level) for level in scans])

    best = scan.with_group_size(scan.best_group_size())
    if best.group_size == scan.group_size:  # it is the best: compare with keeping everything
        best = scan.with_group_size(0)
    kept = f"{scan.kept_carries} carries are kept ({show_bytes(scan.carries_kept_bytes)} in each layer)"
    if best.keeps_everything:
        against = f"keeping everything needs {show_bytes(best.peak_bytes)} and runs each step {forwards(best)}"
    else:
        against = f"groups of {best.group_size} need {show_bytes(best.peak_bytes)}"
    return (
        f"{kept}, every inner step runs forward {forwards(scan)} and the scan of a layer needs "
        f"{show_bytes(scan.peak_bytes)}, where {against}"
    )
