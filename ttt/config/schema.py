"""What a run is: strict, frozen pydantic models. Each field is described here and nowhere else.

A field's docstring is its description in the JSON schema, in the comments of `ttt init` and in the docs. This module
imports no torch, so that checking a config is instant.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from ttt.config.evaluation import EvalConfig
from ttt.config.group_size import cost_of_groups_of_one
from ttt.config.lora import Adapter, LoraConfig
from ttt.config.misfit import Misfit
from ttt.config.paths import LocalPath
from ttt.config.section import Section
from ttt.config.training import ParallelConfig as ParallelConfig
from ttt.config.training import TrainConfig as TrainConfig
from ttt.config.values import (
    MOST_HEADS,
    MOST_RATE,
    MOST_STEPS,
    Epsilon,
    HiddenDims,
    Layers,
    WholeNumber,
)
from ttt.errors import NestedCheckpointWarning

PRESETS: dict[str, dict[str, Any]] = {
    # TTT-LM: arXiv 2407.04620, its PyTorch code's `ttt.py`.
    "lm": {
        "causal": True,
        "qkvo_bias": False,
        "normalize_qk": False,
        "normalize_target": False,
        "rope": "mini_batch",
        "learnable_token_idx": True,
        "ln_eps": 1e-6,
        "input_norm": "none",
    },
    # TTT-Video: arXiv 2504.05298, its code's `ttt/models/ssm/ttt_layer.py`. The ε of the inner norms is from the
    # kernels with which it trains and samples (`kernels/ttt/ttt.cu` of ttt-tk, `ssm/kernels/linear_forward.py`). Its
    # Python path (`ssm/ops/utils.py`) has 1e-8, but nothing there uses that path.
    "video": {
        "causal": False,
        "qkvo_bias": True,
        "normalize_qk": True,
        "normalize_target": True,
        "rope": "backbone",
        "learnable_token_idx": False,
        "ln_eps": 1e-6,
        "input_norm": "none",
    },
}
"""The settings of each preset. A key written beside `preset` wins over it."""

LITERATURE_BASE_LR = {"linear": 1.0, "mlp": 0.1}
"""`base_lr` by inner model, as TTT-LM and TTT-Video trained with."""


class TTTConfig(Section):
    """The `ttt` section: the layer, its inner model and where it goes.

    `TTTConfig()` is TTT-Linear as the `lm` preset has it. Fields left out take the preset's value; the
    defaults below are those of `lm`.
    """

    preset: Literal["lm", "video"] = "lm"
    """Whose settings the fields below start from: TTT-LM's or TTT-Video's."""
    layers: Layers = "all"
    """Which backbone layers get TTT: all, middle (the middle half), none, or their numbers from 0."""
    layer_type: Literal["linear", "mlp"] = "linear"
    """The inner model that learns while it reads: one matrix per head, or an MLP."""
    mlp_layers: Annotated[int, Field(ge=2, le=16)] = 2
    """Matrices of the inner MLP. Only with `layer_type: mlp`."""
    mlp_expansion_factor: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Hidden width of the inner MLP as a multiple of the head width."""
    mlp_hidden_dims: HiddenDims | None = None
    """Hidden widths of the inner MLP one by one (`mlp_layers` - 1 of them), instead of the factor."""
    num_heads: Annotated[int, Field(ge=1, le=MOST_HEADS)] | None = None
    """Heads of the layer; null takes the backbone's."""
    mini_batch_size: Annotated[WholeNumber, Field(ge=1, le=1 << 20)] = 16
    """Tokens per step of inner learning: their gradients are all taken at the weights that opened it."""
    base_lr: Annotated[float, Field(gt=0, le=MOST_RATE)] = 1.0
    """Inner learning rate before the learned gate; the literature has 1.0 for linear, 0.1 for mlp."""
    causal: bool = True
    """Whether a token learns only from itself and earlier tokens of its mini-batch (causal backbones need that)."""
    qkvo_bias: bool = False
    """Biases on the q, k, v and o projections."""
    normalize_qk: bool = False
    """L2-normalise q and k over the head width."""
    normalize_target: bool = False
    """Layer-normalise the inner target v - k."""
    rope: Literal["none", "mini_batch", "backbone"] = "mini_batch"
    """Rotary embedding of q and k: none, by position in the mini-batch, or positions given by the backbone."""
    rope_theta: Annotated[float, Field(gt=0, le=MOST_RATE)] = 10000.0
    """Base of the rotary frequencies."""
    learnable_token_idx: bool = True
    """Learn the offset δ of the 1/i step sizes of a causal mini-batch (false: fixed at 0)."""
    ln_eps: Epsilon = 1e-6
    """ε of the inner layer norms, and of `input_norm`, inside the root."""
    target_eps: Epsilon = 1e-8
    """ε of the normalised target, beside its standard deviation. Only with `normalize_target: true`."""
    input_norm: Literal["none", "rms"] = "none"
    """Normalise the layer's input before the projections: not at all, or RMS without parameters."""
    initial_gating_alpha: Annotated[float, Field(ge=-100, le=100)] = 0.1
    """Start of the gate α in `x + tanh(α) ⊙ y`, every channel."""
    scan_checkpoint_group_size: Annotated[WholeNumber, Field(ge=0, le=MOST_STEPS)] | Literal["auto"] = 16
    """Mini-batches per checkpoint of the scan: memory and time only, never the result. 0 keeps everything; auto takes
    the number that needs the least memory, near √(N·S/(S+A))."""
    persistent_states: bool = False
    """Carry fast weights from window to window of a file while training; needs `data.shuffle: files` or false."""
    skip_nonfinite_tokens: bool = False
    """Keep tokens with NaN or infinity out of the fast weights, and count them; for inference. If false, they spoil
    their stream, so that training stops where they come from."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        """Fill in the preset's value for fields that were left out."""
        if not isinstance(data, Mapping):
            return data
        preset = data.get("preset", "lm")
        filled = dict(data)
        if isinstance(preset, str) and preset in PRESETS:
            for key, value in PRESETS[preset].items():
                filled.setdefault(key, value)
        layer_type = data.get("layer_type", "linear")
        if isinstance(layer_type, str) and layer_type in LITERATURE_BASE_LR:
            filled.setdefault("base_lr", LITERATURE_BASE_LR[layer_type])
        return filled

    @model_validator(mode="after")
    def _fields_fit(self) -> TTTConfig:
        """Refuse settings that contradict each other."""
        self._hidden_widths_fit()
        if self.target_eps != TTTConfig.model_fields["target_eps"].default and not self.normalize_target:
            raise Misfit(
                "target_eps acts on the normalised target",
                keys=("target_eps", "normalize_target"),
                fix="write normalize_target: true, or leave target_eps out",
            )
        if self.learnable_token_idx and not self.causal:
            raise Misfit(
                "learnable_token_idx acts on the causal step sizes 1/i",
                keys=("learnable_token_idx", "causal"),
                fix="write causal: true or learnable_token_idx: false",
            )
        if self.rope == "mini_batch" and not self.causal:
            raise Misfit(
                "rope: mini_batch counts tokens of a causal stream; a non-causal layer takes rope: backbone or none",
                keys=("rope", "causal"),
            )
        return self

    def _hidden_widths_fit(self) -> None:
        """Refuse hidden widths for an inner model without hidden layers, and widths that are given twice."""
        defaults = {
            name: TTTConfig.model_fields[name].default
            for name in ("mlp_layers", "mlp_expansion_factor", "mlp_hidden_dims")
        }
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.layer_type == "linear" and given:
            raise Misfit(
                f"{given[0]} needs layer_type: mlp; a linear inner model has no hidden layer",
                keys=(given[0], "layer_type"),
            )
        if self.mlp_hidden_dims is None:
            return
        if "mlp_expansion_factor" in given:
            raise Misfit(
                "mlp_hidden_dims and mlp_expansion_factor both give the hidden widths",
                keys=("mlp_hidden_dims", "mlp_expansion_factor"),
                fix="write one of them",
            )
        if len(self.mlp_hidden_dims) != self.mlp_layers - 1:
            raise Misfit(
                f"mlp_hidden_dims names {len(self.mlp_hidden_dims)} widths, but mlp_layers: {self.mlp_layers} "
                f"has {self.mlp_layers - 1} between its matrices",
                keys=("mlp_hidden_dims", "mlp_layers"),
            )

    if not TYPE_CHECKING:  # type checkers know the fields as arguments

        def __init__(self, **settings: Any) -> None:
            """Make the settings, and warn if they are costly (`NestedCheckpointWarning`).

            Only a call of `TTTConfig(...)` warns. Settings from a file, a plugin or an adapter go through
            `model_validate`; for these, `ttt check` reports the cost as a finding.
            """
            super().__init__(**settings)
            size = self.scan_checkpoint_group_size
            cost = None if size == "auto" else cost_of_groups_of_one(size, self.mini_batch_size)
            if cost is not None:
                warnings.warn(str(cost), NestedCheckpointWarning, stacklevel=2)

        __init__.__pydantic_base_init__ = True  # else `model_validate` would call it too


