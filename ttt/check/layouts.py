"""What a run needs on several devices, in each layout of them: memory of one device, and what it sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ttt.check.estimate import Estimate, Shapes, backward_reaches, estimate, outside_layers
from ttt.communication import heads_backward, heads_forward
from ttt.config.schema import RunConfig, select_layers
from ttt.costs import WIDE, bytes_of
from ttt.parallel.layout import Layout, needs_whole_matrices
from ttt.plugins import BackboneFacts

FactsOf = Callable[[RunConfig], BackboneFacts]
"""The backbone's facts of a config."""


@dataclass(frozen=True)
class Sent:
    """Bytes that one device sends in one optimiser step, in closed form; it receives as many.

    Of n devices, each sends `2 (n-1)/n` of what they sum for all (all-reduce), and `(n-1)/n` of what they gather
    (all-gather), or sum for the one that keeps it (reduce-scatter), or exchange (all-to-all).
    """

    gradients: int
    """Summed once a step over copies and over devices that split the parameters; of copies that learn in half precision
    after each pass."""
    parameters: int
    """Gathered from devices that split them: in each pass once for forward, and those of layers once more for backward.
    """
    heads: int
    """Of TTT layers, summed over devices that share the heads."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.parameters + self.heads


@dataclass(frozen=True)
class LayoutNeeds:
    """What a run needs in one layout."""

    layout: Layout
    batch_size: int
    """`train.batch_size` with which the rows divide evenly; the config's, if they do with it."""
    num_microbatches: int
    grows: bool
    """Whether a step has more rows than the config's."""
    needs: Estimate
    sent: Sent

    def fits(self, memory: int) -> bool:
        """Whether it surely fits, as far as it is known what the run needs."""
        return (self.needs.high if self.needs.complete else self.needs.low) <= memory

    def may_fit(self, memory: int) -> bool:
        """Whether it may fit."""
        return self.needs.low <= memory

    def verdict(self, memory: int) -> str:
        """`fits`, `may fit` or `no`; `TTT fits` if the backbone does not tell what it needs itself."""
        if not self.fits(memory):
            return "may fit" if self.may_fit(memory) else "no"
        return "fits" if self.needs.complete else "TTT fits"

    def written(self, changed: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
        """The keys to write for this layout, as `section.key`; `changed` are others that it needs."""
        sizes = {name: getattr(self.layout, name) for name in ("replicate", "shard", "tensor")}
        keys: dict[str, Any] = {"train.parallel": sizes}
        rows = {"train.batch_size": self.batch_size, "train.num_microbatches": self.num_microbatches}
        now = {"train.batch_size": config.train.batch_size, "train.num_microbatches": config.train.num_microbatches}
        return {**keys, **{key: value for key, value in rows.items() if value != now[key]}, **changed}

    def as_data(self, memory: int | None) -> dict[str, Any]:
        """As plain data, for JSON."""
        layout, needs = self.layout, self.needs
        return {
            "layout": {"replicate": layout.replicate, "shard": layout.shard, "tensor": layout.tensor},
            "batch_size": self.batch_size,
            "num_microbatches": self.num_microbatches,
            "larger_step": self.grows,
            "fits": None if memory is None else self.verdict(memory),
            "memory_bytes": {"low": needs.low, "high": needs.high, "whole_run": needs.complete, **needs.parts},
            "sent_bytes_per_step": {
                "gradients": self.sent.gradients,
                "parameters": self.sent.parameters,
                "heads": self.sent.heads,
                "total": self.sent.total,
            },
        }


def possible_layouts(config: RunConfig, facts: BackboneFacts, devices: int) -> list[Layout]:
    """The layouts of so many devices in which the run can be started, the least sharded first.

    Heads are shared only if there are TTT layers and their heads divide evenly; and nothing is split that the optimiser
    needs whole.
    """
    heads = config.ttt.num_heads or facts.num_heads
    shares = bool(select_layers(config.injected.layers, facts.num_layers))
    layouts = [
        Layout(devices // (shard * tensor), shard, tensor)
        for tensor in _divisors(devices)
        if tensor == 1 or (shares and heads % tensor == 0)
        for shard in _divisors(devices // tensor)
    ]
    layouts = [layout for layout in layouts if needs_whole_matrices(config.train, layout) is None]
    return sorted(layouts, key=sharded)


def sharded(layout: Layout) -> tuple[int, int]:
    """How much a layout splits, to compare by: among how many devices, and of these how many share heads."""
    return layout.shard * layout.tensor, layout.tensor


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def needs_of_layouts(
    config: RunConfig, facts: BackboneFacts, lora: Shapes | None, devices: int
) -> tuple[LayoutNeeds, ...]:
    """What the run needs in each layout; first those in which a step has the config's rows, then the least sharded."""
    found = [needs_of_layout(config, facts, lora, layout) for layout in possible_layouts(config, facts, devices)]
    return tuple(sorted(found, key=lambda each: each.grows))  # stable


def needs_of_layout(config: RunConfig, facts: BackboneFacts, lora: Shapes | None, layout: Layout) -> LayoutNeeds:
    """What the run needs in a layout, with its rows divided evenly."""
    batch_size, passes = divided_rows(config, layout)
    divided = with_keys(config, {"train.batch_size": batch_size, "train.num_microbatches": passes})
    needs = estimate(divided, facts, lora, layout)
    rows = config.train.batch_size * config.train.num_microbatches
    return LayoutNeeds(
        layout, batch_size, passes, batch_size * passes > rows, needs, sent(divided, facts, needs, layout)
    )


def divided_rows(config: RunConfig, layout: Layout) -> tuple[int, int]:
    """A batch size that divides evenly among the devices, with the number of passes that keeps a step's rows.

    If no such number exists, or fast weights are carried along the rows of a batch, a step has more rows.
    """
    size, passes, among = config.train.batch_size, config.train.num_microbatches, layout.data_size
    if size % among == 0:
        return size, passes
    up = -(-size // among) * among
    rows = size * passes
    if config.ttt.persistent_states or rows % among:
        return up, passes
    return next(((one, rows // one) for one in range(up, rows + 1, among) if rows % one == 0), (rows, 1))


def with_keys(config: RunConfig, keys: Mapping[str, Any]) -> RunConfig:
    """The config with other values at `section.key`, which are not validated."""
    for name, value in keys.items():
        section, key = name.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
    return config


# --- what is sent ---


def sent(config: RunConfig, facts: BackboneFacts, needs: Estimate, layout: Layout) -> Sent:
    """What one device sends in a step of this layout."""
    layers = len(select_layers(config.injected.layers, facts.num_layers))
    return Sent(
        gradients=_of_gradients(config, needs, layout),
        parameters=_of_parameters(config, facts, needs, layout) if layout.shard > 1 else 0,
        heads=config.train.num_microbatches * _of_heads(config, facts, needs, layout, layers),
    )


def _of_gradients(config: RunConfig, needs: Estimate, layout: Layout) -> int:
    """Bytes of gradients, of which each device that shares the heads has those of its own."""
    numbers, size = needs.numbers, bytes_of(config.train.param_dtype)
    own = numbers.adapter_learns // layout.tensor
    if layout.shard > 1:  # float32
        learning = WIDE * (numbers.learns + own)
        return _part(2, layout.replicate, learning // layout.shard) + _part(1, layout.shard, learning)
    half = size < WIDE and numbers.learns
    passes = config.train.num_microbatches if half else 1
    return passes * _part(2, layout.replicate, numbers.learns * size + WIDE * own)


def _of_parameters(config: RunConfig, facts: BackboneFacts, needs: Estimate, layout: Layout) -> int:
    """Bytes of parameters that are gathered; for backward those of the layers that it reaches, and of the one before
    them, which FSDP2 fetches ahead.
    """
    numbers, size = needs.numbers, bytes_of(config.train.param_dtype)
    layers = select_layers(config.injected.layers, facts.num_layers)
    outside = outside_layers(facts)
    again = min(backward_reaches(config, facts, layers) + 1, facts.num_layers) / max(facts.num_layers, 1)
    gathered = size * (outside + round((1 + again) * (numbers.frozen + numbers.learns - outside)))
    gathered += 2 * WIDE * numbers.adapter // layout.tensor
    return config.train.num_microbatches * _part(1, layout.shard, gathered)


def _part(times: int, among: int, count: int) -> int:
    """`times (n-1)/n` of a number of bytes."""
    return times * count * (among - 1) // among


def _of_heads(config: RunConfig, facts: BackboneFacts, needs: Estimate, layout: Layout, layers: int) -> int:
    """Bytes of a pass: each time that a layer runs, forward and once more for each checkpoint around it; and back."""
    if facts.tokens_per_window is None:
        return 0
    rows = config.train.batch_size // layout.data_size
    forward = heads_forward(dim=facts.dim, tokens=facts.tokens_per_window, batch_size=rows)
    backward = heads_backward(config.ttt, dim=facts.dim, tokens=facts.tokens_per_window, batch_size=rows)
    runs = sum(1 + level for level in needs.scans)
    return layers * (forward * runs + backward * len(needs.scans)).sent(layout.tensor)


# --- what to write ---


@dataclass(frozen=True)
class Proposal:
    """A layout to write."""

    needs: LayoutNeeds
    changed: Mapping[str, Any]
    """Keys that must be changed too, as `section.key`."""
    surely: bool
    """Whether it surely fits; else it may."""


def proposal(config: RunConfig, facts_of: FactsOf, lora: Shapes | None, devices: int, memory: int) -> Proposal | None:
    """The least sharded layout that fits; with the fewest other changes, if none does as the config is.

    If none surely fits, the one that may fit and needs the least. None if none can fit.
    """
    tried = [
        Proposal(each, changed, each.fits(memory))
        for changed in ways_to_less(config, facts_of)
        for each in needs_of_layouts(with_keys(config, changed), facts_of(with_keys(config, changed)), lora, devices)
        if each.may_fit(memory)
    ]
    return next(
        (each for each in tried if each.surely), min(tried, key=lambda each: each.needs.needs.high, default=None)
    )


def ways_to_less(config: RunConfig, facts_of: FactsOf) -> Iterator[dict[str, Any]]:
    """Changes of keys with which a run needs less memory and learns the same; first none, then more and more."""
    train, changed = config.train, dict[str, Any]()
    yield {}
    wanted: list[tuple[str, Any, bool]] = [
        ("train.gradient_checkpointing", True, not train.gradient_checkpointing),
        ("ttt.scan_checkpoint_group_size", "auto", config.ttt.scan_checkpoint_group_size != "auto"),
        *((f"backbone.{key}", value, True) for key, value in facts_of(config).less_memory.items()),
    ]
    for key, value, changes in wanted:
        if changes:
            changed = {**changed, key: value}
            yield changed
    if train.batch_size > 1 and not config.ttt.persistent_states:
        rows = train.batch_size * train.num_microbatches
        yield {**changed, "train.batch_size": 1, "train.num_microbatches": rows}


def longest_window(
    config: RunConfig, facts: BackboneFacts, lora: Shapes | None, devices: int, memory: int
) -> int | None:
    """Tokens of the longest window with which a layout surely fits; None if there is none."""
    tokens = facts.tokens_per_window
    if tokens is None:
        return None

    def fits(length: int) -> bool:
        shorter = replace(facts, tokens_per_window=length)
        return any(each.fits(memory) for each in needs_of_layouts(config, shorter, lora, devices))

    low, high = 0, tokens
    while high - low > max(tokens // 100, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None
