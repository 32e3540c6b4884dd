"""The `config.json` of kyutai's models: what it says, whether `LMModel` takes it, and whether it can be trained here.

The keys are those that `moshi.models.loaders` reads and those of `LMModel`, its transformer and its depth transformer.
A model can be trained if it is of Moshi's kind: one text stream, `dep_q` codebooks of its own voice and as many of the
user's, nothing else to condition on. This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ttt.errors import EnvironmentProblem
from ttt.files import read_json
from ttt.words import first_few

WAY_OUT: Final = "write the path of a Moshi model's config.json"
LARGEST_SIZE: Final = 1 << 20
"""The largest size that a config.json is believed."""

_WIDEST, _DEEPEST = 1 << 16, 1 << 10  # width and layers: more than any model has

_Size: TypeAlias = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
_Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e9)]
_Count: TypeAlias = Annotated[int, Field(ge=0, le=1024)]
_Norm: TypeAlias = Literal["layer_norm", "layer_norm_f32", "rms_norm", "rms_norm_f32"]
_Gating: TypeAlias = Literal[
    "none", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu", "silu", "mish", "softsign", "identity"
]
_Position: TypeAlias = Literal["sin", "rope", "sin_rope", "none", "rope_concat"]
_Betas: TypeAlias = tuple[float, float]


class ModelConfig(BaseModel):
    """What a config.json says, with kyutai's defaults for what it leaves out."""

    # The schema of so many keys takes time to build, which a check of a config without a config.json need not spend.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)

    # --- LMModel ---
    dim: Annotated[int, Field(ge=2, le=_WIDEST)]
    num_heads: Annotated[int, Field(ge=1, le=_WIDEST)]
    num_layers: Annotated[int, Field(ge=1, le=_DEEPEST)]
    n_q: _Count = 8
    dep_q: _Count = 8
    card: _Size = 1024
    text_card: _Size = 32000
    text_card_out: _Size | None = None
    delays: tuple[Annotated[int, Field(ge=0, le=10_000)], ...] = Field((0,), strict=False)
    hidden_scale: _Number = 4
    norm: _Norm = "layer_norm"
    norm_emb: bool = False
    bias_proj: bool = False
    context: _Size | None = None
    causal: bool = True
    existing_text_padding_id: Annotated[int, Field(ge=0, le=LARGEST_SIZE)] = 3
    existing_text_end_padding_id: Annotated[int, Field(ge=0, le=LARGEST_SIZE)] = 0
    demux_second_text_stream: bool = False
    demux_second_stream: bool = False
    extra_heads_num_heads: _Count = 0
    extra_heads_dim: _Size = 6
    quantize: bool = False
    gradient_checkpointing: bool = False
    conditioners: dict[str, Any] = Field(default_factory=dict)
    fuser: dict[str, Any] | None = None

    # --- its transformer ---
    positional_embedding: _Position = "sin"
    max_period: _Number = 10_000
    positional_scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    betas: _Betas | None = Field(None, strict=False)
    layer_scale: _Number | None = None
    gating: _Gating = "none"
    kv_repeat: _Size = 1
    cross_attention: bool = False
    skip_self_attn: bool = False
    weights_per_step: _Count = 0
    weights_per_step_schedule: list[_Count] | None = None

    # --- its depth transformer ---
    depformer_dim: Annotated[int, Field(ge=1, le=_WIDEST)] = 256
    depformer_num_heads: _Size | None = None
    depformer_num_layers: Annotated[int, Field(ge=1, le=_DEEPEST)] | None = None
    depformer_dim_feedforward: _Size | list[_Size] | None = None
    depformer_multi_linear: bool = False
    depformer_weights_per_step: bool = False
    depformer_weights_per_step_schedule: list[_Count] | None = None
    depformer_low_rank_embeddings: _Size | None = None
    depformer_pos_emb: _Position = "sin"
    depformer_norm: _Norm | None = None
    depformer_context: _Size | None = None
    depformer_max_period: _Number | None = None
    depformer_layer_scale: _Number | None = None
    depformer_gating: _Gating | None = None
    depformer_kv_repeat: _Size | None = None
    depformer_positional_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    depformer_betas: _Betas | None = Field(None, strict=False)
    depformer_causal: bool = True

    # --- the loader ---
    moshi_name: str | None = None
    mimi_name: str | None = None
    mimi_config_name: str | None = None
    tokenizer_name: str | None = None
    lora_name: str | None = None
    model_type: str = "moshi"
    lm_gen_config: dict[str, Any] = Field(default_factory=dict)
    tts_config: dict[str, Any] = Field(default_factory=dict)
    stt_config: dict[str, Any] = Field(default_factory=dict)
    model_id: dict[str, Any] = Field(default_factory=dict)
    lora: bool = False
    lora_rank: _Size = 128
    lora_scaling: Annotated[float, Field(allow_inf_nan=False)] = 2.0

    @property
    def codebooks(self) -> int:
        """Codebooks that the codec makes of each speaker."""
        return max(self.dep_q, self.n_q - self.dep_q)


