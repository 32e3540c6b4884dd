"""A tiny random causal language model of `transformers`, for tests of what wraps one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(*, seed: int = 0, layers: int = 4, **settings: Any) -> LlamaForCausalLM:
    """The same model for the same seed, in eval mode."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def some_tokens(rows: int = 2, length: int = 20, *, seed: int = 0) -> Tensor:
    """Random tokens `[rows,length]`, none of them padding."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: Tensor) -> Tensor:
    """The model's logits for whole sequences."""
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return result


def opened(model: Any) -> Any:
    """The model with gates and adapters moved from where they start, as by training; returned."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.injection.state_dict().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model
