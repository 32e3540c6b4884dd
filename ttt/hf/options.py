"""The sections `backbone`, `data` and `eval.score` of a causal language model's config; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, field_validator, model_validator

from ttt.config import BackboneOptions, DataOptions, LocalPath, Misfit
from ttt.config.sources import DataSource, Sources, require_sources_fit

MOST_TOKENS = 1 << 24
"""Tokens of a window, and of what attention sees."""
NOTHING = -1
"""In a clip: no token, the padding of a shorter clip."""


class CausalLMOptions(BackboneOptions):
    """The `backbone` section for a causal language model of `transformers`.

    A subclass says `name: Literal["mybackbone"] = "mybackbone"`, and adds what its model needs.
    """

    model: Annotated[str | None, LocalPath()] = None
    """Repository on the Hugging Face hub, as Qwen/Qwen3-0.6B, or folder of a model; null makes a random one."""
    gguf_file: str | None = None
    """Name of a GGUF file in it, whose weights and tokenizer are read (needs the packages gguf and accelerate)."""
    revision: str | None = None
    """Branch, tag or commit of the repository; null is its newest. A commit pins what is downloaded."""
    config: Mapping[str, Any] | None = None
    """Settings of the model as its config.json has them. With `model` null they make a random model: model_type, and
    sizes, which are small unless written. With `model` they must be the loaded model's; with its hidden_size,
    num_attention_heads and num_hidden_layers, `ttt check` needs no download."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of a random model's weights."""
    attn_implementation: str | None = None
    """How attention is computed, as sdpa, eager or flash_attention_2; null is the choice of transformers."""
    attention_window: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    """How many tokens attention sees, the newest among them; null leaves it as the model has it."""
    attention_sinks: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    """How many tokens at the beginning it sees beside the window."""
    tokenizer: Annotated[str | None, LocalPath(not_paths=("bytes",))] = None
    """null is the model's own; bytes is one token for each byte, for random models; else a repository or folder."""

    @field_validator("config")
    @classmethod
    def _config_says_what_it_is(cls, config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        if config is None:
            return None
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            value = config.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise Misfit(f"{name} is {value!r}, not a whole number from 1")
        kind = config.get("model_type")
        if kind is not None and not isinstance(kind, str):
            raise Misfit(f"model_type is {kind!r}, not a name")
        return config

    @model_validator(mode="after")
    def _names_a_model(self) -> CausalLMOptions:
        """Refuse what names no model, and what would act on a model that is not named."""
        if self.model is None and (self.config is None or "model_type" not in self.config):
            raise Misfit(
                "neither a model nor the config of a random one is named",
                keys=("model", "config"),
                fix="write model: a repository or folder, or config: {model_type: llama}",
            )
        for name in ("gguf_file", "revision"):
            if self.model is None and getattr(self, name) is not None:
                raise Misfit(f"{name} says which weights of a model are read, and model is null", keys=(name, "model"))
        if self.model is not None and self.seed:
            raise Misfit("seed draws a random model's weights, and a model is named", keys=("seed", "model"))
        if self.attention_sinks and self.attention_window is None:
            raise Misfit(
                "attention_sinks are seen beside a window, and attention_window is null",
                keys=("attention_sinks", "attention_window"),
                fix="write an attention_window, or attention_sinks: 0",
            )
        return self


class TextData(DataOptions):
    """The `data` section: `train_data` and `eval_data` are texts.

    A text file is a document; a line of a `.jsonl` is one, and a row of a `.parquet` (needs the package datasets). A
    folder holds such files at any depth.
    """

    train_data: str | Sources[DataSource] | None = None  # type: ignore[assignment]  # wider than the base's: see ttt.config.sources
    """A file or folder of texts; or a list of several, each {path, weight}; null takes a random model's own."""
    eval_data: str | Sources[DataSource] | None = None  # type: ignore[assignment]
    """Held-out texts, named in the same way, without weights; null evaluates on the training data, and says so."""

    window_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 1024
    """Length of a window; a document is cut into consecutive windows, the last of which is padded."""
    text_key: Annotated[str, Field(min_length=1)] = "text"
    """The key of a `.jsonl` line, and the column of a `.parquet`, that holds the text."""
    add_bos: bool | None = None
    """Begin each document with the tokenizer's beginning-of-sequence token; null does what the tokenizer does."""
    add_eos: bool | None = None
    """End each document with its end-of-sequence token; null does what the tokenizer does."""

    @model_validator(mode="after")
    def _sources_fit(self) -> TextData:
        require_sources_fit(self)
        return self


CausalLMOptionsT = TypeVar("CausalLMOptionsT", bound=CausalLMOptions)
"""A plugin's `backbone` section."""
TextDataT = TypeVar("TextDataT", bound=TextData)
"""Its `data` section."""
