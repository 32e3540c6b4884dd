"""What the laws are proved on: the config, with the width and depth of the plugin's smallest model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ttt.config.schema import RunConfig, TTTConfig, select_layers
from ttt.costs import scan_cost
from ttt.laws import Bench
from ttt.plugins import Backbone, Site, Streaming, has_capability

_SHORTEST = 12
"""Fewest tokens that a probe reads."""
_LONGEST = 2048
"""Most tokens that a probe reads: the cost of attention and of the dual form grows with their square."""
_LONGEST_FOR_GROUPS = 1280
"""Most tokens that it reads to reach a second checkpoint group."""
STREAMED = 100
"""Most tokens of a mini-batch when the model streams: a streaming backbone may have a short context."""
_BATCH = 2
_LEAST_GATE = 0.01
_PROBE_GATE = 0.1
_FLOAT32_TOLERANCE = 1e-5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What the laws are proved on."""

    bench: Bench
    """With the config's own dtype of parameters and its own nesting of checkpoints."""
    exact: Bench
    """The same in float32: its rounding is too small to hide a leak."""
    short: Bench
    """`exact` on three mini-batches, for law 4: without gradients nothing is checkpointed, so no group is needed."""
    config: TTTConfig
    """The `ttt` section that is probed."""
    layers: tuple[int, ...]
    """The layers of the small model that get TTT."""
    group_size: int
    """Mini-batches per checkpoint in the proof of law 2."""
    told: tuple[str, ...]
    """Sentences that say what was made smaller, the model first."""


