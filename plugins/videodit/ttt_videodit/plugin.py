"""The plugin: options and presets, readable without torch; the model and its data behind methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator, model_validator

from ttt.config import BackboneOptions, DataOptions, Misfit, RunConfig
from ttt.errors import EnvironmentProblem
from ttt.files import read_json
from ttt.plugins import Backbone, BackboneFacts, Batch, LossOutput, SamplePlan, SampleRequest, WindowDataset, hookimpl
from ttt_videodit.geometry import (
    LATENT_CHANNELS,
    PATCH_SIZE,
    SEGMENT_SEC,
    SPATIAL_COMPRESSION,
    Segments,
    segments_in,
    tokens_per_frame,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

    from ttt.plugins import ImportedConfig, Site

DEFAULT_PRETRAINED = "THUDM/CogVideoX-5b"
COGVIDEOX_5B = {"dim": 3072, "num_heads": 48, "num_layers": 42}
DEMO = {"dim": 64, "num_heads": 4, "num_layers": 4}
LARGEST_SIZE = 1 << 20
"""The largest number of heads and blocks, and width of a head, that a config.json is believed."""
DEMO_TIME_DIM = 128
DEMO_TEXT_DIM = 32
PRESETS = ("demo", "3s", "9s", "18s", "30s", "63s")
REMAT_OPTIONS = (
    "transformer_checkpoint_layer_group_size",
    "remat_attention",
    "remat_forward_ttt",
    "remat_reverse_ttt",
    "remat_mlp",
    "remat_seq_modeling_block",
)
PIXELS = {"5b": (480, 720), "demo": (64, 64)}
MOST_PIXELS = 16384
"""Height and width of a video at most: 16K."""
TEXT_LENGTH = {"5b": 226, "demo": 8}
DIFFUSERS, TTT_VIDEO = "diffusers", "ttt-video"
"""Values of `sampling_schedule`."""
ROTARY_UNIT = 16
"""A head is shared out 1/4 : 3/8 : 3/8 between time, height and width, each an even number of channels."""


class VideoDiTOptions(BackboneOptions):
    """The `backbone` section for Video-DiT."""

    name: Literal["videodit"] = "videodit"
    """The backbone's name."""
    preset: Literal["5b", "demo"] = "demo"
    """CogVideoX 5B, or a tiny transformer of the same structure (random weights) that runs anywhere."""
    pretrained: str | None = None
    """5b: repository on the Hugging Face hub, or a folder in diffusers' layout; null is THUDM/CogVideoX-5b."""
    revision: str | None = None
    """5b: branch, tag or commit of the repository; null is its newest. A commit pins what is downloaded."""
    random_weights: bool = False
    """5b: leave the transformer's weights random, to measure speed and memory without a download."""
    dim: Annotated[int, Field(ge=16, le=1024)] | None = None
    """demo: width; null is 64."""
    num_heads: Annotated[int, Field(ge=1, le=64)] | None = None
    """demo: heads; null is 4."""
    num_layers: Annotated[int, Field(ge=1, le=64)] | None = None
    """demo: blocks; null is 4."""
    attn_length: Annotated[int, Field(ge=1, le=1024)] = 12
    """Latent frames from the start of one segment to that of the next; attention sees one segment at a time."""
    prefix_temporal_length: Annotated[int, Field(ge=0, le=1024)] = 1
    """Latent frames that a segment shares with the next one; the first segment's are the start of the video."""
    transformer_checkpoint_layer_group_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Blocks in one activation checkpoint, with `train.gradient_checkpointing: true`."""
    remat_attention: bool = False
    """Run the attention of a block again in backward instead of keeping its activations."""
    remat_forward_ttt: bool = False
    """The same for the TTT layer's pass over the video."""
    remat_reverse_ttt: bool = False
    """The same for its pass over the reversed video."""
    remat_mlp: bool = False
    """The same for a block's feed-forward."""
    remat_seq_modeling_block: bool = False
    """The same for attention and TTT together, around their own."""
    text_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of videos that train without their text, for the sake of guidance in sampling."""
    sampling_schedule: Literal["diffusers", "ttt-video"] | None = None
    """Whose steps `ttt sample` takes; null is ttt-video for an adapter imported from there, and else diffusers."""

    @model_validator(mode="after")
    def _options_of_the_preset(self) -> VideoDiTOptions:
        """Refuse an option that the preset would not read, and sizes that do not fit."""
        others = (
            ("dim", "num_heads", "num_layers") if self.preset == "5b" else ("pretrained", "revision", "random_weights")
        )
        given = [name for name in others if getattr(self, name) not in (None, False)]
        if given:
            other = "demo" if self.preset == "5b" else "5b"
            raise Misfit(
                f"{given[0]} belongs to preset: {other}; preset: {self.preset} does not read it",
                keys=(given[0], "preset"),
            )
        if self.random_weights and self.pretrained is not None:
            raise Misfit(
                "random_weights: true does not read pretrained",
                keys=("random_weights", "pretrained"),
                fix="write one of them",
            )
        dim, heads = self.dim or DEMO["dim"], self.num_heads or DEMO["num_heads"]
        if self.preset == "demo" and (dim % heads or (dim // heads) % ROTARY_UNIT):
            raise Misfit(
                f"a demo model of width {dim} does not divide into {heads} heads whose width is a multiple of "
                f"{ROTARY_UNIT}, as rotary embedding in three dimensions needs",
                keys=("dim", "num_heads"),
            )
        if self.prefix_temporal_length > self.attn_length:
            raise Misfit(
                f"prefix_temporal_length: {self.prefix_temporal_length} is more than attn_length: {self.attn_length}; "
                f"a segment cannot share more frames than it has",
                keys=("prefix_temporal_length", "attn_length"),
            )
        return self

    @property
    def segments(self) -> Segments:
        """How videos are cut."""
        return Segments(self.attn_length, self.prefix_temporal_length)


class VideoDiTData(DataOptions):
    """The `data` section for Video-DiT: precomputed latents and text embeddings.

    `ttt precompute` makes them: a `.jsonl` index, one line for each video, that names safetensors files beside it.
    """

    duration_sec: Annotated[int, Field(ge=SEGMENT_SEC, le=63 * 60)] = SEGMENT_SEC
    """Length of a training window: segments of 3 s, each with its text; a video is cut into consecutive windows."""
    text_length: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Text tokens of a segment; null is 226 for 5b and 8 for the demo."""
    height: Annotated[int, Field(ge=16, le=MOST_PIXELS)] | None = None
    """Height of the videos, pixels; null is 480 for 5b and 64 for the demo."""
    width: Annotated[int, Field(ge=16, le=MOST_PIXELS)] | None = None
    """Width of the videos, pixels; null is 720 for 5b and 64 for the demo."""
    videos: str | None = None
    """What `ttt precompute` makes `train_data` of: lines of `{"path": "a.mp4", "captions": ["…"]}`, one each 3 s."""
    eval_videos: str | None = None
    """What it makes `eval_data` of, in the same format."""
    verify: bool = True
    """Compare each file of latents and texts with its checksum when it is first read, which reads all of it."""

    @field_validator("duration_sec")
    @classmethod
    def _whole_segments(cls, value: int) -> int:
        if value % SEGMENT_SEC:
            raise Misfit(f"a window is a whole number of segments of {SEGMENT_SEC} s", fix="write a multiple of 3")
        return value

    @field_validator("height", "width")
    @classmethod
    def _whole_tokens(cls, value: int | None) -> int | None:
        side = SPATIAL_COMPRESSION * PATCH_SIZE
        if value is not None and value % side:
            raise Misfit(f"a token stands for {side} × {side} pixels", fix=f"write a multiple of {side}")
        return value


