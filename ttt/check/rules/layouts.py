"""Which layouts of several devices a run fits in, if the caller asks for that (TTT406, TTT407)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ttt.amounts import show_bytes
from ttt.check.layouts import LayoutNeeds, Proposal, longest_window, needs_of_layouts, proposal, sharded, with_keys
from ttt.check.rules.memory import memory_of
from ttt.check.rules.rule import NEEDS, Context, rule
from ttt.config.findings import Code, Family, Finding, Severity
from ttt.parallel.layout import layout_of

_code = partial(Code, family=Family.MEMORY, of_training=True, home=__name__)
TTT406 = _code("TTT406", "what a run needs on several devices", Severity.NOTE)
TTT407 = _code("TTT407", "no layout of the devices surely fits", Severity.WARNING)

KEY = "train.parallel"


@rule(TTT406, TTT407, reads=(*NEEDS, "backbone.name"))
def layouts_of_the_devices(context: Context) -> Iterator[Finding]:
    """What one device needs and sends in each layout, and the least sharded one that fits."""
    devices, memory = context.devices, memory_of(context)
    if devices is None:
        return
    listed = needs_of_layouts(context.config, context.facts, context.lora_shapes, devices)
    table = {"devices": devices, "memory_bytes": memory, "layouts": [each.as_data(memory) for each in listed]}
    if memory is None:
        told = f"{_on(devices, None)} {_range(listed)}{_written_otherwise(context, devices)}"
        yield TTT406.at(KEY, told, "say how much memory one has: --memory 80GiB", value=table)
        return
    found = proposal(context.config, context.backbone.facts, context.lora_shapes, devices, memory)
    if found is None:
        yield _none_fits(context, listed, devices, memory, table)
        return
    keys = found.needs.written(found.changed, context.config)
    code = TTT406 if found.surely else TTT407
    yield code.at(
        KEY,
        message=_proposed(context, found, listed, devices, memory) + _written_otherwise(context, devices),
        fix=f"write {in_one_line(keys)}{_or_larger_steps(context, found, listed, memory)}"
        + ("" if found.surely else f"; {_or(context, devices, memory)}"),
        value={**table, "write": keys},
    )


def _written_otherwise(context: Context, devices: int) -> str:
    """What there is to say if `train.parallel` is of another number of devices."""
    try:
        layout_of(context.config.train.parallel, devices)
    except ValueError as error:
        return f"; train.parallel as it is written is for others: {error}"
    return ""


def _proposed(context: Context, found: Proposal, listed: Sequence[LayoutNeeds], devices: int, memory: int) -> str:
    """What the proposed layout is, needs and sends."""
    needs, sizes = found.needs.needs, found.needs.layout
    less = any(each.grows and each.fits(memory) and sharded(each.layout) < sharded(sizes) for each in listed)
    same = " with the config's windows in a step" if less and not found.needs.grows else ""
    verb = f"that fits{same}" if found.surely else "surely fits; the one that may and needs the least"
    which = f"{'the least sharded layout' if found.surely else 'no layout'} {verb}"
    about = "" if needs.complete else ", as far as the backbone tells (TTT alone)"
    told = (
        f"{_on(devices, memory)} {which} is replicate {sizes.replicate}, shard {sizes.shard}, tensor {sizes.tensor}: "
        f"one device needs {_of_one(found.needs)}{about} ({needs.breakdown()}), and sends "
        f"{show_bytes(found.needs.sent.total)} in a step"
    )
    if found.needs.grows:
        rows = context.config.train.batch_size * context.config.train.num_microbatches
        more = found.needs.batch_size * found.needs.num_microbatches
        told += f"; a step then has {more} windows, where the config has {rows}"
    return told


def _or_larger_steps(context: Context, found: Proposal, listed: Sequence[LayoutNeeds], memory: int) -> str:
    """Beside a layout that shares heads only so that the rows divide: the one that would rather read more rows."""
    if found.needs.layout.tensor == 1 or found.needs.grows:
        return ""
    other = next((each for each in listed if each.grows and each.layout.tensor == 1 and each.fits(memory)), None)
    if other is None:
        return ""
    more = other.batch_size * other.num_microbatches
    return f"; or, if a step may have {more} windows, {in_one_line(other.written({}, context.config))}"


def _none_fits(context: Context, listed: Sequence[LayoutNeeds], devices: int, memory: int, table: Any) -> Finding:
    least = min(listed, key=lambda each: each.needs.low)
    return TTT407.at(
        KEY,
        message=f"{_on(devices, memory)} no layout fits: one device needs {_of_one(least)} "
        f"({least.needs.breakdown()}) even with {least.layout.in_words()}{_written_otherwise(context, devices)}",
        fix=_or(context, devices, memory),
        value={**table, "write": None},
        severity=Severity.ERROR,
    )


def _or(context: Context, devices: int, memory: int) -> str:
    """What else would make it fit, each by itself: shorter windows, smaller types, more devices; all of it computed.

    Of the last two it is enough if one fits beside settings that take less memory, which a check of it names.
    """
    config, train = context.config, context.config.train

    def fits(changed: Mapping[str, Any], among: int) -> bool:
        found = proposal(with_keys(config, changed), context.backbone.facts, context.lora_shapes, among, memory)
        return found is not None and found.surely

    ways = []
    longest = longest_window(config, context.facts, context.lora_shapes, devices, memory)
    if longest is not None:
        ways.append(f"windows of at most {longest:,} tokens, where this config has {context.facts.tokens_per_window:,}")
    if train.trainable == "all" and fits({"train.trainable": "ttt"}, devices):
        ways.append("trainable: ttt")
    if train.param_dtype == "float32" and fits({"train.param_dtype": "bfloat16"}, devices):
        ways.append("param_dtype: bfloat16")
    more = next((number for number in _more_than(devices) if fits({}, number)), None)
    if more is not None:
        ways.append(f"{more} devices")
    if ways:
        return f"what surely fits: {', or '.join(ways[:3])}"
    return "no shorter window, smaller type or larger number of devices surely fits: take devices of more memory"


_MOST_DEVICES = 1024
"""As many are tried."""


def _more_than(devices: int) -> Iterator[int]:
    while (devices := 2 * devices) <= _MOST_DEVICES:
        yield devices


def _on(devices: int, memory: int | None) -> str:
    return f"on {devices} device{'s' * (devices != 1)}" + (f" of {show_bytes(memory)}" if memory is not None else "")


def _range(listed: Sequence[LayoutNeeds]) -> str:
    least = min(listed, key=lambda each: each.needs.high)
    return f"one device needs the least with {least.layout.in_words()}: {_of_one(least)}"


def _of_one(each: LayoutNeeds) -> str:
    low, high = show_bytes(each.needs.low), show_bytes(each.needs.high)
    return f"{low} to {high}" if each.needs.complete else f"at least {low}"


def in_one_line(keys: Mapping[str, Any]) -> str:
    """Keys as YAML in one line: `train: {batch_size: 8, parallel: {…}}`."""
    sections: dict[str, list[str]] = {}
    for name, value in keys.items():
        section, key = name.split(".")
        sections.setdefault(section, []).append(f"{key}: {in_yaml(value)}")
    return ", ".join(f"{section}: {{{', '.join(written)}}}" for section, written in sections.items())


def in_yaml(value: Any) -> str:
    """A plain value in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {in_yaml(of)}" for key, of in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
