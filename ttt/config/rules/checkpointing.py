"""What the checkpoints of the scan cost in this config (TTT2xx)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ttt.config.diagnostics import Finding, Severity
from ttt.config.rules.rule import FACTS, Context, rule
from ttt.config.schema import checkpoint_groups, group_size_warnings
from ttt.config.validation import split_fix


def _costs(context: Context, *, gradient_checkpointing: bool) -> list[str]:
    """The schema's own words for what the group size costs, in this config's numbers."""
    ttt, facts = context.config.ttt, context.facts
    if ttt.layers in ("none", ()):
        return []
    return group_size_warnings(
        ttt.scan_checkpoint_group_size,
        ttt.mini_batch_size,
        tokens=facts.tokens_per_window,
        window=facts.window[:1].upper() + facts.window[1:] if facts.tokens_per_window is not None else None,
        gradient_checkpointing=gradient_checkpointing,
    )


def _finding(context: Context, text: str, *, code: str, severity: Severity, path: str) -> Finding:
    ttt, tokens = context.config.ttt, context.facts.tokens_per_window
    message, fix = split_fix(text)
    groups = None if tokens is None else checkpoint_groups(tokens, ttt.mini_batch_size, ttt.scan_checkpoint_group_size)
    return Finding(code=code, severity=severity, path=path, message=message, fix=fix, value=groups)


@rule("ttt.layers", "ttt.scan_checkpoint_group_size", "ttt.mini_batch_size", FACTS)
def one_checkpoint_per_mini_batch(context: Context) -> Iterator[Finding]:
    """A group of one keeps every carry and recomputes every step."""
    for text in _costs(context, gradient_checkpointing=False):
        finding = _finding(
            context, text, code="TTT201", severity=Severity.WARNING, path="ttt.scan_checkpoint_group_size"
        )
        yield replace(finding, replacement="16")


@rule(
    "ttt.layers",
    "ttt.scan_checkpoint_group_size",
    "ttt.mini_batch_size",
    "train.gradient_checkpointing",
    FACTS,
)
def nested_checkpoints(context: Context) -> Iterator[Finding]:
    """Activation checkpointing around the scan runs every inner step once more."""
    alone = _costs(context, gradient_checkpointing=False)
    for text in _costs(context, gradient_checkpointing=context.config.train.gradient_checkpointing):
        if text not in alone:
            yield _finding(context, text, code="TTT202", severity=Severity.NOTE, path="train.gradient_checkpointing")


RULES = (one_checkpoint_per_mini_batch, nested_checkpoints)
