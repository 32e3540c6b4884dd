"""What a token may know, and what a window may inherit (TTT3xx)."""

from __future__ import annotations

from collections.abc import Iterator

from ttt.config.diagnostics import Finding, Severity
from ttt.config.rules.rule import FACTS, Context, rule


@rule("backbone.name", "ttt.preset", "ttt.layers", "ttt.causal", "ttt.mini_batch_size")
def leaks_the_future(context: Context) -> Iterator[Finding]:
    """In a causal backbone a token learns only from those before it."""
    ttt = context.config.ttt
    if context.backbone.causal and not ttt.causal and ttt.mini_batch_size > 1 and ttt.layers not in ("none", ()):
        yield Finding(
            code="TTT301",
            severity=Severity.ERROR,
            path=context.first_written("ttt.causal", "ttt.preset"),
            message=(
                f"causal: false lets every token learn from up to {ttt.mini_batch_size - 1} tokens after it, but "
                f"{context.backbone.name} predicts them: training looks good and generation fails"
            ),
            fix="write causal: true (or mini_batch_size: 1, where there is nothing to leak)",
            value=ttt.mini_batch_size,
        )


@rule("ttt.persistent_states", "ttt.layers", "data.shuffle")
def carries_between_strangers(context: Context) -> Iterator[Finding]:
    """Fast weights are carried only to the window that follows."""
    if context.config.ttt.persistent_states and context.config.data.shuffle:
        written = context.is_written("data.shuffle")
        yield Finding(
            code="TTT302",
            severity=Severity.ERROR,
            path="data.shuffle" if written else "ttt.persistent_states",
            message=(
                "persistent_states: true starts a window with what the window before it taught, but "
                f"data.shuffle: true{'' if written else ', the default,'} reads windows in random order"
            ),
            fix="write data.shuffle: false, or persistent_states: false",
        )


@rule("ttt.layers", "ttt.mini_batch_size", "ttt.persistent_states", FACTS)
def never_a_second_mini_batch(context: Context) -> Iterator[Finding]:
    """A window holds at least one whole mini-batch."""
    ttt, facts = context.config.ttt, context.facts
    tokens = facts.tokens_per_window
    if tokens is None or tokens >= ttt.mini_batch_size or ttt.persistent_states or ttt.layers in ("none", ()):
        return
    yield Finding(
        code="TTT303",
        severity=Severity.WARNING,
        path="ttt.mini_batch_size",
        message=(
            f"{facts.window} is {tokens} tokens, fewer than one mini-batch of {ttt.mini_batch_size}: the fast weights "
            f"never move on to a second mini-batch"
        ),
        fix=f"write a mini_batch_size below {tokens}, or train on longer windows",
        value=tokens,
    )


RULES = (leaks_the_future, carries_between_strangers, never_a_second_mini_batch)
