"""Moshi's options and data in a config, and the sizes that they ask for; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from ttt.config import BackboneOptions, DataOptions, LocalPath, Misfit, RunConfig, ScoreOptions
from ttt.config.sources import DATA_KEYS, DataSource, Sources, require_sources_fit, sources_of
from ttt.plugins import NeededFile
from ttt_moshi.model_config import LARGEST_SIZE as LARGEST_SIZE  # the largest of sizes here, too
from ttt_moshi.model_config import PUBLISHED, ModelConfig, read_model_config, require_lora

FRAME_RATE = 12.5
KNOWN_REPOS = ("kyutai/moshiko-pytorch-bf16", "kyutai/moshika-pytorch-bf16")
"""Repositories that hold Moshi 7B as it was published."""
SOUND_FILES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff")
"""Endings of the files that a folder of recordings without transcripts is searched for."""
RECORDING_EXAMPLE = '{"path": "a.wav", "duration": 61.2}'
"""A good line of `train_data`."""
MOSHI_7B = {name: getattr(PUBLISHED, name) for name in ("dim", "num_heads", "num_layers")}
DEMO = {"dim": 128, "num_heads": 4, "num_layers": 4}
DEMO_CONTEXT = 512
"""Frames that a demo model's attention sees."""
DEMO_MODEL = PUBLISHED.model_copy(update={"text_card": 300, "card": 64, "context": DEMO_CONTEXT})
"""The demo's model, but for its sizes."""
NO_TRANSCRIPT = -2
"""The text token of a frame of speech without transcript, in our windows: the model reads padding there."""
NOTHING = -1
"""`LMModel.zero_token_id`: the model reads it as no input, and the loss ignores it."""
PIECE = 256
"""Frames that model and codec read at once in a long stream."""
HEAD_ROWS = 1024
"""Frames, of all rows together, whose logits are made at once: 128 MiB of Moshi's text logits in float32."""
LONG_WINDOW = 3000
"""Frames of the longest window that is read as kyutai's model reads it, at once: 240 s."""
PRETRAINED_KEYS = (
    *("hf_repo", "revision", "moshi_path", "mimi_path", "tokenizer_path", "config_path", "lora_path"),
    "random_weights",
)


