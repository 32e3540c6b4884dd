"""Moshi's own weights, its codec Mimi and its text tokenizer: found, and loaded as kyutai's programs load them.

    options = MoshiOptions(preset="7b")
    model = load_moshi(options, device="cuda", dtype=torch.bfloat16)
    mimi, tokenizer = load_mimi(options, device="cuda"), load_tokenizer(options)

Everything here is public: `checkpoint_info` gives kyutai's `CheckpointInfo`, for what else their programs need of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import try_to_load_from_cache
from moshi.models import LMModel, MimiModel, loaders
from sentencepiece import SentencePieceProcessor
from torch import nn

from ttt.errors import EnvironmentProblem, TTTError, UsageError
from ttt.files import kind_of_file, read_json
from ttt.reading import other_kind, read_file, unreadable
from ttt.words import first_line
from ttt_moshi import demo
from ttt_moshi.merged_lora import merge_lora
from ttt_moshi.model_config import (
    PUBLISHED,
    ModelConfig,
    lm_settings,
    lora_scaling,
    parse_model_config,
    require_lora,
)
from ttt_moshi.options import MoshiOptions, config_file, model_config_of, reads_with_the_demos
from ttt_moshi.weight_kinds import SAME_MODEL, require_weights

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
    if options.config_path is not None:
        model_config_of(options)  # what is wrong with it is said of it, and before anything is fetched
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
            config_path=paths.get("config_path") or _checked_config(repo, options),
            lora_weights=paths.get("lora_path"),
            revision=options.revision,
        )
    except TTTError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        raise EnvironmentProblem(
            f"{repo} cannot be fetched from the Hugging Face hub ({first_line(error)}); name local files with "
            f"backbone.moshi_path, mimi_path, tokenizer_path and config_path, or try the demo preset"
        ) from error


def _checked_config(repo: str, options: MoshiOptions) -> Path | None:
    """The config.json of a repository, before gigabytes of what cannot be trained are fetched; None without one.

    Raises:
        EnvironmentProblem: it is of a model that cannot be trained here, or whose LoRA is not named.
    """
    try:
        file = Path(loaders.hf_get("config.json", repo, revision=options.revision))
    except loaders.EntryNotFoundError:
        return None
    config = parse_model_config(read_json(file), *_place(options))
    if options.lora_path is None:
        weights = options.moshi_path or config.moshi_name
        require_lora(config, _place(options)[0], weights=None if weights is None else Path(weights))
    return file


def provenance(options: MoshiOptions) -> dict[str, str]:
    """The repository of the language model's weights, its commit if the hub's cache knows it, and a LoRA merged in."""
    if options.preset == "demo" or options.random_weights or options.moshi_path is not None:
        return {}
    repo = options.hf_repo or loaders.DEFAULT_REPO
    cached = try_to_load_from_cache(repo, "config.json", revision=options.revision)
    commit = {"commit": Path(cached).parent.name} if isinstance(cached, str) else {}
    merged = {} if options.lora_path is None else {"lora": Path(options.lora_path).name}
    return {"repository": repo, **commit, **merged}


def model_config(options: MoshiOptions) -> ModelConfig:
    """The config.json of the model that the options build, downloaded if need be; for the demo, its settings.

    Raises:
        EnvironmentProblem: it cannot be had, or is of a model that cannot be trained here.
    """
    if options.preset == "demo" or options.random_weights or options.config_path is not None:
        return model_config_of(options)
    written = checkpoint_info(options).raw_config
    return PUBLISHED if written is None else parse_model_config(written, *_place(options))


def _place(options: MoshiOptions) -> tuple[str, str]:
    """The config.json as messages name it, and the key that is to blame for it."""
    if options.config_path is not None:
        return options.config_path, "backbone.config_path"
    return f"{options.hf_repo or loaders.DEFAULT_REPO}/config.json", "backbone.hf_repo"


def _key(options: MoshiOptions, option: str) -> str:
    """The key that is to blame for a file: its own, or the repository's."""
    return f"backbone.{option if getattr(options, option) is not None else 'hf_repo'}"


def load_moshi(options: MoshiOptions, *, device: torch.device | str, dtype: torch.dtype) -> LMModel:
    """Kyutai's `LMModel` with pretrained weights, a LoRA merged into them if there is one, in eval mode.

    Raises:
        EnvironmentProblem: weights cannot be had, or are of another model.
    """
    info, config = checkpoint_info(options), model_config(options)
    if info.lora_weights is None:
        require_lora(config, _place(options)[0], weights=Path(info.moshi_weights))
    key = _key(options, "moshi_path")
    _require_safetensors(info.moshi_weights, key)
    expected = _shapes(_structure(info.raw_config, config, _place(options), device="meta", dtype=dtype))
    require_weights(Path(info.moshi_weights), expected, option="moshi_path", key=key, fix=SAME_MODEL)
    plain = None if info.raw_config is None else lm_settings(info.raw_config, config)
    with _loading(info.moshi_weights, "Moshi weights", key):
        model = replace(info, lm_config=plain, lora_weights=None).get_moshi(device=device, dtype=dtype)
    if info.lora_weights is not None:
        merge_lora(model, info.lora_weights, scaling=lora_scaling(config, info.lora_weights))
    return model


