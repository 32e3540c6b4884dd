"""Tiny random causal language models of `transformers`, of many families, made on the spot."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from ttt import TTTConfig, inject
from ttt.hf import causal_lm_sites
from ttt.inject import Injection

logging.set_verbosity_error()  # they say of each config that its special tokens are beyond a tiny vocabulary

VOCABULARY = 64
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this version of `transformers` calls the cache."""

_USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _USUAL,  # SmolLM2 too
    "mistral": _USUAL | {"sliding_window": 5},
    "mixtral": _USUAL | _EXPERTS,
    "qwen2": _USUAL,
    "qwen3": _USUAL | {"head_dim": 8},
    "gemma2": _USUAL | {"head_dim": 8, "sliding_window": 5},
    "gemma3_text": _USUAL
    | {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _USUAL,
    "olmo2": _USUAL,
    "gpt_neox": _USUAL,
    "gpt2": _GPT2,
    "gptj": _GPT2 | {"rotary_dim": 4},
    "opt": _USUAL | {"word_embed_proj_dim": 16, "ffn_dim": 32, "dropout": 0.0},
    "bloom": _USUAL,
    "falcon": _USUAL,
    "cohere": _USUAL,
    "smollm3": _USUAL,
    "qwen3_moe": _USUAL | _EXPERTS | {"head_dim": 8},
}
"""What `AutoConfig.for_model` is given, by its name of the family."""


def build(family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model in evaluation mode."""
    config = AutoConfig.for_model(family, **(FAMILIES[family] | options.pop("config", {})))
    if "experts" in str(FAMILIES[family]):
        options["experts_implementation"] = "eager"  # the other takes no float64
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()
    _spread(model)
    return model


def _spread(model: PreTrainedModel) -> None:
    """Make the logits differ: at their usual start all tokens are about as likely, and greedy decoding is a tie."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)


def with_ttt(model: PreTrainedModel, **options: Any) -> Injection:
    """TTT in all layers, with gates and rates at which it shows."""
    settings: dict[str, Any] = {
        "layers": "all",
        "layer_type": "linear",
        "mini_batch_size": 3,
        "initial_gating_alpha": 0.5,
        "base_lr": 4.0,
    }
    return inject.apply(model, causal_lm_sites(model), TTTConfig(**(settings | options)))


def text(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random tokens `[rows, length]`, none of them padding."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model: PreTrainedModel, ids: Tensor, cache: Any = None, **kwargs: Any) -> Any:
    """What a model says of the next tokens `[B,T]` of what a cache holds."""
    return model(input_ids=ids, use_cache=True, **kwargs, **({} if cache is None else {CACHE: cache}))


def cache_of(outputs: Any) -> Any:
    """The cache after what was read."""
    return outputs[CACHE]


def difference(one: Tensor, other: Tensor) -> float:
    """How far a tensor is from another, as a part of the other's size."""
    return float((one - other).norm() / other.norm())
