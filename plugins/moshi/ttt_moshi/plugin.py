"""The plugin: options and presets, readable without torch; the model and its data behind methods."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from ttt.config import BackboneOptions, DataOptions, Misfit, RunConfig, TrainConfig
from ttt.errors import EnvironmentProblem
from ttt.files import read_json
from ttt.plugins import Backbone, BackboneFacts, Batch, LossOutput, RecordingFormat, WindowDataset, hookimpl
from ttt_moshi.interleave import frames_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ttt.plugins import ImportedConfig, Site

FRAME_RATE = 12.5
MOSHI_7B = {"dim": 4096, "num_heads": 32, "num_layers": 32}
LARGEST_SIZE = 1 << 20
"""The largest width, and number of heads and layers, that a config.json is believed."""
DEMO = {"dim": 128, "num_heads": 4, "num_layers": 4}
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

    duration_sec: Annotated[float, Field(ge=0.01, le=240)] = 15.0
    """Length of a training window in seconds; a file is cut into consecutive windows."""


class MoshiBackbone(Backbone):
    """Moshi: autoregressive over 12.5 frames a second of 17 streams (1 text, 8 own audio, 8 of the user)."""

    name: ClassVar[str] = "moshi"
    causal: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    options: ClassVar[type[BackboneOptions]] = MoshiOptions
    data_options: ClassVar[type[DataOptions]] = MoshiData
    location_options: ClassVar[frozenset[str]] = frozenset(
        {"hf_repo", "revision", "moshi_path", "mimi_path", "tokenizer_path", "config_path"}
    )
    ttt_defaults: ClassVar[Mapping[str, Any]] = {
        "preset": "lm",
        "layer_type": "mlp",
        "qkvo_bias": True,
        "normalize_qk": True,
        "normalize_target": True,
        "learnable_token_idx": False,
        "input_norm": "rms",
    }

    def presets(self) -> Mapping[str, str]:
        """The commented configs that ship: `demo` and `7b`."""
        folder = resources.files("ttt_moshi") / "presets"
        return {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in ("demo", "7b")}

    def facts(self, config: RunConfig) -> BackboneFacts:
        """Widths by preset or config.json; tokens by `duration_sec`."""
        options, data = cast(MoshiOptions, config.backbone), cast(MoshiData, config.data)
        return BackboneFacts(
            **_sizes(options),
            tokens_per_window=frames_in(data.duration_sec, FRAME_RATE),
            window=f"{data.duration_sec:g} s of Moshi",
            recordings=RecordingFormat('{"path": "a.wav", "duration": 61.2}', data.duration_sec, beside=".json"),
            **_memory_facts(options, config.train, frames_in(data.duration_sec, FRAME_RATE)),
        )

    def has_eval_data(self, config: RunConfig) -> bool:
        """Where the config names data for it, or where the demo's own is used."""
        options, data = cast(MoshiOptions, config.backbone), config.data
        return data.eval_data is not None or (options.preset == "demo" and data.train_data is None)

    def import_config(self, text: str, *, file: str) -> ImportedConfig | None:
        """moshi-finetune's YAML, with or without a `ttt:` section."""
        from ttt_moshi.importing import import_config

        return import_config(text, file=file)

    def build(self, options: BackboneOptions, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """Make kyutai's `LMModel`, in eval mode."""
        _before_moshi_is_imported(device)
        from ttt_moshi.model import build

        return build(cast(MoshiOptions, options), device=device, dtype=dtype)

    def provenance(self, options: BackboneOptions) -> Mapping[str, str]:
        """The repository, and the commit of it that the weights are of."""
        from ttt_moshi.model import provenance

        return provenance(cast(MoshiOptions, options))

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """One for each layer of the main transformer, after self-attention and before the feed-forward."""
        from ttt_moshi.model import sites

        return sites(model)

    def dataset(self, config: RunConfig, *, split: str, device: torch.device | str) -> WindowDataset:
        """Windows of interleaved codes, `[17, T]` each."""
        _before_moshi_is_imported(device)
        from ttt_moshi.data import speech_windows

        return speech_windows(
            cast(MoshiOptions, config.backbone), cast(MoshiData, config.data), split=split, device=device
        )

    def loss(self, model: nn.Module, batch: Batch, config: RunConfig) -> LossOutput:
        """Text and audio cross-entropy, weighted as moshi-finetune does."""
        from ttt_moshi.model import loss

        return loss(model, batch, cast(MoshiOptions, config.backbone))

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        """Switch kyutai's own, around every layer of both transformers."""
        from ttt_moshi.model import set_gradient_checkpointing

        set_gradient_checkpointing(model, enabled)

    def is_attention(self, parameter_name: str) -> bool:
        """The main transformer's self-attention."""
        return parameter_name.startswith("transformer.") and ".self_attn." in parameter_name

    def tiny(self) -> BackboneOptions:
        """The demo, smaller."""
        return MoshiOptions(preset="demo", dim=32, num_heads=2, num_layers=3)

    def example_batch(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Batch:
        """Random codes `[B,17,T]`."""
        from ttt_moshi.model import example_codes

        return example_codes(model, batch_size=batch_size, tokens=tokens, seed=seed)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the main transformer answers to each frame of codes, and its text logits, `[B,T,D+text_card]`."""
        from ttt_moshi.model import outputs

        return outputs(model, batch)

    def perturb(self, batch: Batch, *, token: int, row: int | None = None) -> Batch:
        """Other codes from a frame on."""
        from ttt_moshi.model import perturb

        return perturb(batch, token=token, row=row)

    def stream(self, model: nn.Module, batch: Batch, *, pieces: Sequence[int]) -> Tensor:
        """`outputs`, through kyutai's streaming state."""
        from ttt_moshi.model import stream

        return stream(model, batch, pieces=pieces)


def _before_moshi_is_imported(device: torch.device | str) -> None:
    """Spare a CPU the 20 s and more that compiling moshi's norm costs and does not win back.

    Moshi reads the variable when it is first imported, for the model or for Mimi.
    """
    if str(device).startswith("cpu"):
        os.environ.setdefault("NO_TORCH_COMPILE", "1")


def _sizes(options: MoshiOptions) -> dict[str, Any]:
    """Width, heads and layers that the options ask for."""
    if options.preset == "demo":
        return {name: getattr(options, name) or default for name, default in DEMO.items()}
    if options.config_path is None:
        return MOSHI_7B
    try:
        written = read_json(Path(options.config_path))
    except (EnvironmentProblem, ValueError) as error:  # the latter of a name that no file can have
        raise EnvironmentProblem(
            str(error), key="backbone.config_path", fix="write the path of a Moshi model's config.json"
        ) from None
    found = {name: written.get(name) for name in MOSHI_7B}
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
            told = f"its {name} is {value!r:.40}" if name in written else f"it has no {name}"
            raise EnvironmentProblem(
                f"{options.config_path} is no config of a Moshi model: {told}",
                key="backbone.config_path",
                fix=f"write the path of a Moshi model's config.json, whose {', '.join(MOSHI_7B)} are whole numbers up "
                f"to {LARGEST_SIZE:,}",
            )
    return cast("dict[str, int]", found)


def _memory_facts(options: MoshiOptions, train: TrainConfig, frames: int) -> dict[str, Any]:
    """Parameters, and bytes that autograd was measured to keep of one token, where the model is a known one."""
    dtype, checkpointing = train.param_dtype, train.gradient_checkpointing
    if options.config_path is not None:
        return {}
    if options.preset == "7b":
        layer, head, head_checkpointing = {
            "float32": (368_648, 4_429_485, 472_365),
            "bfloat16": (254_047, 3_028_827, 349_529),
        }[dtype]
        head = head_checkpointing if checkpointing else head
        sizes = {"parameters": 7_687_729_152, "attention_parameters": 2_147_483_648}
        return {**sizes, "layer_activation_bytes": layer, "head_activation_bytes": head}
    dim, layers = (_sizes(options)[name] for name in ("dim", "num_layers"))
    size = {"float32": 4.0, "bfloat16": 2.8}[dtype]  # norms and the softmax of the losses stay float32
    return {
        "parameters": layers * (10 * dim * dim + 2 * dim) + 2154 * dim + 736_768,
        "attention_parameters": layers * 4 * dim * dim,
        "layer_activation_bytes": round(size * (21.25 * dim + frames + 6)),
        "head_activation_bytes": round(size * (3 * dim + (2_434 if checkpointing else 20_066))),
    }


_BACKBONE = MoshiBackbone()


@hookimpl
def ttt_backbone() -> Backbone:
    """The hook: this plugin's backbone."""
    return _BACKBONE
