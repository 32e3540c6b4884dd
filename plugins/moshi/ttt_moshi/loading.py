"""A run's Moshi in one line: the model with what the run learned, its codec and its text tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from moshi.models import LMModel
from sentencepiece import SentencePieceProcessor

from ttt.adapter_file import backbone_identity, load_adapter
from ttt.check import load_config
from ttt.errors import UsageError
from ttt.train.setup import build, choose_device
from ttt_moshi.data import load_codec
from ttt_moshi.weights import load_tokenizer


class LoadedRun(NamedTuple):
    """What speaking takes."""

    model: LMModel
    """Kyutai's model with its TTT layers, in eval mode, for inference alone (`Injection.for_inference`)."""
    codec: Any
    """Kyutai's `MimiModel`; the `DemoCodec` for a run of the demo."""
    tokenizer: SentencePieceProcessor
    """Of the model's text stream."""


def load_run(run: str | Path, *, device: str | None = None) -> LoadedRun:
    """Load a run of Moshi with its last checkpoint.

    Args:
        run: its folder.
        device: `auto`, `cpu` or `cuda`; None is that of its config.

    Raises:
        UsageError: it is a run of another backbone.
        ConfigError: its config cannot be used.
        AdapterFileError: it has no complete checkpoint.
        EnvironmentProblem: weights, codec or tokenizer cannot be had.
    """
    loaded = load_config(Path(run) / "config.yaml", training=False)
    config, backbone = loaded.config, loaded.backbone
    if backbone.name != "moshi":
        raise UsageError(f"{run}: is a run of {backbone.name}, not of moshi")
    model, injection = build(config, backbone, choose_device(device or config.train.device))
    load_adapter(run, model, injection=injection, backbone=backbone_identity(backbone, config.backbone))
    injection.for_inference()
    options: Any = config.backbone
    assert isinstance(model, LMModel)
    return LoadedRun(model.eval(), load_codec(options, model.device)[0], load_tokenizer(options))
