"""Builds CogVideoX's transformer: the demo's, one with random weights, or one with published weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ttt.errors import EnvironmentProblem
from ttt.words import first_line
from ttt_videodit.attention import Remat
from ttt_videodit.model import VideoDiT
from ttt_videodit.options import DEFAULT_PRETRAINED, DEMO_TEXT_DIM, DEMO_TIME_DIM, PIXELS, VideoDiTOptions, sizes
from ttt_videodit.pretrained import source_of, verify_record
from ttt_videodit.variants import WAY_OUT, wrong_source, wrong_variant

DEMO_SEED = 20260101
# Values in `transformer/config.json` of THUDM/CogVideoX-5b that differ from the class's defaults.
COGVIDEOX_5B_CONFIG: dict[str, Any] = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "attention_head_dim": 64,
    "use_rotary_positional_embeddings": True,
}


def build(options: VideoDiTOptions, *, device: torch.device | str, dtype: torch.dtype) -> VideoDiT:
    """The model that the options ask for, in eval mode; on `meta`, only its structure.

    Raises:
        EnvironmentProblem: weights cannot be loaded, or belong to another model.
    """
    on_meta = torch.device(device).type == "meta"
    if options.preset == "demo":
        model = _demo_model(options, device=device, dtype=dtype)
    elif options.random_weights or (on_meta and options.pretrained is None):
        with torch.device(device), _default_dtype(dtype):
            model = VideoDiT(**COGVIDEOX_5B_CONFIG)
    else:
        model = _pretrained_model(options, device=device, dtype=dtype)
    model.arrange(options.segments, Remat.of(options))
    return model.eval()


def _demo_model(options: VideoDiTOptions, *, device: torch.device | str, dtype: torch.dtype) -> VideoDiT:
    """A tiny `VideoDiT` with the same values every time, up to the last digit on other CPUs."""
    size = sizes(options)
    height, width = PIXELS["demo"]
    config = {
        "num_attention_heads": size["num_heads"],
        "attention_head_dim": size["dim"] // size["num_heads"],
        "num_layers": size["num_layers"],
        "time_embed_dim": DEMO_TIME_DIM,
        "text_embed_dim": DEMO_TEXT_DIM,
        "sample_height": height // 8,
        "sample_width": width // 8,
        "use_rotary_positional_embeddings": True,
    }
    if torch.device(device).type == "meta":
        with torch.device("meta"), _default_dtype(dtype):
            return VideoDiT(**config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DEMO_SEED)
        model = VideoDiT(**config)
    # Not `model.to`: diffusers' version warns about parameters whose type it would keep in its own models.
    return cast(VideoDiT, nn.Module.to(model, device=device, dtype=dtype))


def _pretrained_model(options: VideoDiTOptions, *, device: torch.device | str, dtype: torch.dtype) -> VideoDiT:
    """CogVideoX's own weights, from a folder in diffusers' layout or from the hub."""
    source = source_of(options)
    local = Path(source)
    subfolder = None if (local / "config.json").is_file() else "transformer"
    if local.is_dir() and subfolder and not (local / subfolder / "config.json").is_file():
        raise EnvironmentProblem(
            f"backbone.pretrained: {source} holds no transformer/config.json; name a folder in diffusers' layout"
        )
    _require_the_model(source, wrong_source(source))
    if local.is_dir():
        verify_record(local / (subfolder or ""), tensors=torch.device(device).type != "meta")
    try:
        on_meta = torch.device(device).type == "meta"
        if on_meta or source != DEFAULT_PRETRAINED:  # whose config is known
            config = VideoDiT.load_config(source, subfolder=subfolder, revision=options.revision)
            _require_the_model(source, wrong_variant(config))  # before its weights are downloaded
        if on_meta:
            with torch.device("meta"), _default_dtype(dtype):
                return cast(VideoDiT, VideoDiT.from_config(config))
        with _quiet_about_the_class():
            model = VideoDiT.from_pretrained(
                source, subfolder=subfolder, revision=options.revision, torch_dtype=dtype, use_safetensors=True
            )
    except EnvironmentProblem:
        raise
    except Exception as error:  # the hub's client and diffusers raise errors of many libraries
        raise EnvironmentProblem(
            f"{source}: cannot be loaded as CogVideoX's transformer ({first_line(error)}); name a local folder in "
            f"diffusers' layout with backbone.pretrained, or try the demo preset"
        ) from error
    return cast(VideoDiT, model.to(device=device))


def _require_the_model(source: str, wrong: str | None) -> None:
    if wrong is not None:
        raise EnvironmentProblem(f"backbone.pretrained: {source} {wrong}; {WAY_OUT}")


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _quiet_about_the_class() -> Iterator[None]:
    """Keep diffusers from warning that a config names its own class, of which `VideoDiT` is a subclass."""
    loggers = [logging.getLogger(f"diffusers.{name}") for name in ("configuration_utils", "models.modeling_utils")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