PUBLISHED: Final = ModelConfig.model_construct(
    dim=4096,
    num_heads=32,
    num_layers=32,
    n_q=16,
    dep_q=8,
    card=2048,
    text_card=32000,
    context=3000,
    delays=(0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1),
)
"""Of `moshi.models.loaders._lm_kwargs`, Moshi 7B, what is read here."""


def read_model_config(path: str, *, key: str = "backbone.config_path") -> ModelConfig:
    """A config.json, checked: `LMModel` takes it, and the plugin can train what it makes.

    Args:
        path: of the file.
        key: the config's key that is to blame.

    Raises:
        EnvironmentProblem: it is missing, is something else, or is of a model that cannot be trained here.
    """
    try:
        written = read_json(Path(path))
    except (EnvironmentProblem, ValueError) as error:  # the latter of a name that no file can have
        raise EnvironmentProblem(str(error), key=key, fix=WAY_OUT) from None
    return parse_model_config(written, path, key)


def parse_model_config(written: Mapping[str, Any], path: str, key: str) -> ModelConfig:
    """The same of the content of a config.json.

    Raises:
        EnvironmentProblem: it is something else, or of a model that cannot be trained here.
    """
    foreign = _foreign(written)
    if foreign is not None:
        raise EnvironmentProblem(
            f"{path} is {foreign}, not kyutai's config of a Moshi model",
            key=key,
            fix=f"{WAY_OUT} in kyutai's format, or leave it out for Moshi 7B",
        )
    try:
        config = ModelConfig.model_validate(dict(written))
    except ValidationError as error:
        told = [_in_words(problem) for problem in error.errors()]
        raise EnvironmentProblem(
            f"{path} is not a config of a Moshi model: {first_few(told)}", key=key, fix=WAY_OUT
        ) from None
    impossible = list(_contradictions(config))
    if impossible:
        raise EnvironmentProblem(
            f"{path} is not a config of a Moshi model: {first_few(impossible)}", key=key, fix=WAY_OUT
        )
    foreign_parts = list(_untrainable(config))
    if foreign_parts:
        raise EnvironmentProblem(
            f"{path} is of a model that cannot be trained here: {first_few(foreign_parts, 5, separator='; ')}",
            key=key,
            fix="name a model of Moshi's kind, which has one text stream, dep_q codebooks of its own voice, as many of "
            "the user's, and no conditioners",
        )
    return config


