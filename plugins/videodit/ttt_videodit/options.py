"""Video-DiT's options and data in a config, and the sizes that they ask for; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from ttt.config import BackboneOptions, DataOptions, LocalPath, Misfit, RunConfig
from ttt.config.sources import DataSource, Sources, require_sources_fit
from ttt.errors import EnvironmentProblem
from ttt.files import read_json
from ttt_videodit.geometry import PATCH_SIZE, SEGMENT_SEC, SPATIAL_COMPRESSION, Segments

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
    pretrained: Annotated[str | None, LocalPath()] = None
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

    train_data: str | Sources[DataSource] | None = None  # type: ignore[assignment]  # wider than the base's: see ttt.config.sources
    """An index or a folder of them, or a list of several, each {path, weight}; null takes the demo's, if it is that."""
    eval_data: str | Sources[DataSource] | None = None  # type: ignore[assignment]
    """Held-out data, named in the same way, without weights; null evaluates on the training data, and says so."""
    duration_sec: Annotated[int, Field(ge=SEGMENT_SEC, le=63 * 60)] = SEGMENT_SEC
    """Length of a training window: segments of 3 s, each with its text; a video is cut into consecutive windows."""
    text_length: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Text tokens of a segment; null is 226 for 5b and 8 for the demo."""
    height: Annotated[int, Field(ge=16, le=MOST_PIXELS)] | None = None
    """Height of the videos, pixels; null is 480 for 5b and 64 for the demo."""
    width: Annotated[int, Field(ge=16, le=MOST_PIXELS)] | None = None
    """Width of the videos, pixels; null is 720 for 5b and 64 for the demo."""
    videos: Annotated[str | None, LocalPath()] = None
    """What `ttt precompute` makes `train_data` of: lines of `{"path": "a.mp4", "captions": ["…"]}`, one each 3 s."""
    eval_videos: Annotated[str | None, LocalPath()] = None
    """What it makes `eval_data` of, in the same format."""
    verify: bool = True
    """Compare each file of latents and texts with its checksum when it is first read, which reads all of it."""

    @model_validator(mode="after")
    def _sources_fit(self) -> VideoDiTData:
        require_sources_fit(self)
        return self

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


VideoDiTRun: TypeAlias = "RunConfig[VideoDiTOptions, VideoDiTData]"
"""The config of a run of this backbone."""


def sizes(options: VideoDiTOptions) -> dict[str, int]:
    """Width, heads and blocks that the options ask for; for a local folder, those of its config.json.

    Raises:
        EnvironmentProblem: that file cannot be read, or is not a transformer's.
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


def pixels(options: VideoDiTOptions, data: VideoDiTData) -> tuple[int, int]:
    """Height and width of the videos."""
    height, width = PIXELS[options.preset]
    return data.height or height, data.width or width


def text_length(options: VideoDiTOptions, data: VideoDiTData) -> int:
    """Text tokens of a segment."""
    return data.text_length or TEXT_LENGTH[options.preset]
