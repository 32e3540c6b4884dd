"""Which layouts of several devices a run fits in, if the caller asks for that (TTT406, TTT407)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ttt.amounts import show_bytes
from ttt.check.layouts import LayoutNeeds, Proposal, longest_window, needs_of_layouts, proposal
from ttt.check.rules.memory import memory_of
from ttt.check.rules.rule import NEEDS, Context, rule
from ttt.config.findings import Code, Family, Finding, Severity

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
        yield TTT406.at(
            KEY, f"{_on(devices, None)} {_range(listed)}", "say how much memory one has: --memory 80GiB", value=table
        )
        return
    found = proposal(context.config, context.backbone.facts, context.lora_shapes, devices, memory)
    if found is None:
        yield _none_fits(context, listed, devices, memory, table)
        return
    keys = found.needs.written(found.changed, context.config)
    code = TTT406 if found.surely else TTT407
    yield code.at(
        KEY,
        message=_proposed(context, found, devices, memory),
        fix=f"write {in_one_line(keys)}{_or_larger_steps(context, found, listed, memory)}"
        + ("" if found.surely else f"; {_or(context, devices, memory)}"),
        value={**table, "write": keys},
    )


def _proposed(context: Context, found: Proposal, devices: int, memory: int) -> str:
    """What the proposed layout is, needs and sends."""
    needs, sizes = found.needs.needs, found.needs.layout
    verb = "that fits" if found.surely else "surely fits; the one that may and needs the least"
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
        f"({least.needs.breakdown()}) even with {least.layout.in_words()}",
        fix=_or(context, devices, memory),
        value={**table, "write": None},
        severity=Severity.ERROR,
    )


def _or(context: Context, devices: int, memory: int) -> str:
    """What else would make it fit: shorter windows, or more devices, or what takes less."""
    longest = longest_window(context.config, context.facts, context.lora_shapes, devices, memory)
    ways = ["more devices", "fewer ttt.layers"]
    if context.config.train.param_dtype == "float32":
        ways.insert(0, "param_dtype: bfloat16")
    if context.config.train.trainable == "all":
        ways.insert(0, "trainable: ttt")
    if longest is not None:
        ways.insert(
            0, f"windows of at most {longest:,} tokens, where this config has {context.facts.tokens_per_window:,}"
        )
    return f"what surely fits: {', or '.join(ways[:3])}"


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
