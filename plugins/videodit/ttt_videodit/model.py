"""CogVideoX's transformer for videos of any number of segments, where TTT goes, and what the laws ask of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import ttt_videodit.diffusers_alone  # noqa: F401

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from ttt.plugins import Site
from ttt_videodit.adapter import BidirectionalTTT
from ttt_videodit.attention import AdaptedAttention, Remat, RematFeedForward, SegmentAttention, rematerialised
from ttt_videodit.geometry import LATENT_CHANNELS, PATCH_SIZE, Segments
from ttt_videodit.layout import Layout
from ttt_videodit.variants import WAY_OUT, wrong_variant

LAST_WITHOUT_EFFECT = frozenset({"backward_gate_text.gating_alpha"})


class VideoDiT(CogVideoXTransformer3DModel):
    """CogVideoX's transformer for videos of any number of segments: same parameters, same names.

    A video of one segment with one text is answered bit for bit as by diffusers' own class: the same operations on the
    same shapes.

    Args: as `diffusers.CogVideoXTransformer3DModel`.

    Raises:
        ValueError: another of CogVideoX's releases (2b, 1.5, those for images); the message names it.
    """

    # The signature is what diffusers reads a model's config by.
    @functools.wraps(CogVideoXTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        wrong = wrong_variant({**self.config, "_class_name": None})
        if wrong is not None:
            raise ValueError(f"it {wrong}; {WAY_OUT}")
        self.segments = Segments()
        for block in self.transformer_blocks:
            block.attn1.__class__ = SegmentAttention
            block.ff.__class__ = RematFeedForward

    def arrange(self, segments: Segments, remat: Remat) -> None:
        """Set how videos are cut, and what is rematerialised."""
        self.segments = segments
        for block in self.transformer_blocks:
            block.attn1.remat = block.ff.remat = remat

    def layout(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Layout:
        """The layout of latents `[B,Fr,C,h,w]` and texts `[B,S,L,E]` as tokens.

        Raises:
            ValueError: the frames are not a whole number of segments, or the texts are not one for each segment.
        """
        frames, _, height, width = hidden_states.shape[1:]
        texts, text_length = encoder_hidden_states.shape[1:3]
        side = self.config.patch_size
        return Layout.of(
            self.segments,
            frames=frames,
            texts=texts,
            text_length=text_length,
            height=height // side,
            width=width // side,
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        timestep_cond: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity of noised latents.

        Args:
            hidden_states: latents `[B,Fr,C,h,w]`.
            encoder_hidden_states: a text for each segment, `[B,S,L,E]`; `[B,L,E]` for one segment.
            timestep: of the diffusion, `[B]`.
            timestep_cond: as diffusers' own.
            image_rotary_emb: cosine and sine of one segment's video tokens; None computes them.
            attention_kwargs: for the attention processors.
            return_dict: False gives a tuple.

        Returns:
            `[B,Fr,C,h,w]`, in `.sample`.

        Raises:
            ValueError: the frames are not a whole number of segments, or the texts are not one for each segment.
        """
        if encoder_hidden_states.dim() == 3:
            encoder_hidden_states = encoder_hidden_states[:, None]
        layout = self.layout(hidden_states, encoder_hidden_states)
        if image_rotary_emb is None:
            image_rotary_emb = self._segment_rotary(layout, hidden_states.device)
        kwargs = {**(attention_kwargs or {}), "layout": layout}

        embedded_time = self.time_proj(timestep).to(hidden_states.dtype)
        embedded_time = self.time_embedding(embedded_time, timestep_cond)
        tokens = self.embedding_dropout(self.patch_embed(encoder_hidden_states.flatten(1, 2), hidden_states))
        text, video = tokens[:, : layout.text_tokens], tokens[:, layout.text_tokens :]
        for group in self._groups():
            video, text = rematerialised(
                functools.partial(_through, group, embedded_time, image_rotary_emb, kwargs),
                video,
                text,
                when=self.gradient_checkpointing,
            )
        video = self.proj_out(self.norm_out(self.norm_final(video), temb=embedded_time))
        side = self.config.patch_size
        output = (
            video.unflatten(1, (layout.frames, layout.height, layout.width))
            .unflatten(-1, (-1, side, side))
            .permute(0, 1, 4, 2, 5, 3, 6)
            .flatten(5, 6)
            .flatten(3, 4)
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _groups(self) -> Iterator[list[nn.Module]]:
        blocks = list(self.transformer_blocks)
        size = blocks[0].attn1.remat.layer_group_size if blocks else 1
        for start in range(0, len(blocks), size):
            yield blocks[start : start + size]

    def _segment_rotary(self, layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of one segment's video tokens, as diffusers' pipeline makes them for a video."""
        side = self.config.patch_size
        return _local_rotary(
            self.config.attention_head_dim,
            (layout.height, layout.width),
            (self.config.sample_height // side, self.config.sample_width // side),
            layout.segments.length,
            device,
        )


def _through(
    blocks: list[nn.Module],
    embedded_time: Tensor,
    rotary: tuple[Tensor, Tensor],
    attention_kwargs: dict[str, Any],
    video: Tensor,
    text: Tensor,
) -> tuple[Tensor, Tensor]:
    """The video and its texts through some blocks."""
    for block in blocks:
        video, text = block(
            hidden_states=video,
            encoder_hidden_states=text,
            temb=embedded_time,
            image_rotary_emb=rotary,
            attention_kwargs=attention_kwargs,
        )
    return video, text


@functools.lru_cache(maxsize=8)
def _local_rotary(
    head_width: int, grid: tuple[int, int], trained: tuple[int, int], frames: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Source: `_prepare_rotary_positional_embeddings` of diffusers' `pipeline_cogvideox.py`."""
    height, width = trained
    region = get_resize_crop_region_for_grid(grid, width, height)
    return cast(
        "tuple[Tensor, Tensor]",
        get_3d_rotary_pos_embed(
            embed_dim=head_width, crops_coords=region, grid_size=grid, temporal_size=frames, device=device
        ),
    )


# --- where TTT goes, and what is rematerialised ---


def sites(model: nn.Module) -> list[Site]:
    """One site for each block."""
    transformer = cast(VideoDiT, model)
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    return [
        Site(
            layer=index,
            path=f"transformer_blocks.{index}.attn1",
            module=block.attn1,
            dim=heads * width,
            num_heads=heads,
            subclass=AdaptedAttention,
            adapter=BidirectionalTTT,
            # The model's output is the video: what the last block makes of the texts is dropped.
            without_effect=LAST_WITHOUT_EFFECT if index + 1 == len(transformer.transformer_blocks) else frozenset(),
        )
        for index, block in enumerate(transformer.transformer_blocks)
    ]


def set_gradient_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Switch activation checkpointing around groups of blocks."""
    cast(VideoDiT, model).gradient_checkpointing = enabled


# --- running on random videos, for the laws ---


def example_batch(model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Random latents and texts of the fewest segments that make so many tokens, in the form of a training batch.

    Frames widen with the tokens, so that a long video is a dozen segments or so, not hundreds of a few tokens each.
    """
    transformer = cast(VideoDiT, model)
    text_length, height, width, count = 2, 3, max(1, tokens // 64), 1
    segments = transformer.segments

    def layout() -> Layout:
        return Layout(segments, count, text_length, height, width)

    while layout().tokens < tokens:
        count += 1
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(batch_size, *shape, generator=generator)
        return drawn.to(device=transformer.device, dtype=transformer.dtype)

    mean = normal(layout().frames, LATENT_CHANNELS, height * PATCH_SIZE, width * PATCH_SIZE)
    return {
        "mean": mean,
        "std": torch.zeros_like(mean),
        "text": normal(count, text_length, transformer.config.text_embed_dim),
    }


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The velocity of each token of video, `[B,T,4·channels]`, with rows at different times of the diffusion."""
    latents = batch["mean"]
    times = torch.linspace(100, 900, latents.shape[0], device=latents.device).long()
    sample = model(latents, batch["text"], times, return_dict=False)[0]
    patches = sample.unfold(3, PATCH_SIZE, PATCH_SIZE).unfold(4, PATCH_SIZE, PATCH_SIZE)
    return cast(Tensor, patches.permute(0, 1, 3, 4, 2, 5, 6).flatten(1, 3).flatten(2))


def perturb(batch: dict[str, Tensor], *, token: int, row: int | None) -> dict[str, Tensor]:
    """A copy with other texts, and another video from a token on, in raster order of its frames."""
    changed = {name: value.clone() for name, value in batch.items()}
    rows = slice(None) if row is None else slice(row, row + 1)
    mean = changed["mean"]
    height, width = (side // PATCH_SIZE for side in mean.shape[-2:])
    places = torch.arange(mean.shape[1] * height * width, device=mean.device).view(-1, height, width)
    later = (places >= token).repeat_interleave(PATCH_SIZE, 1).repeat_interleave(PATCH_SIZE, 2)[:, None]
    mean[rows] = torch.where(later, mean[rows] + 1, mean[rows])
    changed["text"][rows] += 1
    return changed
