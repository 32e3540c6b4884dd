"""Whether the layers that a config asks for can exist in its backbone (TTT11x)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ttt.check.rules.rule import FACTS, Context, rule
from ttt.config.findings import Code, Family, Finding, Severity

_code = partial(Code, family=Family.SCHEMA, home=__name__)
TTT111 = _code("TTT111", "a layer that the backbone does not have", Severity.ERROR)
TTT112 = _code("TTT112", "a width that does not divide into heads", Severity.ERROR)
TTT113 = _code("TTT113", "rotary embedding on heads of odd width", Severity.ERROR)
TTT114 = _code("TTT114", "an inner model without hidden units", Severity.ERROR)

_FAR = 1 << 16
"""How far from the wrong number of heads a divisor is searched."""


@rule(TTT111, reads=("ttt.layers", FACTS))
def layers_exist(context: Context) -> Iterator[Finding]:
    """Every layer number is one of the backbone's."""
    layers, count = context.config.ttt.layers, context.facts.num_layers
    if isinstance(layers, str):
        return
    for index, layer in enumerate(layers):
        if layer >= count:
            yield TTT111.at(
                f"ttt.layers.{index}",
                message=f"layer {layer} does not exist: the backbone has {count}, numbered 0 to {count - 1}",
                fix=f"write numbers from 0 to {count - 1}",
                value=layer,
            )


@rule(TTT112, reads=("ttt.layers", "ttt.num_heads", FACTS))
def width_divides(context: Context) -> Iterator[Finding]:
    """The model's width divides into heads."""
    dim, heads = context.facts.dim, context.config.ttt.num_heads or context.facts.num_heads
    if dim % heads and context.has_layers:
        below, above = _divisors_around(dim, heads)
        yield TTT112.at(
            "ttt.num_heads",
            message=f"the backbone's width {dim} does not divide into {heads} heads",
            fix=f"write num_heads: {below}" + (f" or {above}" if above else ""),
            value=dim / heads,
        )


@rule(TTT113, reads=("ttt.layers", "ttt.num_heads", "ttt.rope", FACTS))
def rotary_pairs(context: Context) -> Iterator[Finding]:
    """Heads have an even width, because rotary embedding rotates pairs of channels."""
    ttt, dim = context.config.ttt, context.facts.dim
    heads = ttt.num_heads or context.facts.num_heads
    if dim % heads == 0 and (dim // heads) % 2 and ttt.rope != "none" and context.has_layers:
        yield TTT113.at(
            context.first_written("ttt.rope", "ttt.num_heads"),
            message=(
                f"rope: {ttt.rope} turns pairs of channels, but {heads} heads of the width {dim} are "
                f"{dim // heads} wide, an odd number"
            ),
            fix="write rope: none, or a num_heads that gives heads of even width",
            value=dim // heads,
        )


@rule(TTT114, reads=("ttt", FACTS))
def hidden_units(context: Context) -> Iterator[Finding]:
    """The inner MLP has at least one hidden unit."""
    ttt, dim = context.config.ttt, context.facts.dim
    heads = ttt.num_heads or context.facts.num_heads
    if ttt.layer_type != "mlp" or ttt.mlp_hidden_dims is not None or dim % heads or not context.has_layers:
        return
    hidden = dim // heads * ttt.mlp_expansion_factor
    if round(hidden) < 1:
        yield TTT114.at(
            "ttt.mlp_expansion_factor",
            message=f"{ttt.mlp_expansion_factor:g} times the head width {dim // heads} leaves no hidden unit",
            fix=f"write mlp_expansion_factor: {1 / (dim // heads):g} or more; the literature has 4",
            value=hidden,
        )


def _divisors_around(number: int, near: int) -> tuple[int, int | None]:
    """The nearest divisors of `number` below and above `near`; 1 and None if they are far from it."""
    near = min(near, number)
    below = next((divisor for divisor in range(near, max(near - _FAR, 0), -1) if number % divisor == 0), 1)
    last = min(near + _FAR, number)
    above = next((divisor for divisor in range(near + 1, last + 1) if number % divisor == 0), None)
    return below, above
