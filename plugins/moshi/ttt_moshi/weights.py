"""Moshi's own weights, its codec Mimi and its text tokenizer: found, and loaded as kyutai's programs load them.

    options = MoshiOptions(preset="7b")
    model = load_moshi(options, device="cuda", dtype=torch.bfloat16)
    mimi, tokenizer = load_mimi(options, device="cuda"), load_tokenizer(options)

Everything here is public: `checkpoint_info` gives kyutai's `CheckpointInfo`, for what else their programs need of it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, cast

import torch
from huggingface_hub import try_to_load_from_cache
from moshi.models import LMModel, MimiModel, loaders
from sentencepiece import SentencePieceProcessor

from ttt.errors import EnvironmentProblem, UsageError
from ttt.reading import other_kind, read_file, unreadable
from ttt.words import first_line
from ttt_moshi import demo
from ttt_moshi.merged_lora import merge_lora
from ttt_moshi.options import MoshiOptions, reads_with_the_demos

_MAX_TOKENIZER: Final = 64 << 20  # bytes; kyutai's has 0.5 MB
_LOCAL: Final = ("moshi_path", "mimi_path", "tokenizer_path", "config_path", "lora_path")


@lru_cache(maxsize=1)
def checkpoint_info(options: MoshiOptions) -> loaders.CheckpointInfo:
    """The paths of kyutai's weights, codec and tokenizer; downloaded from the hub if the options name no local file.

    Raises:
        EnvironmentProblem: a local file is missing, or the hub cannot be reached.
    """
    local = {key: getattr(options, key) for key in _LOCAL}
    for key, path in local.items():
        kind = None if path is None else other_kind(path)
        if kind is not None:
            raise EnvironmentProblem(f"backbone.{key}: {path} is {kind}, not a file")
        if path is not None and not Path(path).is_file():
            raise EnvironmentProblem(f"backbone.{key}: no file {path}")
    paths = {key: Path(path) for key, path in local.items() if path is not None}
    if "config_path" not in paths and {"moshi_path", "mimi_path", "tokenizer_path"} <= set(paths):
        if options.revision is not None:
            raise UsageError("backbone.revision: is of a repository, and every file is a local one; leave it out")
        named = (paths[key] for key in ("moshi_path", "mimi_path", "tokenizer_path"))
        return loaders.CheckpointInfo(*named, lora_weights=paths.get("lora_path"))
    repo = options.hf_repo or loaders.DEFAULT_REPO
    try:
        return loaders.CheckpointInfo.from_hf_repo(
            repo,
            moshi_weights=paths.get("moshi_path"),
            mimi_weights=paths.get("mimi_path"),
            tokenizer=paths.get("tokenizer_path"),
            config_path=paths.get("config_path"),
            lora_weights=paths.get("lora_path"),
            revision=options.revision,
        )
    except Exception as error:  # the hub's client raises errors of many libraries
        raise EnvironmentProblem(
            f"{repo} cannot be fetched from the Hugging Face hub ({first_line(error)}); name local files with "
            f"backbone.moshi_path, mimi_path, tokenizer_path and config_path, or try the demo preset"
        ) from error


def provenance(options: MoshiOptions) -> dict[str, str]:
    """The repository of the language model's weights, and its commit if the hub's cache knows it."""
    if options.preset == "demo" or options.random_weights or options.moshi_path is not None:
        return {}
    repo = options.hf_repo or loaders.DEFAULT_REPO
    cached = try_to_load_from_cache(repo, "config.json", revision=options.revision)
    commit = {"commit": Path(cached).parent.name} if isinstance(cached, str) else {}
    return {"repository": repo, **commit}


def load_moshi(options: MoshiOptions, *, device: torch.device | str, dtype: torch.dtype) -> LMModel:
    """Kyutai's `LMModel` with pretrained weights, a LoRA merged into them if there is one, in eval mode.

    Raises:
        EnvironmentProblem: weights cannot be had.
    """
    info = checkpoint_info(options)
    if not str(info.moshi_weights).endswith((".safetensors", ".sft", ".sfts")):
        raise EnvironmentProblem(
            f"backbone.moshi_path: {info.moshi_weights} is not a safetensors file; pickles are refused"
        )
    lora, scaling = _lora(info)
    plain = None if info.lm_config is None else {k: v for k, v in info.lm_config.items() if not k.startswith("lora")}
    try:
        model = replace(info, lm_config=plain, lora_weights=None).get_moshi(device=device, dtype=dtype)
    except (OSError, RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            f"{info.moshi_weights}: cannot be loaded as Moshi weights: {first_line(error)}"
        ) from error
    if lora is not None:
        merge_lora(model, lora, scaling=scaling)
    return model


def _lora(info: loaders.CheckpointInfo) -> tuple[Path | None, float]:
    """The LoRA to merge into the weights, None if there is none, and its scaling.

    Raises:
        EnvironmentProblem: the config.json says that the model has a LoRA, and none is given.
    """
    written = info.lm_config or {}
    if info.lora_weights is None and written.get("lora"):
        raise EnvironmentProblem(
            "config.json says lora: true, so the weights alone are not the model that was trained",
            key="backbone.lora_path",
            fix="write the path of its lora.safetensors",
        )
    return info.lora_weights, float(written.get("lora_scaling", 2.0))


def structure(options: MoshiOptions, *, device: torch.device | str, dtype: torch.dtype) -> LMModel:
    """The same model with random weights; on the device `meta`, with none."""
    kwargs = dict(loaders._lm_kwargs) if options.config_path is None else _lm_config(options)
    return loaders.get_moshi_lm(None, kwargs, device=device, dtype=dtype)


def _lm_config(options: MoshiOptions) -> dict[str, Any]:
    """The settings of the language model in a config.json, as `CheckpointInfo` reads them."""
    paths = {key: Path("unused") for key in ("moshi_weights", "mimi_weights", "tokenizer")}
    info = loaders.CheckpointInfo.from_hf_repo("unused", **paths, config_path=options.config_path)
    return {key: value for key, value in cast("dict[str, Any]", info.lm_config).items() if not key.startswith("lora")}


def load_mimi(options: MoshiOptions, *, device: torch.device | str = "cpu") -> MimiModel:
    """Kyutai's codec Mimi with as many codebooks as the model reads of a speaker, frozen.

    Raises:
        EnvironmentProblem: it cannot be had, or is broken.
    """
    info = checkpoint_info(options)
    if not str(info.mimi_weights).endswith((".safetensors", ".sft", ".sfts")):
        raise EnvironmentProblem(
            f"backbone.mimi_path: {info.mimi_weights} is not a safetensors file; pickles are refused"
        )
    try:
        mimi = info.get_mimi(device=device)
    except Exception as error:  # safetensors, torch and the file system raise errors of many kinds
        reason = first_line(error)
        raise EnvironmentProblem(f"{info.mimi_weights}: cannot be loaded as Mimi weights: {reason}") from error
    return mimi.requires_grad_(False).eval()


def load_tokenizer(options: MoshiOptions) -> SentencePieceProcessor:
    """The text tokenizer of the model; for the demo, its own.

    Raises:
        EnvironmentProblem: it is missing, or is not a SentencePiece model.
    """
    return read_tokenizer(demo.TOKENIZER if reads_with_the_demos(options) else checkpoint_info(options).tokenizer)


def read_tokenizer(path: str | Path) -> SentencePieceProcessor:
    """Read a SentencePiece model.

    Raises:
        EnvironmentProblem: it is missing, or is not a SentencePiece model.
    """
    try:
        return SentencePieceProcessor(model_proto=read_file(path, limit=_MAX_TOKENIZER))
    except (OSError, RuntimeError) as error:
        reason = unreadable(error) if isinstance(error, OSError) else "it is not a SentencePiece model"
        raise EnvironmentProblem(f"{path}: cannot be read as a text tokenizer: {reason}") from None