def small_setting(config: RunConfig, backbone: Backbone) -> Setting:
    """Fit the config to the plugin's smallest model.

    Raises:
        ttt.errors.TTTError: the model cannot be built, or the plugin cannot give facts about the config.
    """
    ttt, facts = config.ttt, backbone.facts(config)
    options = backbone.tiny_like(config.backbone)
    # On the CPU from the start: a plugin may decide at its first build what its package compiles.
    sites = backbone.sites(backbone.build(options, device="cpu", dtype=torch.float32))
    dim, heads = sites[0].dim, sites[0].num_heads
    chosen = select_layers(ttt.layers, facts.num_layers)
    layers = place_layers(chosen, facts.num_layers, len(sites))
    told = [f"{backbone.name} at width {dim}, {heads} heads, {len(sites)} layers, on the CPU"]
    if chosen != layers or facts.num_layers != len(sites):
        told.append(f"{_layers_in_words(chosen)} of {facts.num_layers} stand as {numbers(layers)} of {len(sites)}")
    changes: dict[str, Any] = {"layers": layers}
    if ttt.num_heads is not None:
        changes["num_heads"] = _heads(ttt.num_heads, facts.num_heads, sites[0], ttt)
        told.append(f"ttt.num_heads: {ttt.num_heads} stands as {changes['num_heads'] or heads}")
    if ttt.mlp_hidden_dims is not None:
        before, after = facts.dim // (ttt.num_heads or facts.num_heads), dim // (changes.get("num_heads") or heads)
        changes["mlp_hidden_dims"] = tuple(max(1, round(width * after / before)) for width in ttt.mlp_hidden_dims)
        told.append(f"hidden widths {numbers(ttt.mlp_hidden_dims)} stand as {numbers(changes['mlp_hidden_dims'])}")
    if abs(ttt.initial_gating_alpha) < _LEAST_GATE:
        changes["initial_gating_alpha"] = _PROBE_GATE
        told.append(f"gates start at {_PROBE_GATE}, not {ttt.initial_gating_alpha:g}, which would hide what TTT does")
    size = min(ttt.mini_batch_size, _LONGEST // 4)
    if size < ttt.mini_batch_size:
        changes["mini_batch_size"] = size
        told.append(f"mini-batches of {size}, not {ttt.mini_batch_size}: three of those would take too long")
    if has_capability(backbone, Streaming) and size > STREAMED:
        told.append(f"the whole model streams in mini-batches of {STREAMED}, each layer in those of {size}")
    wanted = ttt.scan_checkpoint_group_size
    if wanted == "auto":  # what it comes to in this config
        wanted = scan_cost(
            ttt,
            dim=facts.dim,
            num_heads=facts.num_heads,
            tokens=facts.tokens_per_window or _LONGEST,
            batch_size=config.train.batch_size,
        ).group_size
        told.append(f"scan_checkpoint_group_size: auto is {wanted}")
    tokens, group_size = _lengths(size, wanted)
    full, short = tokens // size, tokens_in(fewest(size), size)
    open_one = " and an open one" if tokens % size else ""
    told.append(f"{tokens} tokens: {full} mini-batches of {size}{open_one}, {short} in law 4; a batch of {_BATCH}")
    told.append(_groups_in_words(full, wanted, group_size, config.train.gradient_checkpointing))
    settings = {**ttt.model_dump(), **changes}
    return _setting(config, backbone, options, settings, (tokens, short), layers, group_size, tuple(told))


def _setting(
    config: RunConfig,
    backbone: Backbone,
    options: Any,
    settings: dict[str, Any],
    lengths: tuple[int, int],
    layers: tuple[int, ...],
    group_size: int,
    told: tuple[str, ...],
) -> Setting:
    """Make the benches. `lengths` are the tokens of the long and of the short sequence."""
    dtype, (tokens, short) = _DTYPES[config.train.param_dtype], lengths

    def bench(dtype: torch.dtype, tokens: int) -> Bench:
        return Bench(
            backbone,
            options=options,
            bare=_bare(options, backbone),
            ttt=settings,
            tokens=tokens,
            batch_size=_BATCH,
            device="cpu",
            tolerance=tolerance_of(dtype),
            dtype=dtype,
            gradient_checkpointing=config.train.gradient_checkpointing,
        )

    exact = bench(torch.float32, tokens)
    return Setting(bench(dtype, tokens), exact, bench(torch.float32, short), exact.config(), layers, group_size, told)


def _bare(options: Any, backbone: Backbone) -> Any:
    """The options of the same model, with what does not identify it, as what is recomputed, from the smallest one."""
    tiny = backbone.tiny()
    return options.model_copy(update={name: getattr(tiny, name) for name in backbone.non_identity_options})


def tolerance_of(dtype: torch.dtype) -> float:
    """Largest difference of two results that a law says are equal.

    In float32 it is the suite's 1e-5. In other dtypes it is one rounding: gradients of groups are summed in another
    order, which changes a last bit here and there on the way back through the backbone.
    """
    return _FLOAT32_TOLERANCE if dtype is torch.float32 else torch.finfo(dtype).eps


def place_layers(layers: tuple[int, ...], of: int, onto: int) -> tuple[int, ...]:
    """Map layers of a model of `of` layers to a model of `onto` layers: in the same order, near their relative depth.

    If there are more layers than `onto`, layers with the same place become one. In a model of the same depth they stay.
    """
    if of == onto or not layers:
        return layers
    wanted = [round(layer * (onto - 1) / max(of - 1, 1)) for layer in layers]
    if len(layers) > onto:
        return tuple(sorted(set(wanted)))
    for index in range(len(wanted) - 1, -1, -1):  # from the top: if the layer above has this place, go below it
        ceiling = wanted[index + 1] - 1 if index + 1 < len(wanted) else onto - 1
        wanted[index] = min(wanted[index], ceiling)
    for index in range(len(wanted)):  # from the bottom: if the layer below has this place, go above it
        floor = wanted[index - 1] + 1 if index else 0
        wanted[index] = max(wanted[index], floor)
    return tuple(wanted)


def _lengths(size: int, group_size: int) -> tuple[int, int]:
    """Tokens of the sequence and mini-batches per group. It crosses at least three mini-batches and ends inside one."""
    full = max(fewest(size), group_size + 1)
    if group_size and tokens_in(full, size) <= _LONGEST_FOR_GROUPS:
        return tokens_in(full, size), group_size
    return tokens_in(fewest(size), size), min(group_size, 2) or 1


def fewest(size: int) -> int:
    """Fewest mini-batches in a sequence: three, or more if they are very short."""
    return max(3, _SHORTEST // size)


def tokens_in(full: int, size: int) -> int:
    """Tokens of `full` mini-batches and of a half one that stays open."""
    return full * size + size // 2


def _heads(wanted: int, of: int, site: Site, ttt: TTTConfig) -> int | None:
    """Heads of the small layer, in the config's proportion; None, the backbone's own, if that does not fit."""
    heads = max(1, round(wanted * site.num_heads / of))
    fits = site.dim % heads == 0 and (ttt.rope == "none" or (site.dim // heads) % 2 == 0)
    return heads if fits else None


def _groups_in_words(full: int, wanted: int, group_size: int, nested: bool) -> str:
    nesting = ", inside the backbone's own activation checkpointing" if nested else ""
    groups = -(-full // group_size)
    counted = f"{groups} checkpoint groups of {group_size}{nesting}"
    if wanted == group_size:
        return counted
    if wanted == 0:
        return f"{counted}; scan_checkpoint_group_size: 0 keeps everything"
    return f"{counted}, not {wanted}: more than one group of those would take too long"


def _layers_in_words(layers: tuple[int, ...]) -> str:
    return f"{'layer' if len(layers) == 1 else 'layers'} {numbers(layers)}"


def numbers(numbers: tuple[int, ...]) -> str:
    """The numbers as `29, 30, 31`; more than four in a row as `0 to 31`."""
    if len(numbers) > 4 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