class MoshiOptions(BackboneOptions):
    """The `backbone` section for Moshi."""

    name: Literal["moshi"] = "moshi"
    """The backbone's name."""
    preset: Literal["7b", "demo"] = "demo"
    """Moshi itself, or a tiny model of the same structure (17 streams, random weights) that runs anywhere."""
    hf_repo: str | None = None
    """7b: repository on the Hugging Face hub; null is kyutai/moshiko-pytorch-bf16."""
    revision: str | None = None
    """7b: branch, tag or commit of the repository; null is its newest. A commit pins what is downloaded."""
    moshi_path: Annotated[str | None, LocalPath()] = None
    """7b: local weights of the language model (.safetensors), instead of the repository's."""
    mimi_path: Annotated[str | None, LocalPath()] = None
    """7b: local weights of the Mimi codec (.safetensors)."""
    tokenizer_path: Annotated[str | None, LocalPath()] = None
    """7b: local text tokenizer (SentencePiece .model)."""
    config_path: Annotated[str | None, LocalPath()] = None
    """7b: local config.json of the model; with the three paths above and none here, the published 7B's."""
    lora_path: Annotated[str | None, LocalPath()] = None
    """7b: a LoRA by moshi-finetune (lora.safetensors), merged into the weights when they are loaded, then frozen. Its
    rank is the file's; its scaling is that of the model's config.json, else of the one beside it, else 2.0."""
    random_weights: bool = False
    """7b: leave the language model's weights random, to measure speed and memory without a download."""
    dim: Annotated[int, Field(ge=8, le=1024)] | None = None
    """demo: width; null is 128."""
    num_heads: Annotated[int, Field(ge=1, le=64)] | None = None
    """demo: heads; null is 4."""
    num_layers: Annotated[int, Field(ge=1, le=64)] | None = None
    """demo: layers; null is 4."""
    text_padding_weight: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    """Weight of padding in the text loss."""
    first_codebook_weight_multiplier: Annotated[float, Field(gt=0, le=1e6)] = 100.0
    """Weight of the first (semantic) codebook in the audio loss."""
    context: Annotated[int, Field(ge=1, le=LARGEST_SIZE)] | None = None
    """Frames that self-attention sees, its own among them; null is the model's own: 3000 (240 s), demo 512."""
    ttt_layer_context: Annotated[int, Field(ge=1, le=LARGEST_SIZE)] | None = None
    """The same of the layers that `ttt.layers` names; null is `context`."""
    non_ttt_layer_context: Annotated[int, Field(ge=1, le=LARGEST_SIZE)] | None = None
    """The same of the other layers; null is `context`."""

    @model_validator(mode="after")
    def _contexts_act(self) -> MoshiOptions:
        """Refuse a context that no layer would have."""
        given = (self.context, self.ttt_layer_context, self.non_ttt_layer_context)
        if None not in given:
            raise Misfit(
                "context is of the layers for which no other context is written, and ttt_layer_context and "
                "non_ttt_layer_context name all layers",
                keys=("context", "ttt_layer_context", "non_ttt_layer_context"),
                fix="leave out context",
            )
        return self

    @model_validator(mode="after")
    def _options_of_the_preset(self) -> MoshiOptions:
        """Refuse an option that the preset would not read."""
        others = ("dim", "num_heads", "num_layers") if self.preset == "7b" else PRETRAINED_KEYS
        given = [name for name in others if getattr(self, name) not in (None, False)]
        if given:
            other = "demo" if self.preset == "7b" else "7b"
            raise Misfit(
                f"{given[0]} belongs to preset: {other}; preset: {self.preset} does not read it",
                keys=(given[0], "preset"),
            )
        for key in ("moshi_path", "lora_path"):
            if self.random_weights and getattr(self, key) is not None:
                raise Misfit(
                    f"random_weights leaves the weights random and does not read {key}",
                    keys=(key, "random_weights"),
                    fix="leave one of the two out",
                )
        dim, heads = self.dim or DEMO["dim"], self.num_heads or DEMO["num_heads"]
        if self.preset == "demo" and (dim % heads or (dim // heads) % 2):
            raise Misfit(
                f"a demo model of width {dim} does not divide into {heads} heads of even width",
                keys=("dim", "num_heads"),
            )
        return self


Format: TypeAlias = Literal["transcribed", "audio"]
Channel: TypeAlias = Literal["left", "right", "mean"]


class MoshiSource(DataSource):
    """One of several sources of speech."""

    path: Annotated[str, Field(min_length=1)]
    """A .jsonl file or a folder, as `train_data` itself names one."""
    format: Format | None = None
    """What its recordings are; null is the section's `format`."""
    channel: Channel | None = None
    """Which channel of them is Moshi's voice, with format: audio; null is the section's `channel`."""


class MoshiData(DataOptions):
    """The `data` section for Moshi: dialogues with transcripts as moshi-finetune has them, and speech without.

    `format: transcribed`: a `.jsonl` file of `{"path": …, "duration": …}` names stereo audio (left Moshi, right the
    user); beside each file lies a `.json` with `alignments: [[word, [start, end], "SPEAKER_MAIN"], …]`.

    `format: audio`: such a `.jsonl`, or a folder of sound files at any depth, Libri-Light's layout among them. One
    channel is Moshi's voice, the user is silent, and the text stream holds padding.
    """

    train_data: str | Sources[MoshiSource] | None = None  # type: ignore[assignment]  # wider than the base's: see ttt.config.sources
    """A .jsonl file, or a folder; or a list of several, each {path, weight}; null takes the demo's, if it is that."""
    eval_data: str | Sources[MoshiSource] | None = None  # type: ignore[assignment]
    """Held-out data, named in the same way, without weights; null evaluates on the training data, and says so."""
    format: Format = "transcribed"
    """Stereo dialogues with transcripts, or audio: speech of one voice without transcripts."""
    channel: Channel | None = None
    """format audio: which channel of a recording with several is Moshi's voice; null refuses such recordings."""
    untranscribed_text_weight: Annotated[float, Field(ge=0, le=1e6)] = 0.01
    """format audio: weight of the text loss of its windows, where all text is padding; that of other windows has 1."""

    duration_sec: Annotated[float, Field(ge=0.01, le=3600)] = 15.0
    """Length of a training window in seconds; a file is cut into consecutive windows."""
    codes: Annotated[str | None, LocalPath()] = None
    """Folder of codes that `ttt precompute` makes of the recordings, once; null encodes them in every run."""

    @model_validator(mode="after")
    def _sources_fit(self) -> MoshiData:
        """Refuse what would do nothing: a source named twice, weights of an evaluation, a format that no source has."""
        require_sources_fit(self)
        named = {key: sources_of(self, key) for key in DATA_KEYS}
        for key, sources in named.items():
            for source in sources:
                self._require_voice(source, key)
        own = () if self.train_data is not None else (self.source("the demo's"),)
        self._require_use(own + named["train_data"] + named["eval_data"])
        return self

    def _require_voice(self, source: DataSource, key: str) -> None:
        if getattr(source, "channel", None) is not None and self.format_of(source) != "audio":
            raise Misfit(
                f"{source.path!r} has a channel, but Moshi's voice in format: transcribed is the left one",
                keys=(key, "format"),
                fix="write format: audio beside it, or leave out channel",
            )

    def _require_use(self, sources: Sequence[DataSource]) -> None:
        """Refuse what the section says of sources if no source takes it from there."""
        if self.format != "transcribed" and all(getattr(source, "format", None) for source in sources):
            raise Misfit(
                f"format: {self.format} is for sources without a format of their own, and each has one",
                keys=("format",),
                fix="leave it out",
            )
        heard = [source for source in sources if self.format_of(source) == "audio"]
        if self.channel is not None and not heard:
            raise Misfit(
                f"channel: {self.channel} acts with format: audio; in format: transcribed Moshi's voice is the left",
                keys=("channel", "format"),
                fix="write format: audio, or leave out channel",
            )
        weight = self.untranscribed_text_weight
        if weight != MoshiData.model_fields["untranscribed_text_weight"].default and not heard:
            raise Misfit(
                f"untranscribed_text_weight: {weight:g} acts with format: audio; other windows have transcripts",
                keys=("untranscribed_text_weight", "format"),
                fix="write format: audio, or leave out untranscribed_text_weight",
            )
        if self.channel is not None and all(getattr(source, "channel", None) for source in heard):
            raise Misfit(
                f"channel: {self.channel} is for sources without a channel of their own, and each has one",
                keys=("channel",),
                fix="leave it out",
            )

    def source(self, path: str) -> MoshiSource:
        """What a text in `train_data` or `eval_data` names."""
        return MoshiSource(path=path)

    def format_of(self, source: DataSource) -> Format:
        """What the recordings of a source are."""
        return getattr(source, "format", None) or self.format

    def channel_of(self, source: DataSource) -> Channel | None:
        """Which channel of its recordings is Moshi's voice; None if they have but one."""
        return getattr(source, "channel", None) or self.channel


class MoshiScoreOptions(ScoreOptions):
    """The `eval.score` section for Moshi: what it hears and reads, and which of its streams are scored."""

    streams: Literal["weighted", "semantic", "all", "text"] = "weighted"
    """`weighted` is the mean of Moshi's own codebooks, the first (semantic) by `first_codebook_weight_multiplier`;
    `semantic` is the first alone, `all` counts every codebook the same, `text` is the text stream."""
    user_stream: Literal["silence", "zeros"] = "silence"
    """What Moshi hears of the user: the codes of digital silence, or no input."""
    text: Literal["masked", "padding"] = "masked"
    """What Moshi's text stream holds: no input, or in each frame the padding that it holds while no word is said."""

    @model_validator(mode="after")
    def _something_is_scored(self) -> MoshiScoreOptions:
        if self.streams == "text" and self.text == "masked":
            raise Misfit(
                "streams: text scores the text stream, but text: masked leaves it empty",
                keys=("streams", "text"),
                fix="write text: padding, or score the audio with streams: weighted",
            )
        return self


def reads_with_the_demos(options: MoshiOptions) -> bool:
    """Whether the demo's codec and tokenizer are used: by the demo, and by random weights if none are named."""
    unnamed = None in (options.mimi_path, options.tokenizer_path)
    return options.preset == "demo" or (options.random_weights and unnamed)


def needed_files(options: MoshiOptions) -> dict[str, NeededFile]:
    """The local files that are read for the options, by the option that names them."""
    read = dict(_FILES)
    if options.random_weights:
        del read["moshi_path"]
    if reads_with_the_demos(options):
        del read["mimi_path"], read["tokenizer_path"]
    named = {name: getattr(options, name) for name in read}
    return {name: NeededFile(path, *_FILES[name]) for name, path in named.items() if path is not None}


_TENSORS = ("safetensors file",)
_FILES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "moshi_path": ("language model's weights (.safetensors)", _TENSORS),
    "mimi_path": ("codec Mimi's weights (.safetensors)", _TENSORS),
    "tokenizer_path": ("text tokenizer (SentencePiece .model)", ("SentencePiece model",)),
    "config_path": ("model's config.json", ("JSON text",)),
    "lora_path": ("lora.safetensors by moshi-finetune", _TENSORS),
}
"""What each option names, and the kinds of file that it may be."""

MoshiRun: TypeAlias = "RunConfig[MoshiOptions, MoshiData]"
"""The config of a run of this backbone."""


def model_config_of(options: MoshiOptions) -> ModelConfig:
    """What is known of the options' model without its weights: of the hub's, what this machine has of it.

    Raises:
        EnvironmentProblem: its config.json cannot be read, or is of a model that cannot be trained here.
    """
    if options.preset == "demo":
        return DEMO_MODEL.model_copy(update=_demo_sizes(options))
    path, key = config_file(options)
    if path is None:
        return PUBLISHED
    config = read_model_config(path, key=key)
    if options.lora_path is None and not options.random_weights:
        weights = options.moshi_path or config.moshi_name
        require_lora(config, path, weights=None if weights is None else Path(weights))
    return config


def _demo_sizes(options: MoshiOptions) -> dict[str, int]:
    return {name: getattr(options, name) or default for name, default in DEMO.items()}


def config_file(options: MoshiOptions) -> tuple[str | None, str]:
    """The config.json of 7b as far as it is on this machine, None for that of Moshi 7B; and the key to blame for it."""
    if options.config_path is not None:
        return options.config_path, "backbone.config_path"
    of_the_hub = not options.random_weights and options.hf_repo not in (None, *KNOWN_REPOS)
    return _cached_config(options) if of_the_hub else None, "backbone.hf_repo"


def _cached_config(options: MoshiOptions) -> str | None:
    """The config.json of the options' repository, if the hub's client has downloaded it before."""
    from huggingface_hub import try_to_load_from_cache

    assert options.hf_repo is not None
    try:
        found = try_to_load_from_cache(options.hf_repo, "config.json", revision=options.revision)
    except ValueError:  # not a name of a repository
        return None
    return found if isinstance(found, str) else None


def sizes(options: MoshiOptions) -> dict[str, Any]:
    """Width, heads and layers that the options ask for."""
    config = model_config_of(options)
    return {name: getattr(config, name) for name in DEMO}


def context_and_codebooks(options: MoshiOptions) -> tuple[int | None, int]:
    """Frames that the attention sees, None if all; and how many codebooks the model predicts."""
    config = model_config_of(options)
    return config.context, config.dep_q


def attention_block(context: int) -> int:
    """Queries of a long window that attend at once: a mask of one block is small, and few keys are read in vain."""
    return min(max(256, context), 1024)
