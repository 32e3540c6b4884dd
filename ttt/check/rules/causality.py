"""Which tokens a token may learn from, and which state a window may start with (TTT3xx)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ttt.check.rules.rule import FACTS, Context, rule
from ttt.config.findings import Code, Family, Finding, Severity
from ttt.config.sources import sources_of

_code = partial(Code, family=Family.CAUSALITY, home=__name__)
TTT301 = _code("TTT301", "a non-causal update in a causal backbone", Severity.ERROR)
TTT302 = _code("TTT302", "carried state with shuffled data", Severity.ERROR)
TTT303 = _code("TTT303", "a window shorter than one mini-batch", Severity.WARNING)
TTT304 = _code("TTT304", "carried state without a boundary", Severity.WARNING)
TTT305 = _code("TTT305", "carried state with nothing to carry", Severity.WARNING)
TTT306 = _code("TTT306", "windows that do not divide into mini-batches", Severity.NOTE)

_WASTE = 0.25
"""Share of padding from which TTT306 is reported."""


@rule(TTT301, reads=("backbone.name", "ttt.preset", "ttt.layers", "ttt.causal", "ttt.mini_batch_size"))
def leaks_the_future(context: Context) -> Iterator[Finding]:
    """In a causal backbone, a token learns only from itself and earlier tokens."""
    ttt = context.config.ttt
    if context.backbone.causal and not ttt.causal and ttt.mini_batch_size > 1 and context.has_layers:
        yield TTT301.at(
            context.first_written("ttt.causal", "ttt.preset"),
            message=(
                f"causal: false lets every token learn from up to {ttt.mini_batch_size - 1} tokens after it, but "
                f"{context.backbone.name} predicts them: training looks good and generation fails"
            ),
            fix="write causal: true (or mini_batch_size: 1, where there is nothing to leak)",
            value=ttt.mini_batch_size,
        )


@rule(TTT302, reads=("ttt.persistent_states", "ttt.layers", "data.shuffle"))
def persistent_states_with_shuffle(context: Context) -> Iterator[Finding]:
    """Fast weights are carried only to the window that follows."""
    if context.config.ttt.persistent_states and context.config.data.shuffle is True:
        written = context.is_written("data.shuffle")
        yield TTT302.at(
            "data.shuffle" if written else "ttt.persistent_states",
            message=(
                "persistent_states: true starts a window with what the window before it taught, but "
                f"data.shuffle: true{'' if written else ', the default,'} reads windows in random order"
            ),
            fix="write data.shuffle: false, or files for files in random order, or persistent_states: false",
        )


@rule(TTT303, reads=("ttt.layers", "ttt.mini_batch_size", "ttt.persistent_states", FACTS))
def never_a_second_mini_batch(context: Context) -> Iterator[Finding]:
    """A window holds at least one whole mini-batch."""
    ttt, facts = context.config.ttt, context.facts
    tokens = facts.tokens_per_window
    if tokens is None or tokens >= ttt.mini_batch_size or ttt.persistent_states or not context.has_layers:
        return
    yield TTT303.at(
        "ttt.mini_batch_size",
        message=(
            f"{facts.window} is {tokens} tokens, fewer than one mini-batch of {ttt.mini_batch_size}: the fast weights "
            f"never move on to a second mini-batch"
        ),
        fix=f"write a mini_batch_size below {tokens}, or train on longer windows",
        value=tokens,
    )


@rule(TTT304, TTT305, reads=("ttt", "data", "train.batch_size", FACTS))
def carries_across_a_file(context: Context) -> Iterator[Finding]:
    """If states are carried, files are longer than a window, and there is more than one."""
    ttt, facts, data = context.config.ttt, context.facts, context.config.data
    if not ttt.persistent_states or data.shuffle is True or facts.recordings is None or not context.has_layers:
        return
    lines = context.recordings("train_data")
    if lines is None or not lines.complete or not lines.seconds:
        return
    named = sources_of(data, "train_data")[0].path
    if len(lines.seconds) == 1 and context.config.train.batch_size == 1:
        yield TTT304.at(
            "ttt.persistent_states",
            message=(
                f"{named} is one recording of {lines.seconds[0]:g} s: carried states have no file boundary "
                f"to start over at, so nothing in the run shows the layers a beginning but the first window"
            ),
            fix="write one line for each recording in the data, or persistent_states: false",
            value=1,
        )
    elif max(lines.seconds) <= facts.recordings.window_sec:
        yield TTT305.at(
            "ttt.persistent_states",
            message=(
                f"none of the {len(lines.seconds)} recordings is longer than {facts.window}: each is one window, so "
                f"persistent_states: true carries nothing"
            ),
            fix="write a shorter window, name longer recordings, or write persistent_states: false",
            value=max(lines.seconds),
        )


@rule(TTT306, reads=("ttt", FACTS))
def windows_divide(context: Context) -> Iterator[Finding]:
    """If mini-batches do not divide a window, each row of a batch ends at another place, which costs padding."""
    ttt, tokens = context.config.ttt, context.facts.tokens_per_window
    if tokens is None or not (ttt.persistent_states and ttt.causal) or not tokens % ttt.mini_batch_size:
        return
    if not context.has_layers:
        return
    width = min(tokens, ttt.mini_batch_size)
    slots = 2 * width + (tokens - 1) // ttt.mini_batch_size * ttt.mini_batch_size
    waste = 1 - tokens / slots
    if waste >= _WASTE:
        below = next(size for size in range(ttt.mini_batch_size - 1, 0, -1) if tokens % size == 0)
        yield TTT306.at(
            "ttt.mini_batch_size",
            message=(
                f"{context.facts.window} is {tokens} tokens, which mini-batches of {ttt.mini_batch_size} do not "
                f"divide, so a window that is carried into begins inside one: {waste:.0%} of the {slots} slots "
                f"computed for it are padding"
            ),
            fix=f"write mini_batch_size: {below}, which divides {tokens}, or windows that the mini-batch divides",
            value=slots - tokens,
        )
