"""TTT over a whole video, forward and backward: what is injected into a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttt.adapter import Gate
from ttt.config import TTTConfig
from ttt.errors import InjectionError
from ttt.layer import Rotary, TTTLayer
from ttt_videodit.layout import Layout, ReadingOrder
from ttt_videodit.options import ROTARY_UNIT


class BidirectionalTTT(nn.Module):
    """One TTT layer that reads a video's tokens forward, then backward; each answer is gated and added.

    `x ← x + tanh(α_f) ⊙ TTT(x)`, then `x ← x + tanh(α_b) ⊙ rev(TTT(rev(x)))`, with an α for text and another for
    video in each direction.

    Args:
        dim: model width D.
        num_heads: heads of the backbone.
        config: the `ttt` section.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InjectionError: the head width cannot be divided between time, height and width.

    Source: TTT-Video (arXiv 2504.05298), section 3.1, equations 6 to 8.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        config: TTTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layer = TTTLayer(dim, num_heads, config, device=device, dtype=dtype)
        if config.rope == "backbone" and self.layer.head_width % ROTARY_UNIT:
            raise InjectionError(
                f"ttt: heads of width {self.layer.head_width} cannot be shared out between time, height and width; "
                f"write a ttt.num_heads that makes it a multiple of {ROTARY_UNIT}, or ttt.rope: none"
            )

        def gate() -> Gate:
            return Gate(dim, config.initial_gating_alpha, device=device, dtype=dtype)

        self.forward_gate_text, self.forward_gate_video = gate(), gate()
        self.backward_gate_text, self.backward_gate_video = gate(), gate()
        self.resets = False
        """Start each segment with fresh fast weights, in either direction; see `reset_at_segments`."""

    def forward(
        self, video: Tensor, text: Tensor, layout: Layout, remat_forward: bool = False, remat_reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read the whole video forward, then backward.

        Args:
            video: its tokens `[B,V,D]`.
            text: those of its texts, `[B,S·L,D]`.
            layout: their order.
            remat_forward: rematerialise the forward direction instead of keeping its activations.
            remat_reverse: the same for the backward direction.

        Returns:
            The video and the texts, in the same shapes.
        """
        if all(gate.closed for gate in self._gates):
            return video, text
        device = video.device
        tokens = torch.cat((text, video), dim=1)
        for remat, order, gates in (
            (remat_forward, layout.reading_order(device), self._gates[:2]),
            (remat_reverse, layout.backward_order(device), self._gates[2:]),
        ):
            if remat and torch.is_grad_enabled():
                tokens = checkpoint(self._direction, tokens, layout, order, gates, use_reentrant=False)
            else:
                tokens = self._direction(tokens, layout, order, gates)
        return tokens[:, layout.text_tokens :], tokens[:, : layout.text_tokens]

    @property
    def _gates(self) -> tuple[Gate, ...]:
        return self.forward_gate_text, self.forward_gate_video, self.backward_gate_text, self.backward_gate_video

    def _direction(self, tokens: Tensor, layout: Layout, order: ReadingOrder, gates: tuple[Gate, ...]) -> Tensor:
        """Read the tokens in an order, and add the gated answer."""
        rotary = None
        config = self.layer.config
        if config.rope == "backbone":
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            rotary = layout.rotary(self.layer.head_width, theta=config.rope_theta, device=tokens.device, dtype=dtype)
        answers = order.restore(self._answers(order.read(tokens), layout, rotary))
        text_gate, video_gate = gates
        here = layout.text_tokens
        return torch.cat(
            (text_gate(tokens[:, :here], answers[:, :here]), video_gate(tokens[:, here:], answers[:, here:])), dim=1
        )

    def _answers(self, tokens: Tensor, layout: Layout, rotary: Rotary | None) -> Tensor:
        """The layer's answers to tokens `[B,T,D]` in reading order, in one stream or in one for each segment."""
        if not self.resets:
            return self.layer(tokens, rotary=rotary)[0]
        sizes = layout.segment_sizes
        parts: list[Rotary | None] = [None] * len(sizes)
        if rotary is not None:
            parts = list(zip(*(angles.split(sizes) for angles in rotary), strict=True))
        read = zip(tokens.split(sizes, dim=1), parts, strict=True)
        return torch.cat([self.layer(segment, rotary=part)[0] for segment, part in read], dim=1)


@contextlib.contextmanager
def reset_at_segments(model: nn.Module) -> Iterator[None]:
    """A context in which TTT starts each segment of a video with fresh fast weights, forward and backward.

    What is left is what TTT adapts to within a segment, without memory of others. In a video of one segment nothing
    changes.
    """
    adapters = [module for module in model.modules() if isinstance(module, BidirectionalTTT)]
    before = [adapter.resets for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.resets = True
        yield
    finally:
        for adapter, resets in zip(adapters, before, strict=True):
            adapter.resets = resets
