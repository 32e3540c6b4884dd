"""Moshi's two passes, apart: the main transformer over all steps, and the heads over some steps at a time.

`LMModel.forward` makes the logits of all steps at once. Of a long window they take more memory than all the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moshi.models import LMModel
from torch import Tensor

from ttt_moshi.options import HEAD_ROWS


class Logits(NamedTuple):
    """What is predicted in some steps."""

    text: Tensor
    """`[B,1,t,text_card]`."""
    audio: Tensor
    """Of Moshi's own codebooks, `[B,K,t,card]`."""


def hidden_states(model: LMModel, inputs: Tensor) -> Tensor:
    """The main transformer's output `[B,t,D]`: as `LMModel.forward_text`, but without the logits of all text tokens."""
    embedded = model.emb[0](inputs[:, 1])
    for embedding, codes in zip(list(model.emb)[1:], inputs.unbind(1)[2:], strict=True):
        embedded = embedded + embedding(codes)
    embedded = embedded + model.text_emb(inputs[:, 0])
    hidden: Tensor = model.out_norm(model.transformer(embedded))
    return hidden


def logits_of(model: LMModel, hidden: Tensor, targets: Tensor) -> Logits:
    """The logits of targets `[B,17,t]` given the output `[B,t,D]` before each."""
    return Logits(model.text_linear(hidden)[:, None], model.forward_depformer_training(targets, hidden))


def some_steps(hidden: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The output `[B,t,D]` and tensors `[B,·,t]`, cut into pieces of so many steps that few logits exist at once."""
    steps = max(1, HEAD_ROWS // max(1, hidden.shape[0]))
    return zip(hidden.split(steps, 1), *(other.split(steps, 2) for other in others), strict=True)
