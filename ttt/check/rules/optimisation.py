"""Whether training can train (TTT7xx)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ttt.check.rules.rule import Context, rule
from ttt.config.findings import Code, Family, Finding, Severity
from ttt.config.schema import LITERATURE_BASE_LR

_code = partial(Code, family=Family.OPTIMISATION, of_training=True, home=__name__)
TTT701 = _code("TTT701", "a warm-up longer than the run", Severity.WARNING)
TTT702 = _code("TTT702", "nothing that learns", Severity.ERROR)
TTT703 = _code("TTT703", "gates that can never open", Severity.ERROR)
TTT704 = _code("TTT704", "gates that hardly open within the run", Severity.WARNING)
TTT705 = _code("TTT705", "an inner learning rate outside the literature", Severity.WARNING)
TTT706 = _code("TTT706", "autocast on parameters that need none", Severity.WARNING)
TTT707 = _code("TTT707", "a learning rate too low for new TTT layers", Severity.WARNING)

_CLOSED = 0.01
"""Below this α a gate is nearly closed; tanh(α) ≈ α."""
_MOVED = 3e-3
"""How far AdamW must be able to move a new TTT layer's weights in a run. They start at a spread of 0.02 and more.

Muon's updates are scaled to be as large as AdamW's usually are (`ttt.train.updates`), so the same sum of rates serves.

In Moshi's demo the gain of TTT is about 2,500 % × this sum of rates while it is small: at 2e-6 0.2 % after 60 steps
and 0.6 % after 200; at 1e-4, 3e-3 after 60 steps, 5.4 % (`ttt train --backbone moshi --set train.lr=2e-6 --set
train.alpha_lr_multiplier=1`; percentage points of loss against the untrained layers).
"""
_MUON_UPDATE = 0.2
"""Root mean square of Muon's update of a matrix, in its rate: what `match_rms_adamw` makes it (arXiv 2502.16982)."""
_LOW_RATE = 3e-5
"""A peak rate that LoRA and whole models are tuned with. At a higher one a run is short, not its rate low."""


@rule(TTT701, reads=("train.warmup_steps", "train.max_steps"))
def warms_up_in_time(context: Context) -> Iterator[Finding]:
    """The learning rate reaches its peak before the run ends."""
    warmup, steps = context.config.train.warmup_steps, context.config.train.max_steps
    if warmup > steps:
        yield TTT701.at(
            "train.warmup_steps",
            message=(
                f"the run ends after {steps} steps, in the middle of a warm-up of {warmup}: the learning rate only "
                f"reaches {steps / warmup:.0%} of train.lr"
            ),
            fix=f"write warmup_steps: {steps // 10} or so, or a larger max_steps",
            value=warmup,
        )


@rule(TTT702, reads=("adapter", "ttt.layers", "train.trainable"))
def something_learns(context: Context) -> Iterator[Finding]:
    """There is something to train."""
    if not context.has_layers and not context.config.has_lora and context.config.train.trainable == "ttt":
        yield TTT702.at(
            context.first_written("ttt.layers", "train.trainable"),
            message="nothing learns: trainable: ttt trains TTT layers, and the config has none",
            fix="name layers in ttt.layers, or write train.trainable: all for a run without TTT",
        )


def _reach(context: Context) -> float:
    """How far AdamW can move a parameter of multiplier 1 in the whole run: the sum of `lr` over all steps.

    Gates are AdamW's with `optimizer: muon` too, which takes matrices alone.
    """
    train = context.config.train
    rising = min(train.warmup_steps, train.max_steps)
    falling = train.max_steps - rising
    steps = rising / 2 + falling * (1 if train.lr_schedule == "constant" else (1 + train.min_lr_ratio) / 2)
    return steps * train.lr


