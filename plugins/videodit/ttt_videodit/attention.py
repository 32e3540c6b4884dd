"""CogVideoX's attention by segments, TTT over the whole video after it, and which parts of a block are recomputed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import ttt_videodit.diffusers_alone  # noqa: F401

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttt_videodit.adapter import BidirectionalTTT
from ttt_videodit.layout import Layout
from ttt_videodit.options import VideoDiTOptions


@dataclass(frozen=True)
class Remat:
    """Which parts of a block are recomputed in backward instead of keeping their activations."""

    layer_group_size: int = 1
    """Blocks in one checkpoint, if the model's gradient checkpointing is on."""
    attention: bool = False
    forward_ttt: bool = False
    reverse_ttt: bool = False
    mlp: bool = False
    seq_modeling_block: bool = False
    """Attention and TTT together."""

    @classmethod
    def of(cls, options: VideoDiTOptions) -> Remat:
        """What a `backbone` section asks for."""
        return cls(
            options.transformer_checkpoint_layer_group_size,
            options.remat_attention,
            options.remat_forward_ttt,
            options.remat_reverse_ttt,
            options.remat_mlp,
            options.remat_seq_modeling_block,
        )


def rematerialised(function: Callable[..., Any], *args: Any, when: bool) -> Any:
    """Call the function; with `when`, keep only its inputs and recompute it in backward."""
    if when and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


class SegmentAttention(Attention):
    """CogVideoX's attention on each segment alone: its text and its frames.

    If segments share a frame, their outputs are averaged. With one segment this is diffusers' attention.
    """

    remat = Remat()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        layout: Layout,
        **attention_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend within each segment; returns tokens of the video `[B,V,D]` and of its texts `[B,S·L,D]`.

        Args:
            hidden_states: tokens of the video.
            encoder_hidden_states: tokens of the texts.
            attention_mask: as in diffusers, for one segment.
            layout: the order of the tokens.
            attention_kwargs: `image_rotary_emb` of one segment, and other arguments of the processor.
        """
        local = functools.partial(self._local, layout=layout, attention_mask=attention_mask, **attention_kwargs)

        def mix(video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            video, text = rematerialised(local, video, text, when=self.remat.attention)
            return self._whole(video, text, layout)

        mixed = rematerialised(mix, hidden_states, encoder_hidden_states, when=self.remat.seq_modeling_block)
        return cast("tuple[Tensor, Tensor]", mixed)

    def _local(self, video: Tensor, text: Tensor, *, layout: Layout, **attention_kwargs: Any) -> tuple[Tensor, Tensor]:
        attend = functools.partial(super().forward, **attention_kwargs)
        if layout.count == 1:
            return cast("tuple[Tensor, Tensor]", attend(video, text))
        shared = layout.segments.prefix_temporal_length * layout.frame_tokens
        step = layout.segments.attn_length * layout.frame_tokens
        videos: list[Tensor] = []
        texts: list[Tensor] = []
        tail: Tensor | None = None
        for index in range(layout.count):
            segment, caption = attend(
                video[:, index * step : index * step + step + shared],
                text[:, index * layout.text_length : (index + 1) * layout.text_length],
            )
            head = segment[:, :shared]
            videos += [head if tail is None else (tail + head) / 2, segment[:, shared:step]]
            texts.append(caption)
            tail = segment[:, step:]
        assert tail is not None
        return torch.cat([*videos, tail], dim=1), torch.cat(texts, dim=1)

    def _whole(self, video: Tensor, text: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The step over the whole video after attention: none here; TTT if it is injected."""
        return video, text


class AdaptedAttention(SegmentAttention):
    """Attention on each segment, then TTT over the whole video."""

    ttt: BidirectionalTTT

    def _whole(self, video: Tensor, text: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        remat = self.remat
        return cast("tuple[Tensor, Tensor]", self.ttt(video, text, layout, remat.forward_ttt, remat.reverse_ttt))


class RematFeedForward(FeedForward):
    """A block's feed-forward, which can be recomputed in backward."""

    remat = Remat()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens `[B,T,D]` to tokens."""
        return cast(
            Tensor,
            rematerialised(functools.partial(super().forward, **kwargs), hidden_states, *args, when=self.remat.mlp),
        )
