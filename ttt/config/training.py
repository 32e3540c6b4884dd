"""The `train` section of a run's config, with its `parallel` section. See `ttt.config.schema`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ttt.config.misfit import Misfit
from ttt.config.paths import LocalPath
from ttt.config.section import Section
from ttt.config.values import MOST_FACTOR, MOST_RATE, MOST_STEPS, MOST_WINDOWS, WholeNumber, as_tuple

Schedule = Literal["cosine", "linear", "constant"]
_TRAINABLE_ALIASES = {"sft": "all", "qkvo": "ttt+attention"}
"""TTT-Video's names for what learns (its `adapter_method`), and this project's."""
Trainable = Annotated[
    Literal["ttt", "ttt+attention", "ttt+ttt_layer_attention", "all", "sft", "qkvo"],
    AfterValidator(lambda value: _TRAINABLE_ALIASES.get(value, value)),
]
"""What learns, stored under this project's name."""


def _named_once(loggers: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a logger that would get each line twice."""
    twice = next((name for name in loggers if loggers.count(name) > 1), None)
    if twice is not None:
        raise Misfit(f"{twice} is named twice, and would get every line twice", fix=f"write {twice} once")
    return loggers


MOST_PROCESSES = 1 << 16
"""Of one run."""
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]


class ParallelConfig(Section):
    """The `train.parallel` section: how the processes of a run share its work. Their product is the number of them.

    One size may be `auto`: what the others leave. With `shard: auto` that is not `replicate`, unless it is written.
    """

    replicate: Processes | Literal["auto"] = "auto"
    """Copies of the model, which read different rows and add up their gradients (DDP)."""
    shard: Processes | Literal["auto"] = 1
    """Processes that split a copy's parameters, gradients and optimiser state, and read different rows (FSDP2)."""
    tensor: Processes = 1
    """Processes that split the heads of the TTT layers, and read the same rows."""

    @model_validator(mode="before")
    @classmethod
    def _one_copy_if_it_is_split_among_all(cls, data: Any) -> Any:
        """Make `replicate` 1 if it was left out and `shard` is what is left."""
        if not isinstance(data, Mapping) or data.get("shard") != "auto":
            return data
        return {"replicate": 1, **data}

    @model_validator(mode="after")
    def _one_size_is_left_over(self) -> ParallelConfig:
        """Refuse two sizes that are both what the other leaves."""
        if self.replicate == self.shard == "auto":
            raise Misfit(
                "replicate and shard cannot both be what the other leaves",
                keys=("replicate", "shard"),
                fix="write replicate: 1 to split the parameters among all processes, or shard: 1 to copy them",
            )
        return self


class TrainConfig(Section):
    """The `train` section: how long, how fast, what learns."""

    init_from: Annotated[str | None, LocalPath()] = None
    """Folder of a run or an adapter whose weights to start from, trained backbone included; null starts anew."""
    max_steps: Annotated[WholeNumber, Field(ge=1, le=MOST_STEPS)] = 1000
    """Optimiser steps."""
    batch_size: Annotated[int, Field(ge=1, le=MOST_WINDOWS)] = 1
    """Windows per forward pass, over all processes; with `persistent_states`, streams read side by side."""
    num_microbatches: Annotated[int, Field(ge=1, le=MOST_WINDOWS)] = 1
    """Forward passes whose gradients are accumulated into one optimiser step; its loss is one mean over all of them."""
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """AdamW; AdamW whose moments have 8 bits (bitsandbytes, on a GPU); or Muon for the matrices of layers, and AdamW
    for the rest. `lr` and what belongs to it mean the same for all."""
    lr: Annotated[float, Field(gt=0, le=MOST_RATE)] = 1e-4
    """Peak learning rate; the multipliers below apply to it."""
    weight_lr_multiplier: Annotated[float, Field(ge=0, le=MOST_FACTOR)] = 1.0
    """Multiplier of `lr` for the weights of TTT layers."""
    alpha_lr_multiplier: Annotated[float, Field(ge=0, le=MOST_FACTOR)] = 1.0
    """Multiplier of `lr` for the gates α."""
    backbone_lr_multiplier: Annotated[float, Field(ge=0, le=MOST_FACTOR)] = 1.0
    """Multiplier of `lr` for the unfrozen parts of the backbone."""
    lora_lr_multiplier: Annotated[float, Field(ge=0, le=MOST_FACTOR)] = 1.0
    """Multiplier of `lr` for LoRA."""
    trainable: Trainable = "ttt"
    """What learns: the adapters (TTT layers and gates, LoRA), also the backbone's attention (qkvo) or only that of the
    layers that have TTT, or everything (sft)."""
    weight_decay: Annotated[float, Field(ge=0, le=MOST_FACTOR)] = 0.1
    """Decay of matrices; gates, norms, biases and learned rates have none."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        BeforeValidator(as_tuple, json_schema_input_type=list[float]),
    ] = (0.9, 0.95)
    """AdamW's moment decays; the first is Muon's momentum."""
    lr_schedule: Schedule = "cosine"
    """What the learning rate of TTT layers and gates does after the warm-up: it falls to `min_lr_ratio`, or stays."""
    backbone_lr_schedule: Schedule | None = None
    """The same for the unfrozen parts of the backbone; null is `lr_schedule`."""
    warmup_steps: Annotated[WholeNumber, Field(ge=0, le=MOST_STEPS)] = 0
    """Steps of linear warm-up."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where a schedule that falls ends, as a fraction of the peak."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of what learns, of which so much stays at each step (0.999, say); it is
    evaluated and saved beside the weights. null keeps none."""
    max_norm: Annotated[float, Field(gt=0, le=MOST_RATE)] = 1.0
    """Gradient norm above which the gradient is scaled down."""
    gradient_checkpointing: bool = False
    """Activation checkpointing of the backbone's layers: every inner step runs forward once more."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the backbone's parameters; TTT weights and fast weights stay float32."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Mixed precision: products of the backbone's float32 matrices in bfloat16. TTT keeps to its tokens' type."""
    ttt_precision: Literal["ieee", "tf32", "bf16"] = "ieee"
    """In what the operands of the inner model's products are multiplied: float32 as they are, or rounded to TF32
    (NVIDIA GPUs) or bfloat16. Fast weights and sums stay float32; tokens streamed one by one are not rounded."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How several processes share the run, if it is started as several."""
    compile: bool = False
    """Run the TTT layers through `torch.compile`, which takes minutes at the start of a run and needs a compiler."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """On a GPU, launch the inner learning of TTT layers as CUDA graphs where its shapes repeat; the numbers stay the
    same. off launches each kernel by itself."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA if there is one."""
    cpu_threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Threads of PyTorch's operations on a CPU; null is PyTorch's choice. Small models are fastest with 1."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of initialisation and data order."""
    log_freq: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 1
    """Steps between lines of `metrics.jsonl`."""
    evidence_freq: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 10
    """Steps between measurements of each layer's inner loss and fast-weight movement."""
    loggers: (
        Annotated[
            tuple[Literal["tensorboard", "wandb", "trackio"], ...],
            AfterValidator(_named_once),
            BeforeValidator(as_tuple, json_schema_input_type=list[Literal["tensorboard", "wandb", "trackio"]]),
        ]
        | None
    ) = None
    """Which of tensorboard, wandb and trackio get the lines of `metrics.jsonl` too; null is TensorBoard, if it is
    installed."""
    ckpt_freq: Annotated[WholeNumber, Field(ge=0, le=MOST_STEPS)] = 0
    """Steps between checkpoints; 0 saves at the end only."""
    ckpt_keep: Annotated[int, Field(ge=1, le=MOST_WINDOWS)] | None = 3
    """How many checkpoints stay; null keeps all."""
    ckpt_async: bool = False
    """Write checkpoints while the next steps run: a step that saves waits only until they are copied to the CPU's
    memory. They appear some steps later, whole as ever."""

    @model_validator(mode="after")
    def _schedule_has_parameters(self) -> TrainConfig:
        """Refuse a schedule for a frozen backbone."""
        if self.backbone_lr_schedule is not None and self.trainable == "ttt":
            raise Misfit(
                "backbone_lr_schedule acts on an unfrozen backbone, and trainable: ttt freezes it",
                keys=("backbone_lr_schedule", "trainable"),
                fix="write backbone_lr_schedule: null, or trainable: ttt+attention or all",
            )
        return self
