"""What is known of a causal language model before it is built: its sizes, from a config. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ttt.errors import EnvironmentProblem
from ttt.hf.options import CausalLMOptions
from ttt.reading import MAX_JSON, read_text, unreadable

SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers")
"""What a check must know."""
OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "n_ctx"),
    "vocab_size": (),
    "sliding_window": (),
}
"""What files of older architectures call them."""
_SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 2048}
BYTE_VOCABULARY = 259
"""Tokens of the byte-level tokenizer: 256 bytes, padding, beginning and end."""


def small_config(written: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a random model: what is written, and small sizes for what is not.

    They are those that the architectures of `transformers` have in common; `ttt.hf.building` leaves out those that one
    does not have.
    """
    sizes = {name: size_in(written, name) or size for name, size in _SMALL.items()}
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    small = {
        **sizes,
        "intermediate_size": 4 * width,
        "num_key_value_heads": heads if heads % 2 else heads // 2,
        "head_dim": max(2, width // heads),
        "vocab_size": BYTE_VOCABULARY,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return {**small, **written}


def known_config(options: CausalLMOptions) -> dict[str, Any]:
    """What is known of the model's config without building it.

    It is what the options write, over the `config.json` of the model's folder or of its repository in the hub's cache.
    Nothing is downloaded. If nothing else is known, it is what is written.
    """
    written = dict(options.config or {})
    if options.model is None:
        return small_config(written)
    return {**(loaded_config(options) or {}), **written}


def loaded_config(options: CausalLMOptions) -> dict[str, Any] | None:
    """What the `config.json` of the model says; None if it is not on this machine.

    Raises:
        EnvironmentProblem: it cannot be read.
    """
    file = config_file(options)
    return None if file is None else _read_config(file)


def required_sizes(options: CausalLMOptions) -> dict[str, int]:
    """The three sizes of the model.

    Raises:
        EnvironmentProblem: they are not known; the message says what to write.
    """
    if options.config is not None and all(size_in(options.config, name) for name in SIZES):
        config: Mapping[str, Any] = options.config  # whatever else there is need not be read
    else:
        config = known_config(options)
    found = {name: size_in(config, name) for name in SIZES}
    missing = [name for name, size in found.items() if size is None]
    if missing:
        raise EnvironmentProblem(
            f"{', '.join(missing)} of {options.model} cannot be known without loading it: {_why_unknown(options)}",
            key="backbone.model",
            fix=f"write config: {{{', '.join(f'{name}: …' for name in SIZES)}}} beside it",
        )
    return {name: size for name, size in found.items() if size is not None}


def _why_unknown(options: CausalLMOptions) -> str:
    if options.gguf_file is not None:
        return "a check does not read GGUF files"
    if config_file(options) is not None:
        return "its config.json does not say it"
    if as_folder(str(options.model)) is not None:
        return "the folder has no config.json"
    return "there is no such folder here, and the hub's cache does not have it"


def size_in(config: Mapping[str, Any], name: str) -> int | None:
    """A size in a config, by any of its names, of a part for text too; None if it does not tell it as a number."""
    for part in _parts(config):
        for key in (name, *OTHER_NAMES.get(name, ())):
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    text = config.get("text_config")
    if isinstance(text, Mapping):
        yield text


def config_file(options: CausalLMOptions) -> Path | None:
    """The `config.json` of the model that is on this machine; None if there is none."""
    if options.model is None or options.gguf_file is not None:
        return None
    folder = as_folder(options.model)
    if folder is not None:
        file = folder / "config.json"
        return file if file.is_file() else None
    return cached_file(options.model, "config.json", options.revision)


def as_folder(name: str) -> Path | None:
    """The folder of that name; None if there is none, so that it names a repository."""
    try:
        return Path(name) if Path(name).is_dir() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def cached_file(repository: str, file: str, revision: str | None) -> Path | None:
    """A file of a repository in the hub's cache; None if it is not there. Nothing is downloaded."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(repository, file, revision=revision)
    except ValueError:  # HFValidationError: a name that no repository can have
        return None
    return Path(found) if isinstance(found, str) else None


def _read_config(file: Path) -> dict[str, Any]:
    """The object in a `config.json`.

    Raises:
        EnvironmentProblem: it cannot be read, or holds something else.
    """
    try:
        config = json.loads(read_text(file, limit=MAX_JSON))
    except OSError as error:
        raise EnvironmentProblem(f"{file}: cannot be read: {unreadable(error)}", key="backbone.model") from None
    except (ValueError, RecursionError):
        raise EnvironmentProblem(f"{file}: is not JSON", key="backbone.model") from None
    if not isinstance(config, dict):
        raise EnvironmentProblem(f"{file}: holds no object", key="backbone.model")
    return config


def provenance(options: CausalLMOptions) -> dict[str, str]:
    """The repository of the weights, and the commit of it that is in the hub's cache; empty for a folder.

    The cache keeps each commit of a repository in a folder of its name, `models--…/snapshots/COMMIT`.
    """
    if options.model is None or as_folder(options.model) is not None:
        return {}
    file = cached_file(options.model, options.gguf_file or "config.json", options.revision)
    if file is None:
        return {"repository": options.model}
    parts = file.parts
    place = len(parts) - 1 - parts[::-1].index("snapshots") if "snapshots" in parts else None
    commit = {} if place is None or place + 1 >= len(parts) else {"commit": parts[place + 1]}
    return {"repository": options.model, **commit}