@rule(TTT703, TTT704, reads=("ttt.layers", "ttt.initial_gating_alpha", "train"))
def gates_open(context: Context) -> Iterator[Finding]:
    """A gate that starts closed can open within the run."""
    alpha, train = context.config.ttt.initial_gating_alpha, context.config.train
    if not context.has_layers or train.init_from is not None:  # with init_from, gates start where the earlier run ended
        return
    if alpha == 0 and train.alpha_lr_multiplier == 0:
        yield TTT703.at(
            context.first_written("ttt.initial_gating_alpha", "train.alpha_lr_multiplier"),
            message=(
                "the gates start at initial_gating_alpha: 0 and alpha_lr_multiplier: 0 never moves them: TTT adds "
                "nothing to the backbone and gets no gradient"
            ),
            fix="write initial_gating_alpha: 0.1, or alpha_lr_multiplier: 10.0",
            value=0,
        )
        return
    reach = _reach(context) * train.alpha_lr_multiplier
    if abs(alpha) < _CLOSED and abs(alpha) + reach < _CLOSED:
        needed = _CLOSED / max(reach, 1e-300)
        longer = f"alpha_lr_multiplier: {train.alpha_lr_multiplier * needed:.2g}" if train.alpha_lr_multiplier else ""
        yield TTT704.at(
            context.first_written("train.alpha_lr_multiplier", "ttt.initial_gating_alpha"),
            message=(
                f"the gates start at α = {alpha:g}, and {train.max_steps} steps at a peak rate of "
                f"{train.lr * train.alpha_lr_multiplier:.2g} can move them by {reach:.2g} at most: TTT stays below "
                f"{_CLOSED:.0%} of its strength to the end"
            ),
            fix=f"write {longer or 'alpha_lr_multiplier: 10.0'} or more, or initial_gating_alpha: 0.1",
            value=reach,
        )


@rule(TTT707, reads=("adapter", "ttt.layers", "train"))
def new_layers_can_learn(context: Context) -> Iterator[Finding]:
    """A rate that was chosen to tune what is trained already leaves new layers where they started."""
    config, train = context.config, context.config.train
    if not context.has_layers or config.adapter == "lora" or train.init_from is not None:
        return
    rate, reach = train.lr * train.weight_lr_multiplier, _reach(context) * train.weight_lr_multiplier
    if rate >= _LOW_RATE or reach >= _MOVED:
        return
    factor = f"weight_lr_multiplier: {train.weight_lr_multiplier * _MOVED / reach:.2g}" if reach else ""
    matrices = train.optimizer == "muon"
    moves = f"matrices by about {_MUON_UPDATE * reach:.1g}" if matrices else f"weights by {reach:.1g} at most"
    yield TTT707.at(
        context.first_written("train.lr", "train.weight_lr_multiplier"),
        message=(
            f"new TTT layers learn at lr × weight_lr_multiplier = {rate:g}, which moves their {moves} in "
            f"{train.max_steps} steps: a rate for what is trained already, such as LoRA's, and they start at random"
        ),
        fix=f"write {factor or 'weight_lr_multiplier: 1.0'} or more, or lr: 1e-4",
        value=rate,
    )


@rule(TTT705, reads=("ttt",))
def inner_rate_as_in_the_literature(context: Context) -> Iterator[Finding]:
    """The inner learning rate is within a factor of ten of the literature's."""
    ttt = context.config.ttt
    usual = LITERATURE_BASE_LR[ttt.layer_type]
    if not context.has_layers or usual / 10 <= ttt.base_lr <= usual * 10:
        return
    yield TTT705.at(
        "ttt.base_lr",
        message=(
            f"base_lr: {ttt.base_lr:g} is {ttt.base_lr / usual:.2g} times what the literature trained layer_type: "
            f"{ttt.layer_type} with: "
            + ("the inner steps overshoot" if ttt.base_lr > usual else "the fast weights hardly move")
        ),
        fix=f"write base_lr: {usual:g}, or a value between {usual / 10:g} and {usual * 10:g}",
        value=ttt.base_lr / usual,
    )


@rule(TTT706, reads=("train.autocast", "train.param_dtype"))
def autocast_has_something_to_cast(context: Context) -> Iterator[Finding]:
    """Autocast is for parameters in float32."""
    train = context.config.train
    if train.autocast != "none" and train.param_dtype == train.autocast:
        yield TTT706.at(
            "train.autocast",
            message=(
                f"autocast: {train.autocast} on parameters in {train.param_dtype} spares nothing: all that is left to "
                f"cast is what the backbone computes in float32 on purpose"
            ),
            fix="write autocast: none, or param_dtype: float32 for mixed precision",
            value=train.autocast,
            replacement="none",
        )
