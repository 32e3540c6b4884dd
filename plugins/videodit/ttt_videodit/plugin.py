"""The plugin: options and presets, readable without torch; the model and its data behind methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ttt.config import BackboneOptions, DataOptions, RunConfig
from ttt.packaged import packaged_presets
from ttt.plugins import (
    Backbone,
    BackboneFacts,
    Batch,
    DiffusionScoring,
    LossOutput,
    Precomputing,
    SamplePlan,
    SampleRequest,
    Sampling,
    SegmentLosses,
    SegmentReset,
    WeightImport,
    WindowDataset,
    WindowSource,
    hookimpl,
)
from ttt_videodit.geometry import LATENT_CHANNELS, PATCH_SIZE, segments_in, tokens_per_frame
from ttt_videodit.options import (
    DEMO_TEXT_DIM,
    DEMO_TIME_DIM,
    PRESETS,
    REMAT_OPTIONS,
    VideoDiTData,
    VideoDiTOptions,
    VideoDiTRun,
    pixels,
    sizes,
    text_length,
)
from ttt_videodit.rules import RULES

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

    from ttt.plugins import ImportedConfig, Site


class VideoDiTBackbone(
    Backbone[VideoDiTOptions, VideoDiTData],
    Sampling[VideoDiTOptions, VideoDiTData],
    Precomputing[VideoDiTOptions, VideoDiTData],
    WeightImport,
    DiffusionScoring[VideoDiTOptions, VideoDiTData],
    SegmentReset,
):
    """CogVideoX's diffusion transformer over segments of video: bidirectional, from noise to v-prediction."""

    name: ClassVar[str] = "videodit"
    causal: ClassVar[bool] = False
    options: ClassVar[type[BackboneOptions]] = VideoDiTOptions
    data_options: ClassVar[type[DataOptions]] = VideoDiTData
    # Which model it is does not depend on what is rematerialised, how often texts are dropped, or how it is sampled.
    non_identity_options: ClassVar[frozenset[str]] = frozenset(
        {"pretrained", "revision", "text_dropout", "sampling_schedule", *REMAT_OPTIONS}
    )
    ttt_defaults: ClassVar[Mapping[str, Any]] = {"preset": "video", "layer_type": "mlp", "mini_batch_size": 64}

    sample_suffix: ClassVar[str] = ".mp4"
    rules: ClassVar[Sequence[Callable[[RunConfig], Iterable[Any]]]] = RULES

    def presets(self) -> Mapping[str, str]:
        """The commented configs that ship: `demo`, and TTT-Video's curriculum, `3s` to `63s`."""
        return packaged_presets("ttt_videodit", PRESETS)

    def facts(self, config: VideoDiTRun) -> BackboneFacts:
        """Widths by preset; tokens by seconds, pixels and text length."""
        options, data = config.backbone, config.data
        size, segments = sizes(options), segments_in(data.duration_sec)
        height, width = pixels(options, data)
        frames = options.segments.frames(segments)
        return BackboneFacts(
            dim=size["dim"],
            num_heads=size["num_heads"],
            num_layers=size["num_layers"],
            tokens_per_window=segments * text_length(options, data) + frames * tokens_per_frame(height, width),
            window=f"{data.duration_sec} s of video at {width} × {height}",
            checkpoints_around_scans=_checkpoints_around(options, config.train.gradient_checkpointing),
            gates=4,
            layers_per_checkpoint=options.transformer_checkpoint_layer_group_size,
            parameters=_parameters(options, **size),
            less_memory={name: True for name in REMAT_OPTIONS if getattr(options, name) is False},
            layer_parameters=_block_parameters(options, dim=size["dim"], num_heads=size["num_heads"]),
            attention_parameters=size["num_layers"]
            * 4
            * (size["dim"] ** 2 + size["dim"] + size["dim"] // size["num_heads"]),
            layer_activation_bytes=_layer_activation_bytes(options, config.train.param_dtype, size["dim"]),
            head_activation_bytes=round(4.5 * _BYTES[config.train.param_dtype] * size["dim"]),
        )

    def has_own_data(self, options: VideoDiTOptions) -> bool:
        """The demo has a clip; with random weights latents are random too."""
        return options.preset == "demo" or options.random_weights

    def has_own_eval_data(self, options: VideoDiTOptions) -> bool:
        """The demo's data have a held-out part."""
        return options.preset == "demo"

    def plan_sample(self, config: VideoDiTRun, *, seconds: float, out: Path) -> SamplePlan:
        """A prompt for each segment of 3 s; an mp4, and its contact sheet beside it."""
        from ttt_videodit.request import plan_sample

        return plan_sample(seconds=seconds, out=out)

    def check_sample(self, config: VideoDiTRun, request: SampleRequest) -> None:
        """Its prompts, steps and guidance; and that a local folder has the VAE and T5."""
        from ttt_videodit.request import check_request

        check_request(request, config.backbone)

    def build(self, options: VideoDiTOptions, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """Make the transformer, in eval mode."""
        from ttt_videodit.building import build

        return build(options, device=device, dtype=dtype)

    def provenance(self, options: VideoDiTOptions) -> Mapping[str, str]:
        """The repository, and the commit of it that the weights are of."""
        from ttt_videodit.pretrained import provenance

        return provenance(options)

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """One for each block: its attention, after which TTT reads the whole video."""
        from ttt_videodit.model import sites

        return sites(model)

    def dataset(self, config: VideoDiTRun, *, split: str, device: torch.device | str) -> WindowDataset:
        """Windows of latents and text embeddings."""
        from ttt_videodit.data import latent_windows

        return latent_windows(config.backbone, config.data, split=split, device=device)

    def precompute(self, config: VideoDiTRun, *, console: Console) -> None:
        """Encode the videos of `data.videos` and `data.eval_videos` by CogVideoX's VAE and T5."""
        from ttt_videodit.precompute import precompute

        precompute(config, console=console)

    def import_weights(self, source: Path, out: Path, *, console: Console) -> Sequence[Path]:
        """A checkpoint of TTT-Video: the transformer in diffusers' layout, and an adapter."""
        from ttt_videodit.checkpoint import look_at

        look_at(source)  # before what takes seconds to import
        from ttt_videodit.weights import import_weights

        return import_weights(source, out, backbone=self, console=console)

    def sample(
        self, model: nn.Module, request: SampleRequest, config: VideoDiTRun, *, console: Console
    ) -> Sequence[Path]:
        """A video from noise, by diffusers' scheduler with classifier-free guidance."""
        from ttt_videodit.sampling import sample

        return sample(model, request, config, console=console)

    def prepare_samples(
        self, model: nn.Module, requests: Sequence[SampleRequest], config: VideoDiTRun, *, console: Console
    ) -> Callable[[SampleRequest], Sequence[Path]]:
        """Many videos, for which the VAE and T5 are loaded once."""
        from ttt_videodit.sampling import prepare_samples

        return prepare_samples(model, requests, config, console=console)

    def loss(self, model: nn.Module, batch: Batch, config: VideoDiTRun) -> LossOutput:
        """The error of the v-prediction, weighted as CogVideoX is trained."""
        from ttt_videodit.diffusion import training_loss

        return training_loss(model, batch, config.backbone)

    def num_timesteps(self, config: VideoDiTRun) -> int:
        """1,000, as CogVideoX's schedule has."""
        from ttt_videodit.diffusion import schedule_of

        return len(schedule_of(config.backbone))

    def window_source(self, dataset: WindowDataset, index: int) -> WindowSource:
        """The video that a window was encoded from."""
        source: WindowSource = dataset.source(index)  # type: ignore[attr-defined]
        return source

    def diffusion_losses(
        self, model: nn.Module, batch: Batch, config: VideoDiTRun, *, timesteps: Tensor, seeds: Sequence[int]
    ) -> SegmentLosses:
        """The error of the v-prediction at given timesteps, by segment."""
        from ttt_videodit.diffusion import losses_by_segment

        return losses_by_segment(model, batch, config.backbone, timesteps=timesteps, seeds=seeds)

    def reset_at_segments(self, model: nn.Module) -> AbstractContextManager[None]:
        """Both directions of TTT start each segment with fresh fast weights."""
        from ttt_videodit.adapter import reset_at_segments

        return reset_at_segments(model)

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        """Switch activation checkpointing around groups of blocks."""
        from ttt_videodit.model import set_gradient_checkpointing

        set_gradient_checkpointing(model, enabled)

    def is_attention(self, parameter_name: str) -> bool:
        """The q, k, v and o of the blocks' attention, and the norms of q and k."""
        return ".attn1." in parameter_name

    def tiny(self) -> VideoDiTOptions:
        """The demo, smaller, with segments of three latent frames."""
        return VideoDiTOptions(preset="demo", dim=32, num_heads=2, num_layers=2, attn_length=2)

    def tiny_like(self, options: VideoDiTOptions) -> VideoDiTOptions:
        """The same, rematerialising what the options do."""
        kept = {name: getattr(options, name) for name in REMAT_OPTIONS}
        return self.tiny().model_copy(update=kept)

    def example_batch(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Batch:
        """Random latents, texts and times of diffusion."""
        from ttt_videodit.model import example_batch

        return example_batch(model, batch_size=batch_size, tokens=tokens, seed=seed)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What each token of video was denoised to, `[B,T,4·channels]`."""
        from ttt_videodit.model import outputs

        return outputs(model, batch)

    def perturb(self, batch: Batch, *, token: int, row: int | None = None) -> Batch:
        """Other latents and texts from a token on."""
        from ttt_videodit.model import perturb

        return perturb(batch, token=token, row=row)


_BYTES = {"float32": 4, "bfloat16": 2}


def _parameters(options: VideoDiTOptions, *, dim: int, num_heads: int, num_layers: int) -> int:
    """Parameters of the transformer: blocks, embeddings of patches, texts and times, output."""
    time, text = _embedded(options)
    patch = LATENT_CHANNELS * PATCH_SIZE**2
    around = (patch + 1 + text + 1) * dim + (dim + 1 + time + 1) * time
    around += (time + 1) * 2 * dim + 4 * dim + (dim + 1) * patch
    return num_layers * _block_parameters(options, dim=dim, num_heads=num_heads) + around


def _block_parameters(options: VideoDiTOptions, *, dim: int, num_heads: int) -> int:
    """Parameters of one block: modulation, attention, feed-forward."""
    modulation = (_embedded(options)[0] + 1) * 6 * dim + 2 * dim
    attention = 4 * (dim * dim + dim + dim // num_heads)
    return 2 * modulation + attention + 8 * dim * dim + 5 * dim


def _embedded(options: VideoDiTOptions) -> tuple[int, int]:
    """Widths of the embeddings of times and of texts."""
    return (DEMO_TIME_DIM, DEMO_TEXT_DIM) if options.preset == "demo" else (512, 4096)


def _layer_activation_bytes(options: VideoDiTOptions, dtype: str, dim: int) -> int:
    """What autograd was measured to keep of one token in a block, on one segment: 23 numbers for each channel."""
    widths = 8.0  # residuals, norms and modulation; next, attention and feed-forward, if they are kept
    widths += 0 if options.remat_attention or options.remat_seq_modeling_block else 7.1
    widths += 0 if options.remat_mlp else 8.0
    return round(widths * dim * _BYTES[dtype])


def _checkpoints_around(options: VideoDiTOptions, gradient_checkpointing: bool) -> tuple[int, int]:
    """Activation checkpoints around the forward and around the backward direction of a TTT layer."""
    both = gradient_checkpointing + options.remat_seq_modeling_block
    return both + options.remat_forward_ttt, both + options.remat_reverse_ttt


_BACKBONE = VideoDiTBackbone()


@hookimpl
def ttt_backbone() -> Backbone:
    """The hook: this plugin's backbone."""
    return _BACKBONE


@hookimpl
def ttt_import_config(text: str, file: str) -> ImportedConfig | None:
    """The hook: TTT-Video's TOML."""
    from ttt_videodit.importing import import_config

    return import_config(text, file=file)