def check_data(config: RunConfig) -> Sequence[Any]:
    """What `ttt check` finds in the data (VDT5xx) and the weights (VDT6xx)."""
    from ttt_videodit.rules import RULES

    return [finding for rule in RULES for finding in rule(config)]


class VideoDiTBackbone(Backbone):
    """CogVideoX's diffusion transformer over segments of video: bidirectional, from noise to v-prediction."""

    name: ClassVar[str] = "videodit"
    causal: ClassVar[bool] = False
    options: ClassVar[type[BackboneOptions]] = VideoDiTOptions
    data_options: ClassVar[type[DataOptions]] = VideoDiTData
    # What is rematerialised, how often a text is dropped and how is sampled is no part of which model it is.
    location_options: ClassVar[frozenset[str]] = frozenset(
        {"pretrained", "revision", "text_dropout", "sampling_schedule", *REMAT_OPTIONS}
    )
    ttt_defaults: ClassVar[Mapping[str, Any]] = {"preset": "video", "layer_type": "mlp", "mini_batch_size": 64}

    sample_suffix: ClassVar[str] = ".mp4"
    rules: ClassVar[Sequence[Callable[[RunConfig], Sequence[Any]]]] = (check_data,)

    def explanations(self) -> Mapping[str, Any]:
        """What the codes VDT5xx and VDT6xx mean."""
        from ttt_videodit.explanations import explanations

        return explanations()

    def presets(self) -> Mapping[str, str]:
        """The commented configs that ship: `demo`, and TTT-Video's curriculum, `3s` to `63s`."""
        folder = resources.files("ttt_videodit") / "presets"
        return {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in PRESETS}

    def facts(self, config: RunConfig) -> BackboneFacts:
        """Widths by preset; tokens by seconds, pixels and text length."""
        options, data = cast(VideoDiTOptions, config.backbone), cast(VideoDiTData, config.data)
        size, segments = sizes(options), segments_in(data.duration_sec)
        height, width = pixels(options, data)
        frames = options.segments.frames(segments)
        return BackboneFacts(
            dim=size["dim"],
            num_heads=size["num_heads"],
            num_layers=size["num_layers"],
            tokens_per_window=segments * text_length(options, data) + frames * tokens_per_frame(height, width),
            window=f"{data.duration_sec} s of video at {width} × {height}",
            scans=_checkpoints_around(options, config.train.gradient_checkpointing),
            gates=4,
            layers_per_checkpoint=options.transformer_checkpoint_layer_group_size,
            parameters=_parameters(options, **size),
            attention_parameters=size["num_layers"]
            * 4
            * (size["dim"] ** 2 + size["dim"] + size["dim"] // size["num_heads"]),
            layer_activation_bytes=_layer_activation_bytes(options, config.train.param_dtype, size["dim"]),
            head_activation_bytes=round(4.5 * _BYTES[config.train.param_dtype] * size["dim"]),
        )

    def has_eval_data(self, config: RunConfig) -> bool:
        """Where the config names data for it, or where the demo's own is used."""
        options, data = cast(VideoDiTOptions, config.backbone), config.data
        return data.eval_data is not None or (options.preset == "demo" and data.train_data is None)

    def import_config(self, text: str, *, file: str) -> ImportedConfig | None:
        """TTT-Video's TOML."""
        from ttt_videodit.importing import import_config

        return import_config(text, file=file)

    def plan_sample(self, config: RunConfig, *, seconds: float, out: Path) -> SamplePlan:
        """A prompt for each segment of 3 s; an mp4, and its contact sheet beside it."""
        from ttt_videodit.request import plan_sample

        return plan_sample(seconds=seconds, out=out)

    def check_sample(self, config: RunConfig, request: SampleRequest) -> None:
        """Its prompts, steps and guidance; and that a local folder has the VAE and T5."""
        from ttt_videodit.request import check_request

        check_request(request, cast(VideoDiTOptions, config.backbone))

    def build(self, options: BackboneOptions, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """Make the transformer, in eval mode."""
        from ttt_videodit.model import build

        return build(cast(VideoDiTOptions, options), device=device, dtype=dtype)

    def provenance(self, options: BackboneOptions) -> Mapping[str, str]:
        """The repository, and the commit of it that the weights are of."""
        from ttt_videodit.pretrained import provenance

        return provenance(cast(VideoDiTOptions, options))

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """One for each block: its attention, after which TTT reads the whole video."""
        from ttt_videodit.model import sites

        return sites(model)

    def dataset(self, config: RunConfig, *, split: str, device: torch.device | str) -> WindowDataset:
        """Windows of latents and text embeddings."""
        from ttt_videodit.data import latent_windows

        return latent_windows(
            cast(VideoDiTOptions, config.backbone), cast(VideoDiTData, config.data), split=split, device=device
        )

    def precompute(self, config: RunConfig, *, console: Console) -> None:
        """Encode the videos of `data.videos` and `data.eval_videos` by CogVideoX's VAE and T5."""
        from ttt_videodit.precompute import precompute

        precompute(config, console=console)

    def import_weights(self, source: Path, out: Path, *, console: Console) -> Sequence[Path]:
        """A checkpoint of TTT-Video: the transformer in diffusers' layout, and an adapter."""
        from ttt_videodit.checkpoint import look_at

        look_at(source)  # before what takes seconds to import
        from ttt_videodit.weights import import_weights

        return import_weights(source, out, console=console)

    def sample(
        self, model: nn.Module, request: SampleRequest, config: RunConfig, *, console: Console
    ) -> Sequence[Path]:
        """A video from noise, by diffusers' scheduler with classifier-free guidance."""
        from ttt_videodit.sampling import sample

        return sample(model, request, config, console=console)

    def prepare_samples(
        self, model: nn.Module, requests: Sequence[SampleRequest], config: RunConfig, *, console: Console
    ) -> Callable[[SampleRequest], Sequence[Path]]:
        """Many videos, for which the VAE and T5 are loaded once."""
        from ttt_videodit.sampling import prepare_samples

        return prepare_samples(model, requests, config, console=console)

    def loss(self, model: nn.Module, batch: Batch, config: RunConfig) -> LossOutput:
        """The error of the v-prediction, weighted as CogVideoX is trained."""
        from ttt_videodit.diffusion import training_loss

        return training_loss(model, batch, cast(VideoDiTOptions, config.backbone))

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        """Switch activation checkpointing around groups of blocks."""
        from ttt_videodit.model import set_gradient_checkpointing

        set_gradient_checkpointing(model, enabled)

    def is_attention(self, parameter_name: str) -> bool:
        """The q, k, v and o of the blocks' attention, and the norms of q and k."""
        return ".attn1." in parameter_name

    def tiny(self) -> BackboneOptions:
        """The demo, smaller, with segments of three latent frames."""
        return VideoDiTOptions(preset="demo", dim=32, num_heads=2, num_layers=2, attn_length=2)

    def tiny_like(self, options: BackboneOptions) -> BackboneOptions:
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


def sizes(options: VideoDiTOptions) -> dict[str, int]:
    """Width, heads and blocks that the options ask for; those of a local folder are what its config.json says.

    Raises:
        EnvironmentProblem: that file cannot be read, or is none of a transformer.
    """
    if options.preset == "demo":
        return {name: getattr(options, name) or default for name, default in DEMO.items()}
    folder = Path(options.pretrained or "")
    files = [folder / "config.json", folder / "transformer" / "config.json"] if options.pretrained else []
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return COGVIDEOX_5B
    try:
        written = read_json(file)
    except EnvironmentProblem as error:
        fix = "name a folder with CogVideoX's transformer"
        raise EnvironmentProblem(str(error), key="backbone.pretrained", fix=fix) from None
    heads, width, layers = (
        written.get(name, default)  # as diffusers fills in what a config.json leaves out
        for name, default in (("num_attention_heads", 30), ("attention_head_dim", 64), ("num_layers", 30))
    )
    if not all(
        isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST_SIZE
        for size in (heads, width, layers)
    ):
        raise EnvironmentProblem(
            f"{file}: its num_attention_heads, attention_head_dim and num_layers are "
            f"{heads!r:.40}, {width!r:.40} and {layers!r:.40}",
            key="backbone.pretrained",
            fix="name a folder with CogVideoX's transformer",
        )
    return {"dim": heads * width, "num_heads": heads, "num_layers": layers}


_BYTES = {"float32": 4, "bfloat16": 2}


def _parameters(options: VideoDiTOptions, *, dim: int, num_heads: int, num_layers: int) -> int:
    """Parameters of the transformer: blocks, embeddings of patches, texts and times, output."""
    time, text = (DEMO_TIME_DIM, DEMO_TEXT_DIM) if options.preset == "demo" else (512, 4096)
    patch = LATENT_CHANNELS * PATCH_SIZE**2
    modulation = (time + 1) * 6 * dim + 2 * dim
    attention = 4 * (dim * dim + dim + dim // num_heads)
    block = 2 * modulation + attention + 8 * dim * dim + 5 * dim
    around = (patch + 1 + text + 1) * dim + (dim + 1 + time + 1) * time
    around += (time + 1) * 2 * dim + 4 * dim + (dim + 1) * patch
    return num_layers * block + around


def _layer_activation_bytes(options: VideoDiTOptions, dtype: str, dim: int) -> int:
    """What autograd was measured to keep of one token in a block, on one segment: 23 numbers for each channel."""
    widths = 8.0  # residuals, norms and modulation; next, attention and feed-forward, where they are kept
    widths += 0 if options.remat_attention or options.remat_seq_modeling_block else 7.1
    widths += 0 if options.remat_mlp else 8.0
    return round(widths * dim * _BYTES[dtype])


def _checkpoints_around(options: VideoDiTOptions, gradient_checkpointing: bool) -> tuple[int, int]:
    """Activation checkpoints around the forward and around the backward direction of a TTT layer."""
    both = gradient_checkpointing + options.remat_seq_modeling_block
    return both + options.remat_forward_ttt, both + options.remat_reverse_ttt


def pixels(options: VideoDiTOptions, data: VideoDiTData) -> tuple[int, int]:
    """Height and width of the videos."""
    height, width = PIXELS[options.preset]
    return data.height or height, data.width or width


def text_length(options: VideoDiTOptions, data: VideoDiTData) -> int:
    """Text tokens of a segment."""
    return data.text_length or TEXT_LENGTH[options.preset]


_BACKBONE = VideoDiTBackbone()


@hookimpl
def ttt_backbone() -> Backbone:
    """The hook: this plugin's backbone."""
    return _BACKBONE
