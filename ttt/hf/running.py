"""Running a causal language model of `transformers`: its logits, whole and in pieces, and its loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt.errors import UsageError
from ttt.hf.passes import checkpointing_method
from ttt.hf.structure import CACHE_NAMES
from ttt.plugins.data import LossOutput

IGNORED = -100
"""In `shift_labels`: no token that counts."""


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of a batch, `[B,T,V]`.

    Raises:
        UsageError: the windows are longer than the model's learned positions.
    """
    most, length = learned_positions(model), batch["input_ids"].shape[1]
    if most is not None and length > most:
        raise UsageError(
            f"a window of {length:,} tokens, and the model has learned {most:,} positions; write a smaller "
            f"data.window_tokens"
        )
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return logits


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
    """Cross-entropy of the next tokens, the mean over those that count, in float32 at least; 0 if none counts."""
    logits, labels = outputs(model, batch), batch["shift_labels"]
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(precise.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return LossOutput(total / loss_weights(batch).to(total).clamp_min(1).squeeze(), labels.numel())


def loss_weights(batch: Mapping[str, Tensor]) -> Tensor:
    """How many next tokens of a batch count, `[1]`."""
    return (batch["shift_labels"] != IGNORED).sum(dtype=torch.float64)[None]


class PiecewiseReader:
    """Reads streams piece after piece, with the cache that `transformers` makes of the first.

    Args:
        model: a causal language model, with TTT or without.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._name = cache_name(model)
        self.cache: Any = None
        """Of all that has been read; None before the first piece."""

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits of the next tokens `[B,t]`, `[B,t,V]`.

        Args:
            input_ids: the tokens.
            attention_mask: `[B, all tokens so far]`, 0 where one is padding; None if none is.
        """
        given = {} if self.cache is None else {self._name: self.cache}
        found = self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **given)
        self.cache = found[self._name]
        logits: Tensor = found.logits
        return logits


def cache_name(model: nn.Module) -> str:
    """What a model's forward calls its cache.

    Raises:
        UsageError: it takes none.
    """
    taken = inspect.signature(model.forward).parameters
    name = next((name for name in CACHE_NAMES if name in taken), None)
    if name is None:
        raise UsageError(f"the forward of {type(model).__name__} takes no cache, so that it cannot read in pieces")
    return name


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model has a vector for; None if it computes them, so that there is no last one."""
    given: Any = model
    most = getattr(given.config.get_text_config(), "max_position_embeddings", None)
    tokens = given.get_input_embeddings()
    learned = (each for each in model.modules() if isinstance(each, nn.Embedding) and each is not tokens)
    return most if any(each.num_embeddings == most for each in learned) else None


def stream(model: nn.Module, batch: Mapping[str, Tensor], *, pieces: Sequence[int]) -> Tensor:
    """The same as `outputs`, read in pieces of the given lengths."""
    reader, end, found = PiecewiseReader(model), 0, []
    for piece in batch["input_ids"].split(list(pieces), 1):
        end += piece.shape[1]
        found.append(reader.read(piece, batch["attention_mask"][:, :end]))
    return torch.cat(found, 1)


def set_gradient_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Switch the checkpointing around each decoder layer, not reentrant: a frozen embedding must not stop gradients.

    Raises:
        UsageError: the model has none.
    """
    if enabled and not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"train.gradient_checkpointing: {type(model).__name__} has no activation checkpointing; write false"
        )
    if enabled:
        getattr(model, checkpointing_method("enable"))({"use_reentrant": False})
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        getattr(model, checkpointing_method("disable"))()


# --- for the laws ---


def example_batch(model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """A random batch without padding, on the model's device."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    vocabulary = config.get_text_config().vocab_size
    drawn = torch.randint(vocabulary, (batch_size, tokens + 1), generator=generator)
    drawn = drawn.to(next(model.parameters()).device)
    return as_batch(drawn[:, :-1], drawn[:, 1:])


def as_batch(input_ids: Tensor, shift_labels: Tensor) -> dict[str, Tensor]:
    """A batch of tokens `[B,T]`, none of them padding."""
    mask = torch.ones_like(input_ids)
    return {"input_ids": input_ids.contiguous(), "attention_mask": mask, "shift_labels": shift_labels.contiguous()}


def perturb(batch: Mapping[str, Tensor], *, token: int, row: int | None = None) -> dict[str, Tensor]:
    """A copy of a batch with other tokens from one on: each is the one before it in the vocabulary, or 1."""
    tokens = batch["input_ids"].clone()
    changed = tokens[slice(None) if row is None else slice(row, row + 1), token:]
    changed.copy_(torch.where(changed > 0, changed - 1, 1))
    return {**batch, "input_ids": tokens}
