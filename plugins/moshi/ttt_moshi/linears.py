"""Moshi's linear layers by width, from the settings of its model alone; imports no torch.

The settings are those of kyutai's `LMModel`, as a config.json has them; tests hold the counts against the built model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt.config.lora import Linears
from ttt.errors import EnvironmentProblem
from ttt.files import read_json
from ttt_moshi.options import MoshiOptions, sizes

_PUBLISHED: Mapping[str, Any] = {
    "text_card": 32000,
    "card": 2048,
    "dep_q": 8,
    "hidden_scale": 4.125,
    "gating": "silu",
    "depformer_dim": 1024,
    "depformer_dim_feedforward": 4224,
    "depformer_num_layers": 6,
    "depformer_multi_linear": True,
    "depformer_gating": "silu",
    "depformer_weights_per_step": True,
}
"""Of the 7B, as `moshi.models.loaders` has it."""
_DEMO: Mapping[str, Any] = {
    **_PUBLISHED,
    **{"text_card": 300, "card": 64, "hidden_scale": 3.0},
    **{"depformer_dim": 64, "depformer_dim_feedforward": 192, "depformer_num_layers": 2},
}
"""Of the demo; its sizes are those of the options."""
_UNKNOWN = ("quantize", "cross_attention", "kv_repeat", "depformer_low_rank_embeddings", "demux_second_stream")
"""Settings that make other linear layers than are counted here."""

Shapes = dict[tuple[int, int], int]


def linear_shapes(options: MoshiOptions, linears: Linears) -> Shapes | None:
    """How many linear layers `lora.linears` names, by input and output width; None if the settings do not tell."""
    settings = _settings(options)
    if settings is None:
        return None
    try:
        return dict(Counter(_chosen(settings, linears)))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):  # a config.json of another program
        return None


def _settings(options: MoshiOptions) -> Mapping[str, Any] | None:
    if options.preset == "demo":
        return {**_DEMO, **sizes(options)}
    if options.config_path is None:
        return {**_PUBLISHED, **sizes(options)}
    try:
        written = read_json(Path(options.config_path))
    except (EnvironmentProblem, ValueError):  # the facts say what is wrong with it
        return None
    return None if any(written.get(key) not in (None, False, 1) for key in _UNKNOWN) else written


def _chosen(settings: Mapping[str, Any], linears: Linears) -> Iterator[tuple[int, int]]:
    for _ in range(settings["num_layers"]):
        if linears != "feed_forward":
            yield from _attention(settings["dim"], 1)
        if linears != "attention":
            hidden = int(settings.get("hidden_scale", 4) * settings["dim"])
            yield from _feed_forward(settings["dim"], hidden, settings.get("gating", "none"))
    if linears == "all":
        yield from _heads(settings)
        yield from _depformer(settings)


def _heads(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The output of the text stream, and of each codebook."""
    yield settings["dim"], settings.get("text_card_out") or settings["text_card"]
    yield from [(settings["depformer_dim"], settings["card"])] * settings.get("dep_q", 8)
    extra = settings.get("extra_heads_num_heads", 0)
    yield from [(settings["dim"], settings.get("extra_heads_dim", 6))] * extra


def _depformer(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The linear layers of the depformer, of which it has one for each step or group of steps."""
    codebooks, dim = settings.get("dep_q", 8), settings["depformer_dim"]
    schedule: Sequence[int] | None = settings.get("depformer_weights_per_step_schedule")
    apart = max(schedule) + 1 if schedule else codebooks
    into = apart if settings.get("depformer_multi_linear") else 1
    yield from [(settings["dim"], dim)] * into
    if not codebooks:
        return
    steps = apart if settings.get("depformer_weights_per_step") else 1
    hidden = settings.get("depformer_dim_feedforward") or int(settings.get("hidden_scale", 4) * dim)
    wide = list(hidden) if isinstance(hidden, (list, tuple)) else [hidden] * steps
    gating = settings.get("depformer_gating", settings.get("gating", "none"))
    for _ in range(settings.get("depformer_num_layers", settings["num_layers"])):
        yield from _attention(dim, steps)
        for width in wide:
            yield from _feed_forward(dim, width, gating)


def _attention(dim: int, steps: int) -> Iterator[tuple[int, int]]:
    yield from [(dim, dim), (dim, 3 * dim)] * steps


def _feed_forward(dim: int, hidden: int, gating: str) -> Iterator[tuple[int, int]]:
    """A gated feed-forward of kyutai's is narrower than it says, to have the parameters of a plain one."""
    if gating == "none":
        yield from ((dim, hidden), (hidden, dim))
        return
    inner = 21 * dim // 8 if hidden == 4 * dim else 2 * hidden // 3
    yield from ((dim, 2 * inner), (inner, dim))
