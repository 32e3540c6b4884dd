"""Building a causal language model of `transformers`: pretrained, or random from a config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ttt.config.spelling import nearest
from ttt.errors import EnvironmentProblem, UsageError
from ttt.hf.facts import config_file, small_config
from ttt.hf.hub import loading
from ttt.hf.options import CausalLMOptions
from ttt.words import first_few, first_line

_OTHER_NAMES = {"intermediate_size": "n_inner"}
"""Sizes that an architecture calls otherwise and whose config has no common name for."""
_OF_ROTARY = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})
"""Keys that `transformers` reads into `rope_parameters`."""
_OF_GGUF = ("gguf", "accelerate")
"""What it needs to read a GGUF file."""


def build(options: CausalLMOptions, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The model that the options name, in eval mode; on `meta` its structure alone.

    Raises:
        EnvironmentProblem: it cannot be loaded.
        UsageError: the options do not fit the model, or it is not a causal language model.
    """
    meta = torch.device(device).type == "meta"
    if options.model is None:
        model = _from_config(random_config(options.config or {}), options, meta=meta)
    elif meta:
        model = _from_config(_structure(options), options, meta=True)
    else:
        model = _pretrained(options, dtype)
    if options.attention_window is not None:
        from ttt.hf.attention import limit_attention

        limit_attention(model, window=options.attention_window, sinks=options.attention_sinks)
    return model.to(device=device, dtype=dtype).eval()


# --- a random model ---


def random_config(written: Mapping[str, Any]) -> Any:
    """The config of a random model: what is written, and small sizes for what is not.

    Raises:
        UsageError: `transformers` has no such architecture, or it has no such key.
    """
    kind = written["model_type"]
    config_class = _config_class(kind)
    known = _keys(config_class)
    unknown = [key for key in written if key not in known and _OTHER_NAMES.get(key) not in known]
    if unknown:
        close = nearest(unknown[0], sorted(known))
        raise UsageError(
            f"the config of {kind} has no {unknown[0]!r}" + (f"; did you mean {close}?" if close else ""),
            key="backbone.config",
        )
    small = {key if key in known else _OTHER_NAMES.get(key, key): value for key, value in small_config(written).items()}
    settings = {key: value for key, value in small.items() if key in known and key != "model_type"}
    try:
        return config_class(**settings)
    except Exception as error:  # its own checks, and those of what it computes of its settings
        raise UsageError(f"{kind} cannot have such a config: {first_line(error)}", key="backbone.config") from error


def _config_class(kind: str) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind]
    except KeyError:
        close = nearest(kind, sorted(CONFIG_MAPPING.keys()))
        raise UsageError(
            f"transformers has no architecture {kind!r}" + (f"; did you mean {close}?" if close else ""),
            key="backbone.config",
        ) from None


def _keys(config_class: Any) -> set[str]:
    """The keys that a class of configs knows."""
    if is_dataclass(config_class):
        own = {field.name for field in fields(config_class)}
    else:
        own = set(inspect.signature(config_class.__init__).parameters)
    rotary = _OF_ROTARY if "rope_parameters" in own else frozenset()
    return own | rotary | {"model_type"} | set(config_class.attribute_map)


def _from_config(config: Any, options: CausalLMOptions, *, meta: bool) -> Any:
    from transformers import AutoModelForCausalLM

    require_causal(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(options.seed)
        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=options.attn_implementation
            )
        except (ValueError, ImportError, TypeError, RuntimeError) as error:
            if options.attn_implementation is not None and "ttention" in str(error):
                raise UsageError(
                    f"{options.attn_implementation} cannot be used here: {first_line(error).rstrip('.')}",
                    key="backbone.attn_implementation",
                    fix="write sdpa or eager, or install what it needs",
                ) from error
            raise UsageError(
                f"a model of {config.model_type} cannot be made: {first_line(error)}", key="backbone.config"
            ) from error


# --- a pretrained one ---


def _structure(options: CausalLMOptions) -> Any:
    """The config of a pretrained model, whose weights are not wanted; downloaded only if nothing here tells it."""
    written = dict(options.config or {})
    if "model_type" in written and config_file(options) is None:
        return random_config(written)
    return pretrained_config(options)


def pretrained_config(options: CausalLMOptions) -> Any:
    """The config of the model that the options name.

    Raises:
        EnvironmentProblem: it cannot be read.
        UsageError: the options write another.
    """
    from transformers import AutoConfig

    assert options.model is not None
    _require_gguf_readers(options)
    with loading(options.model, options.revision):
        config = AutoConfig.from_pretrained(options.model, **_source(options))
    require_causal(config)
    _require_agreement(options.config or {}, config, str(options.model))
    return config


def _pretrained(options: CausalLMOptions, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    pretrained_config(options)  # what does not fit is told before weights are downloaded
    assert options.model is not None
    with loading(options.model, options.revision):
        model, info = AutoModelForCausalLM.from_pretrained(
            options.model,
            dtype=dtype,
            attn_implementation=options.attn_implementation,
            output_loading_info=True,
            **({} if options.gguf_file else {"use_safetensors": True}),
            **_source(options),
        )
    absent = sorted(map(str, info.get("missing_keys", ())))
    if absent:
        raise EnvironmentProblem(
            f"{options.model} lacks {len(absent)} tensors of a {type(model).__name__}: {first_few(absent)}",
            key="backbone.model",
            fix="name a model with all of its weights",
        )
    return model


def _source(options: CausalLMOptions) -> dict[str, Any]:
    """Which files of a repository or folder are meant, as arguments of `from_pretrained`."""
    named = {"revision": options.revision, "gguf_file": options.gguf_file}
    return {name: value for name, value in named.items() if value is not None}


def _require_gguf_readers(options: CausalLMOptions) -> None:
    missing = [package for package in _OF_GGUF if find_spec(package) is None]
    if options.gguf_file is not None and missing:
        raise EnvironmentProblem(
            f"reading a GGUF file needs the package {' and '.join(missing)}",
            key="backbone.gguf_file",
            fix=f"pip install {' '.join(missing)}",
        )


def require_causal(config: Any) -> None:
    """Refuse a config of a model that `transformers` cannot make a causal language model of.

    Raises:
        UsageError: naming its type.
    """
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UsageError(
            f"{config.model_type} is not a causal language model: AutoModelForCausalLM of transformers has none of "
            f"that type",
            key="backbone.model",
        )


def _require_agreement(written: Mapping[str, Any], config: Any, name: str) -> None:
    """Refuse settings that are not those of the loaded model.

    Raises:
        UsageError: naming the differences.
    """
    text = config.get_text_config()
    differences = []
    for key, value in written.items():
        loaded = _setting(config, text, key)
        if loaded != _plain(value):
            differences.append(
                f"{key} is {value!r}, and {name} has {'no such key' if loaded is None else repr(loaded)}"
            )
    if differences:
        raise UsageError(
            "; ".join(differences), key="backbone.config", fix="write the loaded model's settings, or leave them out"
        )


def _setting(config: Any, text: Any, key: str) -> Any:
    """A setting of a config, of its part for text if it has one; None if there is none."""
    rotary = getattr(text, "rope_parameters", None) or {}
    found = getattr(config, key, None)
    found = getattr(text, key, None) if found is None else found
    return _plain(rotary.get(key) if found is None and key in _OF_ROTARY else found)


def _plain(value: Any) -> Any:
    """A value as JSON would give it back, so that tuples equal lists."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