def structure(options: MoshiOptions, *, device: torch.device | str, dtype: torch.dtype) -> LMModel:
    """The same model with random weights; on the device `meta`, with none. Nothing is downloaded.

    Raises:
        EnvironmentProblem: kyutai's package makes no model of its config.json.
    """
    file, key = config_file(options)
    if file is None:
        return loaders.get_moshi_lm(None, None, device=device, dtype=dtype)
    return _structure(read_json(Path(file)), model_config_of(options), (file, key), device=device, dtype=dtype)


def _structure(
    written: Mapping[str, Any] | None,
    config: ModelConfig,
    place: tuple[str, str],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> LMModel:
    settings = None if written is None else lm_settings(written, config)
    with _loading(place[0], "the config of a Moshi model", place[1]):
        return loaders.get_moshi_lm(None, settings, device=device, dtype=dtype)


def load_mimi(options: MoshiOptions, *, device: torch.device | str = "cpu") -> MimiModel:
    """Kyutai's codec Mimi with as many codebooks as the model reads of a speaker, frozen.

    Raises:
        EnvironmentProblem: it cannot be had, is broken, or makes other codes than the model reads.
    """
    info, config = checkpoint_info(options), model_config(options)
    key = _key(options, "mimi_path")
    _require_safetensors(info.mimi_weights, key)
    total = (info.mimi_config or loaders._mimi_config)["quantizer"]["n_q"]
    if total < config.codebooks:
        raise EnvironmentProblem(
            f"{info.mimi_weights}: a Mimi of {total} codebooks, but the model reads {config.codebooks} of each speaker",
            key=key,
            fix="write the weights of the Mimi that belongs to the model",
        )
    with _loading(info.mimi_weights, "Mimi weights", key):
        empty = _shapes(loaders.get_mimi(None, info.mimi_config))
        require_weights(Path(info.mimi_weights), empty, option="mimi_path", key=key, fix=_KYUTAIS_MIMI)
        mimi = info.get_mimi(device=device)
    if mimi.cardinality > config.card:
        raise EnvironmentProblem(
            f"{info.mimi_weights}: a Mimi with codes of 0 to {mimi.cardinality - 1}, but the model reads 0 to "
            f"{config.card - 1}",
            key=key,
            fix="write the weights of the Mimi that belongs to the model",
        )
    return mimi.requires_grad_(False).eval()


_KYUTAIS_MIMI: Final = f"write the path of kyutai's Mimi, as {loaders.MIMI_NAME} of {loaders.DEFAULT_REPO}"


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _require_safetensors(file: Path | str, key: str) -> None:
    """Refuse a name by which kyutai's loader would read a pickle."""
    if str(file).endswith((".safetensors", ".sft", ".sfts")):
        return
    kind = None
    with suppress(OSError):
        kind = kind_of_file(file)
    told = f", but {kind.words}" if kind is not None and kind.name != "safetensors file" else ""
    raise EnvironmentProblem(
        f"{file} is not a safetensors file{told}; pickles are refused",
        key=key,
        fix="write the path of a file that is, and whose name ends in .safetensors",
    )


@contextmanager
def _loading(file: Path | str, what: str, key: str) -> Iterator[None]:
    """A context in which an error of kyutai's package becomes one sentence about a file.

    Raises:
        EnvironmentProblem: something was raised.
    """
    try:
        yield
    except (TTTError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, torch, kyutai's assertions and the file system: errors of many kinds
        reason = first_line(error, otherwise=type(error).__name__)
        raise EnvironmentProblem(f"{file}: cannot be loaded as {what}: {reason}", key=key) from error


def load_tokenizer(options: MoshiOptions) -> SentencePieceProcessor:
    """The text tokenizer of the model; for the demo, its own.

    Raises:
        EnvironmentProblem: it is missing, is no SentencePiece model, or has tokens that the model does not read.
    """
    if reads_with_the_demos(options):
        file, key = demo.TOKENIZER, "backbone.tokenizer_path"
    else:
        file, key = Path(checkpoint_info(options).tokenizer), _key(options, "tokenizer_path")
    tokenizer, most = read_tokenizer(file, key=key), model_config(options).text_card
    if tokenizer.vocab_size() > most:
        raise EnvironmentProblem(
            f"{file}: has {tokenizer.vocab_size()} tokens, but the model reads {most} (text_card)",
            key=key,
            fix="write the path of the tokenizer that the model was trained with",
        )
    return tokenizer


def read_tokenizer(path: str | Path, *, key: str | None = None) -> SentencePieceProcessor:
    """Read a SentencePiece model.

    Args:
        path: of the file.
        key: the config's key that names it, for messages.

    Raises:
        EnvironmentProblem: it is missing, or is not a SentencePiece model.
    """
    try:
        return SentencePieceProcessor(model_proto=read_file(path, limit=_MAX_TOKENIZER))
    except OSError as error:
        reason = unreadable(error)
    except RuntimeError:
        kind = kind_of_file(path)
        reason = f"it is {kind}" if kind is not None and kind.name != "SentencePiece model" else _NO_MODEL
    raise EnvironmentProblem(
        f"{path}: cannot be read as a text tokenizer: {reason}",
        key=key,
        fix="write the path of a SentencePiece .model" if key is not None else "",
    )


_NO_MODEL: Final = "it is not a SentencePiece model"
