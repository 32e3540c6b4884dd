"""Moshi's options and data in a config, and the sizes that they ask for; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from ttt.config import BackboneOptions, DataOptions, Misfit, RunConfig, ScoreOptions
from ttt.errors import EnvironmentProblem
from ttt.files import read_json

FRAME_RATE = 12.5
MOSHI_7B = {"dim": 4096, "num_heads": 32, "num_layers": 32}
LARGEST_SIZE = 1 << 20
"""The largest width, and number of heads and layers, that a config.json is believed."""
RECORDING_EXAMPLE = '{"path": "a.wav", "duration": 61.2}'
"""A good line of `train_data`."""
DEMO = {"dim": 128, "num_heads": 4, "num_layers": 4}
DEMO_CONTEXT = 512
"""Frames that a demo model's attention sees."""
MOSHI_CONTEXT = 3000
"""Frames that Moshi's attention sees: 240 s."""
CODEBOOKS = 8
"""Codebooks that Moshi predicts, those of its own voice."""
TEXT_PADDING = 3
"""`LMModel.text_padding_token_id`."""
NOTHING = -1
"""`LMModel.zero_token_id`: the model reads it as no input, and the loss ignores it."""
PIECE = 256
"""Frames that model and codec read at once in a long stream."""
HEAD_ROWS = 1024
"""Frames, of all rows together, whose logits are made at once: 128 MiB of Moshi's text logits in float32."""
LONG_WINDOW = 3000
"""Frames of the longest window that is read as kyutai's model reads it, at once: 240 s."""
PRETRAINED_KEYS = ("hf_repo", "revision", "moshi_path", "mimi_path", "tokenizer_path", "config_path", "random_weights")


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
    moshi_path: str | None = None
    """7b: local weights of the language model (.safetensors), instead of the repository's."""
    mimi_path: str | None = None
    """7b: local weights of the Mimi codec (.safetensors)."""
    tokenizer_path: str | None = None
    """7b: local text tokenizer (SentencePiece .model)."""
    config_path: str | None = None
    """7b: local config.json of the model; with the three paths above and none here, the published 7B's."""
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
        dim, heads = self.dim or DEMO["dim"], self.num_heads or DEMO["num_heads"]
        if self.preset == "demo" and (dim % heads or (dim // heads) % 2):
            raise Misfit(
                f"a demo model of width {dim} does not divide into {heads} heads of even width",
                keys=("dim", "num_heads"),
            )
        return self


class MoshiData(DataOptions):
    """The `data` section for Moshi: moshi-finetune's format.

    A `.jsonl` file of `{"path": …, "duration": …}` names stereo audio (left Moshi, right the user); beside each file
    lies a `.json` with `alignments: [[word, [start, end], "SPEAKER_MAIN"], …]`.
    """

    duration_sec: Annotated[float, Field(ge=0.01, le=3600)] = 15.0
    """Length of a training window in seconds; a file is cut into consecutive windows."""


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


MoshiRun: TypeAlias = "RunConfig[MoshiOptions, MoshiData]"
"""The config of a run of this backbone."""


def sizes(options: MoshiOptions) -> dict[str, Any]:
    """Width, heads and layers that the options ask for."""
    if options.preset == "demo":
        return {name: getattr(options, name) or default for name, default in DEMO.items()}
    if options.config_path is None:
        return MOSHI_7B
    written = _config_json(options.config_path)
    found = {name: written.get(name) for name in MOSHI_7B}
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
            told = f"its {name} is {value!r:.40}" if name in written else f"it has no {name}"
            raise EnvironmentProblem(
                f"{options.config_path} is not a config of a Moshi model: {told}",
                key="backbone.config_path",
                fix=f"write the path of a Moshi model's config.json, whose {', '.join(MOSHI_7B)} are whole numbers up "
                f"to {LARGEST_SIZE:,}",
            )
    return found


def context_and_codebooks(options: MoshiOptions) -> tuple[int | None, int]:
    """Frames that the attention sees, None if all; and how many codebooks the model predicts."""
    if options.preset == "demo":
        return DEMO_CONTEXT, CODEBOOKS
    if options.config_path is None:
        return MOSHI_CONTEXT, CODEBOOKS
    written = _config_json(options.config_path)
    context, codebooks = written.get("context"), written.get("dep_q", CODEBOOKS)
    for name, value in (("context", context or 1), ("dep_q", codebooks)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
            raise EnvironmentProblem(
                f"{options.config_path} is not a config of a Moshi model: its {name} is {value!r:.40}",
                key="backbone.config_path",
                fix="write the path of a Moshi model's config.json",
            )
    return context or None, codebooks


def attention_block(context: int) -> int:
    """Queries of a long window that attend at once: a mask of one block is small, and few keys are read in vain."""
    return min(max(256, context), 1024)


def _config_json(path: str) -> Mapping[str, Any]:
    try:
        return read_json(Path(path))
    except (EnvironmentProblem, ValueError) as error:  # the latter of a name that no file can have
        raise EnvironmentProblem(
            str(error), key="backbone.config_path", fix="write the path of a Moshi model's config.json"
        ) from None
