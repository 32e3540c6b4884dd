"""Types of the values in a config: what may be written for them, and the largest accepted values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ttt.config.misfit import Misfit


def _whole_number(value: object) -> object:
    """Turn a float without a fraction, such as `1e6`, into a whole number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


MOST_STEPS = 10**12
"""Largest number of steps, of a run or between two events: more than any run has."""
MOST_WINDOWS = 1 << 20
"""Windows in a forward pass, forward passes in a step, checkpoints that stay."""
MOST_LAYERS = 4096
"""Layers of a backbone, and numbers of them in a list."""
MOST_HEADS = 1 << 16
"""Heads of a layer."""
MOST_RANK = 1 << 20
"""Of LoRA."""
MOST_UNITS = 10**12
"""Width of an inner model's hidden layer."""
MOST_RATE = 1e30
"""Of a learning rate: with its multiplier it is still a number in float32."""
MOST_FACTOR = 1e6
"""Of what a rate or a loss is multiplied by."""
_DIGITS = len(str(MOST_LAYERS))


def as_tuple(value: object) -> object:
    """Turn a list, the only sequence in YAML, into a tuple."""
    return tuple(value) if isinstance(value, list) else value


_LAYERS = 'write "all", "middle", "none", a list of layer numbers, or "29,30,31"'


def _parse_layers(value: object) -> object:
    """Turn `"29,30,31"` and lists into a tuple; leave words to the type."""
    if isinstance(value, str) and value not in {"all", "middle", "none"}:
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise Misfit(fix=_LAYERS)
        long = next((part for part in parts if len(part.lstrip("0")) > _DIGITS), None)
        if long is not None:
            raise Misfit(f"no backbone has a layer {long[:40]}", fix=f"write numbers from 0 to {MOST_LAYERS - 1}")
        value = tuple(int(part) for part in parts)
    if isinstance(value, bool):
        raise Misfit(fix=_LAYERS)
    if isinstance(value, int):
        value = (value,)
    value = as_tuple(value)
    numbers = [layer for layer in value if isinstance(layer, int)] if isinstance(value, tuple) else []
    if len(set(numbers)) != len(numbers):
        raise Misfit("a layer is named twice")
    return value


WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
Layers = Annotated[
    Literal["all", "middle", "none"]
    | Annotated[tuple[Annotated[int, Field(ge=0, lt=MOST_LAYERS)], ...], Field(max_length=MOST_LAYERS)],
    BeforeValidator(_parse_layers, json_schema_input_type=Literal["all", "middle", "none"] | str | int | list[int]),
]
Epsilon = Annotated[float, Field(ge=1e-30, le=1)]
"""A number that protects a division from zero, also in float32, in which 1e-46 is 0."""
HiddenDims = Annotated[
    Annotated[tuple[Annotated[int, Field(ge=1, le=MOST_UNITS)], ...], Field(max_length=15)],
    BeforeValidator(as_tuple, json_schema_input_type=list[int]),
]
