"""Windows too long to be read as kyutai's model reads them: their loss, and what their layers attend to, in pieces.

`LMModel.forward` makes the logits of all frames at once, and its attention a mask of all frames by all frames. Here
both are made of some frames at a time, and the logits once more in backward. The numbers are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from moshi.models import LMModel
from moshi.models.lm_utils import _delay_sequence
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ttt_moshi.heads import hidden_states, logits_of, some_steps
from ttt_moshi.loss import precision_of, summed, weights_of_codebooks, weights_of_text
from ttt_moshi.options import LONG_WINDOW, attention_block

# --- the loss ---


def long_window_loss(model: LMModel, codes: Tensor, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of `long_window_means`, and its detached parts, as `moshi_loss` has them."""
    return summed(long_window_means(model, codes, **settings))


def long_window_means(
    model: LMModel,
    codes: Tensor,
    *,
    text_padding_weight: float,
    first_codebook_weight_multiplier: float,
    text_padding_ids: Collection[int],
    untranscribed: Tensor | None = None,
    untranscribed_text_weight: float = 1.0,
) -> Tensor:
    """`moshi_means` of the model's own output, with the logits of some steps at a time.

    Codes are read step by step, as kyutai's delays order them: a stream with delay d is at frame t in step t + d.

    Args:
        model: whose heads and depformer are run again in backward.
        codes: `[B,17,T]`.
        text_padding_weight: as of `moshi_means`, with those that follow.
        first_codebook_weight_multiplier: >= 0.
        text_padding_ids: text tokens that are padding.
        untranscribed: `[B,1,T]`, true in frames of speech without transcript.
        untranscribed_text_weight: >= 0; what their text adds to the text loss, but not to its divisor.

    Returns:
        As `moshi_means`.
    """
    initial = model._get_initial_token().expand(codes.shape[0], -1, -1)
    delayed = torch.cat([initial, _delay_sequence(model.delays, codes, initial)], 2)
    targets = delayed[:, :, 1:]
    hidden = hidden_states(model, delayed[:, :, :-1])
    scored = targets[:, : 1 + model.dep_q]
    step = torch.arange(codes.shape[2], device=codes.device)
    delays = torch.tensor(model.delays[: 1 + model.dep_q], device=codes.device)
    counts = (scored != model.zero_token_id) & (step >= delays[:, None])
    kind = precision_of(hidden)
    text = weights_of_text(
        counts[:, :1].to(kind), scored[:, :1], padding_weight=text_padding_weight, padding_ids=text_padding_ids
    )
    audio = counts[:, 1:] * weights_of_codebooks(
        model.dep_q, first_codebook_weight_multiplier, dtype=kind, device=codes.device
    )
    counted = text
    if untranscribed is not None:
        late = F.pad(untranscribed, (model.delays[0], 0))[..., : codes.shape[2]]
        counted = torch.where(late, text * untranscribed_text_weight, text)
    sums = [torch.zeros((), dtype=kind, device=codes.device) for _ in range(2)]
    summed = partial(_weighted_sums, model)
    for piece in some_steps(hidden, targets, counted, audio):
        more = checkpoint(summed, *piece, use_reentrant=False, preserve_rng_state=False)
        sums = [total + part for total, part in zip(sums, more, strict=True)]
    tiny = torch.finfo(kind).tiny
    return torch.stack((sums[0] / text.sum().clamp_min(tiny), sums[1] / audio.sum().clamp_min(tiny)))


def _weighted_sums(
    model: LMModel, hidden: Tensor, targets: Tensor, text: Tensor, audio: Tensor
) -> tuple[Tensor, Tensor]:
    """`Σ w·ce` of the text and of the audio of some steps."""
    logits = logits_of(model, hidden, targets)
    own = targets[:, 1 : 1 + model.dep_q]
    return _weighted_sum(logits.text, targets[:, :1], text), _weighted_sum(logits.audio, own, audio)


def _weighted_sum(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Of logits `[B,K,t,card]`, targets and weights `[B,K,t]`; a target without weight need not be a code."""
    codes = torch.where(weights > 0, targets, 0)
    losses = F.cross_entropy(logits.to(weights.dtype).flatten(0, 2), codes.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


# --- attention ---


class BlockwiseAttention(StreamingMultiheadAttention):
    """kyutai's attention, which reads a long window in blocks of queries, each with the keys that its context allows.

    Everything else (streams, windows of up to 240 s, attention without a context) is kyutai's own code. It has no
    parameters of its own, so that a module can become one and stay what it is.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        """Attend `[B,T,D]`; with kyutai's arguments, which are one tensor in self-attention."""
        if not self._is_long(query):
            return super().forward(query, key, value)
        shape = (*query.shape[:2], 3, self.num_heads, -1)
        q, k, v = self.in_projs[0](query).view(shape).permute(2, 0, 3, 1, 4)
        if self.rope:
            q, k = self.rope(q, k, query.new_zeros(query.shape[0], dtype=torch.long), time_before_heads=False)
        return self.out_projs[0](_in_blocks(q, k, v, self.context).transpose(1, 2).flatten(2))

    def _is_long(self, x: Tensor) -> bool:
        return (
            self._streaming_state is None
            and self.context is not None
            and x.shape[1] > LONG_WINDOW
            and attention_block(self.context) + self.context - 1 < x.shape[1]
        )


def read_long_windows_in_blocks(model: LMModel) -> LMModel:
    """Let the main transformer's layers read long windows in blocks, if their attention is kyutai's as we know it."""
    for layer in model.transformer.layers:
        attention = layer.self_attn
        plain = type(attention) is StreamingMultiheadAttention and attention.causal and attention.kv_repeat == 1
        if plain and len(attention.in_projs) == 1:
            attention.__class__ = BlockwiseAttention
    return model


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, context: int) -> Tensor:
    """Causal attention of `[B,H,T,F]` that sees the last `context` keys."""
    length, block = q.shape[2], attention_block(context)
    shared = _mask(block, context, q)
    parts = []
    for start in range(0, length, block):
        end, first = min(start + block, length), max(0, start - context + 1)
        mask = shared[: end - start, first - start + context - 1 : end - start + context - 1].contiguous()
        parts.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], mask))
    return torch.cat(parts, 2)


def _mask(block: int, context: int, like: Tensor) -> Tensor:
    """What a block's queries see of its keys and the `context - 1` before: summands `[block, block + context - 1]`."""
    query = torch.arange(block, device=like.device)[:, None] + context - 1
    delta = query - torch.arange(block + context - 1, device=like.device)
    seen = (delta >= 0) & (delta < context)
    return torch.zeros(seen.shape, device=like.device, dtype=like.dtype).masked_fill(~seen, -torch.inf)