def lm_settings(written: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What `get_moshi_lm` is given of a config.json: no LoRA, which is merged here, and no empty conditioners."""
    left_out = {*_OF_THE_LOADER, "lora", "lora_rank", "lora_scaling", "conditioners", "fuser"}
    kept = {key: value for key, value in written.items() if key not in left_out}
    return {**kept, "n_q": config.n_q, "dep_q": config.dep_q}


_OF_THE_LOADER: Final = (
    *("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type"),
    *("lm_gen_config", "tts_config", "stt_config", "model_id"),
)
"""Keys that `CheckpointInfo` takes out itself."""


# --- its LoRA ---


def require_lora(config: ModelConfig, place: str, *, weights: Path | None, key: str = "backbone.lora_path") -> None:
    """Refuse a model that was trained with a LoRA if none is named: its weights alone are another model.

    moshi-finetune writes `lora: true` beside a LoRA, and also beside `consolidated.safetensors`, into which it has
    merged the LoRA itself: weights of this name pass.

    Args:
        config: of the model.
        place: its config.json, as messages name it.
        weights: of the language model, if they are known.
        key: the config's key that is to blame.

    Raises:
        EnvironmentProblem: there is no LoRA.
    """
    if not config.lora or config.lora_name is not None or (weights is not None and weights.name == MERGED):
        return
    beside = Path(place).with_name(ADAPTERS)
    named = f", as {beside}" if _is_file(beside) else ""
    raise EnvironmentProblem(
        f"{place} says lora: true, so its weights alone are not the model that was trained",
        key=key,
        fix=f"write the path of its LoRA{named}; or, if the weights have it merged in, write lora: false in a copy of "
        "the config.json",
    )


MERGED: Final = "consolidated.safetensors"
"""moshi-finetune's name for whole weights, into which a LoRA is merged."""
ADAPTERS: Final = "lora.safetensors"
"""moshi-finetune's name for a LoRA."""


def lora_scaling(config: ModelConfig, lora: Path) -> float:
    """What a LoRA is multiplied by: as the model's config.json says, or the one beside it; else 2.0, kyutai's default.

    Raises:
        EnvironmentProblem: the config.json beside the LoRA holds no number there.
    """
    if config.lora:
        return config.lora_scaling
    beside = lora.with_name("config.json")
    written = read_json(beside).get("lora_scaling", config.lora_scaling) if _is_file(beside) else config.lora_scaling
    if isinstance(written, bool) or not isinstance(written, (int, float)) or not math.isfinite(written):
        raise EnvironmentProblem(
            f"{beside} has a lora_scaling of {written!r:.40}, which is no number",
            key="backbone.lora_path",
            fix="write the one with which the LoRA was trained",
        )
    return float(written)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


# --- what is wrong with it ---


def _foreign(written: Mapping[str, Any]) -> str | None:
    """What else a JSON object is, by the keys that programs write; None if nothing tells."""
    for keys, told in _FOREIGN:
        if written.keys() >= keys:
            return told
    return None


_FOREIGN: Final = (
    ({"transformers_version"}, "a config of transformers"),
    ({"architectures"}, "a config of transformers"),
    ({"_class_name"}, "a config of diffusers"),
    ({"peft_type"}, "a config of PEFT"),
    ({"backbone", "ttt"}, "the settings of an adapter by ttt"),
    ({"seanet", "quantizer"}, "a config of the codec Mimi"),
    ({"weight_map"}, "the index of weights in several files"),
    ({"moshi_paths"}, "a config of moshi-finetune's training"),
)


def _in_words(problem: Any) -> str:
    name, kind = str(problem["loc"][0]), problem["type"]
    if kind == "missing":
        return f"it has no {name}"
    if kind == "extra_forbidden":
        return f"it has the key {name!r:.60}, which kyutai's LMModel does not take"
    written = problem["input"]
    wanted = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"its {name} is {written!r:.40}, not {wanted}"


def _contradictions(config: ModelConfig) -> Iterator[str]:
    """What does not fit together."""
    if config.dim % config.num_heads or (config.dim // config.num_heads) % 2:
        yield f"its width of {config.dim} does not divide into {config.num_heads} heads of even width"
    heads = config.depformer_num_heads or config.num_heads
    if config.dep_q and config.depformer_dim % heads:
        yield f"its depformer_dim of {config.depformer_dim} does not divide into {heads} heads"
    if len(config.delays) != 1 + config.n_q:
        yield f"it has {len(config.delays)} delays for 1 + n_q = {1 + config.n_q} streams"
    for name in ("existing_text_padding_id", "existing_text_end_padding_id"):
        if getattr(config, name) >= config.text_card:
            yield f"its {name} of {getattr(config, name)} is no token of its text_card of {config.text_card}"


def _untrainable(config: ModelConfig) -> Iterator[str]:
    """What the model has that the plugin's data and loss know nothing of."""
    if config.n_q != 2 * config.dep_q or config.dep_q == 0:
        kind = {0: ", as of speech to text", config.n_q: ", as of text to speech"}.get(config.dep_q, "")
        yield f"it reads n_q = {config.n_q} codebooks and predicts dep_q = {config.dep_q} of them{kind}, not half"
    if config.conditioners:
        yield f"it has conditioners ({first_few(list(config.conditioners))}), as Hibiki has"
    elif config.fuser and any(config.fuser.get(how) for how in ("sum", "cross", "prepend")):
        yield "it has a fuser of conditions"
    if config.cross_attention:
        yield "it has cross-attention"
    if config.demux_second_text_stream or config.demux_second_stream:
        yield "it reads two text streams"
    if config.text_card_out not in (None, config.text_card):
        yield f"it reads {config.text_card} text tokens and predicts {config.text_card_out}"
    if not config.causal:
        yield "its attention is not causal"
    if config.skip_self_attn:
        yield "it has no self-attention, after which TTT goes"
    if config.quantize:
        yield "its weights are quantised to 8 bits, through which no gradient goes"