_WRITTEN_OUT = frozenset(
    {"preset", "mlp_hidden_dims", "num_heads", "normalize_target", "rope_theta", "ln_eps", "input_norm"}
)
"""Fields that only resolved settings have all of: nobody writes all of them in a config."""


def with_its_target_eps(ttt: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with `target_eps` filled in if a version of ttt without that key wrote them.

    In that version `ln_eps` was both. Adapters, records of checkpoints and the stored configs of runs hold every field;
    if one of these has no `target_eps`, it is from such a version. Configs that people write are returned unchanged.
    """
    if "target_eps" in ttt or not ttt.keys() >= _WRITTEN_OUT or ttt["normalize_target"] is not True:
        return dict(ttt)
    return {**ttt, "target_eps": ttt["ln_eps"]}


MOST_WORKERS = 1024
"""Processes that read for one process that trains."""
STAND_IN_WINDOWS = 64
"""How many windows of training data an evaluation reads if there is no held-out data; whole batches."""


class BackboneOptions(Section):
    """Base of a plugin's `backbone` section."""

    name: str
    """Which backbone, as `ttt plugins` lists them."""


class DataOptions(Section):
    """Base of a plugin's `data` section."""

    train_data: Annotated[str | None, LocalPath()] = None
    """Training data, in the backbone's format; null takes the demo data, if the preset has some."""
    eval_data: Annotated[str | None, LocalPath()] = None
    """Held-out data in the same format; null evaluates on the training data, and says so."""
    shuffle: bool | Literal["files"] = True
    """Read windows in a random order, anew each epoch; files: files in a random order, the windows of each in order."""
    num_workers: Annotated[WholeNumber, Field(ge=0, le=MOST_WORKERS)] = 0
    """Processes that read files ahead of training; 0 reads each batch when it is needed. What is read is the same."""


OptionsT = TypeVar("OptionsT", bound=BackboneOptions)
"""A plugin's `backbone` section. In a plugin's annotations its runs are `RunConfig[MyOptions, MyData]`."""
DataT = TypeVar("DataT", bound=DataOptions)
"""Its `data` section."""


class RunConfig(Section, Generic[OptionsT, DataT]):
    """A whole run. `run_config_model` makes a subclass whose `backbone` and `data` have one plugin's options."""

    backbone: OptionsT
    """The pretrained model."""
    adapter: Adapter = "ttt"
    """What is added to the backbone: TTT layers, LoRA, or both."""
    ttt: TTTConfig = Field(default_factory=lambda: TTTConfig.model_validate({}))
    """The TTT layers. With `adapter: lora` none is added, and the section only says what `lora.rank: match` counts."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """LoRA, if `adapter` names it."""
    data: DataT = Field(default_factory=dict, validate_default=True)
    """What it is trained on."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How it is trained."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """How it is measured."""
    run_dir: str | None = None
    """Where the run's files go; null makes a new folder under `runs/`."""

    @property
    def has_lora(self) -> bool:
        """Whether the run adds LoRA to the backbone."""
        return self.adapter != "ttt"

    @property
    def injected(self) -> TTTConfig:
        """The TTT layers that the run adds: the `ttt` section, without layers if `adapter: lora`."""
        return self.ttt.model_copy(update={"layers": "none"}) if self.adapter == "lora" else self.ttt


def select_layers(layers: Literal["all", "middle", "none"] | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """The numbers of the layers that a value of `ttt.layers` names, in order, in a model of `num_layers`.

    Raises:
        ValueError: one of them does not exist; the message names the range.
    """
    if layers == "all":
        return tuple(range(num_layers))
    if layers == "middle":
        return tuple(range(num_layers // 4, num_layers - num_layers // 4))
    if layers == "none":
        return ()
    outside = [layer for layer in layers if layer >= num_layers]
    if outside:
        raise ValueError(
            f"layer {outside[0]} does not exist; the backbone's {num_layers} layers are 0 to {num_layers - 1}"
        )
    return tuple(sorted(layers))


def inner_widths(head_width: int, config: TTTConfig) -> tuple[int, ...]:
    """Widths of the inner model from input to output: `(F, F)`, or `(F, 4F, F)` for the MLP of two layers."""
    if config.layer_type == "linear":
        return (head_width, head_width)
    hidden = config.mlp_hidden_dims or (round(head_width * config.mlp_expansion_factor),) * (config.mlp_layers - 1)
    return (head_width, *hidden, head_width)
