"""Moshi's training loss, as moshi-finetune defines it (its `finetune/loss.py`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from moshi.models.lm import LMOutput
from torch import Tensor
from torch.nn import functional as F


def moshi_loss(output: LMOutput, codes: Tensor, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of `moshi_means`, and its detached parts `text_loss` and `audio_loss`."""
    return summed(moshi_means(output, codes, **settings))


def summed(means: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the means of text and audio `[2]`, and its detached parts `text_loss` and `audio_loss`."""
    text, audio = means.detach()
    return means.sum(), {"text_loss": text, "audio_loss": audio}


def moshi_means(
    output: LMOutput,
    codes: Tensor,
    *,
    dep_q: int,
    text_padding_weight: float,
    first_codebook_weight_multiplier: float,
    text_padding_ids: Collection[int],
    untranscribed: Tensor | None = None,
    untranscribed_text_weight: float = 1.0,
) -> Tensor:
    """Text cross-entropy and audio cross-entropy, each `Σ w·ce / Σ w` over the positions that the masks allow.

    A weight is 1, except `text_padding_weight` if the text to predict is padding, and
    `first_codebook_weight_multiplier` for the first of Moshi's own codebooks. The weights also count in the divisor:
    with a multiplier of 100, the first codebook is 100 of 107 parts of the audio loss.

    Args:
        output: output of `LMModel.forward` on `codes`.
        codes: `[B, 1 + n_q, T]`: text, Moshi's own `dep_q` codebooks, the user's.
        dep_q: how many codebooks the model predicts.
        text_padding_weight: >= 0.
        first_codebook_weight_multiplier: >= 0.
        text_padding_ids: text tokens that are padding; with Moshi its padding and its end of padding.
        untranscribed: `[B, 1, T]`, true in frames of speech without transcript, whose text is padding throughout.
        untranscribed_text_weight: >= 0; multiplies what the text of those frames adds to the text loss, but not the
            divisor: that of a batch without transcripts is so much of its mean, and not the mean again. So a window has
            the same part in a loss in whichever batch it is.

    Returns:
        `[2]` in float32 (float64 for float64 logits). A part in which nothing has weight is 0.
    """
    text, audio = codes[:, :1], codes[:, 1 : 1 + dep_q]
    mask = output.text_mask.to(precision_of(output.text_logits))
    text_weights = weights_of_text(mask, text, padding_weight=text_padding_weight, padding_ids=text_padding_ids)
    audio_weights = output.mask * weights_of_codebooks(
        dep_q, first_codebook_weight_multiplier, dtype=precision_of(output.logits), device=codes.device
    )
    counted = text_weights
    if untranscribed is not None:
        counted = torch.where(untranscribed, text_weights * untranscribed_text_weight, text_weights)
    text_loss = _weighted_mean(output.text_logits, text, counted, text_weights.sum())
    audio_loss = _weighted_mean(output.logits, audio, audio_weights, audio_weights.sum())
    return torch.stack((text_loss, audio_loss))


def sums_of_weights(
    codes: Tensor,
    *,
    delays: Sequence[int],
    dep_q: int,
    text_padding_weight: float,
    first_codebook_weight_multiplier: float,
    text_padding_ids: Collection[int],
    zero_id: int,
) -> Tensor:
    """The divisors of `moshi_means` for codes `[B, 1 + n_q, T]`, `[2]` in float64, without the model.

    The masks of kyutai's model allow every position but `zero_id` and, of a stream with delay d, the last d frames.
    """
    scored, frames = codes[:, : 1 + dep_q], codes.shape[2]
    ends = torch.tensor([frames - delay for delay in delays[: 1 + dep_q]], device=codes.device)
    counts = (scored != zero_id) & (torch.arange(frames, device=codes.device) < ends[:, None])
    text = weights_of_text(
        counts[:, :1].double(), scored[:, :1], padding_weight=text_padding_weight, padding_ids=text_padding_ids
    )
    of_codebooks = weights_of_codebooks(
        dep_q, first_codebook_weight_multiplier, dtype=torch.float64, device=codes.device
    )
    return torch.stack((text.sum(), (counts[:, 1:] * of_codebooks).sum()))


def weights_of_text(mask: Tensor, text: Tensor, *, padding_weight: float, padding_ids: Collection[int]) -> Tensor:
    """The weights of text `[B,1,T]` to predict, 0 where the mask is."""
    for padding in padding_ids:
        mask = torch.where(text == padding, mask * padding_weight, mask)
    return mask


def weights_of_codebooks(dep_q: int, first: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights of Moshi's own codebooks, `[K,1]`."""
    weights = torch.ones(dep_q, 1, dtype=dtype, device=device)
    weights[0] = first
    return weights


def precision_of(logits: Tensor) -> torch.dtype:
    """What losses of logits are computed and summed in."""
    return torch.promote_types(logits.dtype, torch.float32)


def _weighted_mean(logits: Tensor, targets: Tensor, weights: Tensor, divisor: Tensor) -> Tensor:
    """Cross-entropy, `[B,K,T,card]` against `[B,K,T]`, summed with weights `[B,K,T]` and divided.

    Positions without weight are set to zero before the cross-entropy, not after. If a delay leaves a position without a
    prediction, kyutai's model fills it with NaN, and the gradient of NaN times zero is NaN.
    """
    counts = weights > 0
    logits = torch.where(counts[..., None], logits.to(weights.dtype), 0.0)
    targets = torch.where(counts, targets, 0)
    losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / divisor.clamp_min(torch.finfo(weights.dtype).tiny)
