"""Imports moshi-finetune's YAML, with or without the `ttt:` section of its forks and what they measure.

Keys and defaults are from moshi-finetune's `finetune/args.py`. If a file leaves a key out and this project's default
differs, the imported config states moshi-finetune's.
"""

from __future__ import annotations

from typing import Any

from ttt.config.schema import MOST_STEPS, TTTConfig
from ttt.config.source import parse_source
from ttt.plugins import Import, ImportedConfig
from ttt.plugins.imported import number
from ttt_moshi.importing_eval import flag, move_evaluation

FORMAT = "moshi-finetune"
MARKS = (
    "moshi_paths",
    "first_codebook_weight_multiplier",
    "text_padding_weight",
    "full_finetuning",
    "lora",
    "paper_metrics_eval",
)
"""Keys that no other program's config has."""

LAYERS_WITHOUT_A_SECTION = (29, 30, 31)
"""The layers with TTT in this project's own 7B config."""
ONE_CYCLE_END = 4e-6
"""The last value of `OneCycleLR` as a fraction of its peak: 1 / 25 / 10,000."""

_SAME = {
    "moshi_paths.hf_repo_id": "backbone.hf_repo",
    "moshi_paths.moshi_path": "backbone.moshi_path",
    "moshi_paths.mimi_path": "backbone.mimi_path",
    "moshi_paths.tokenizer_path": "backbone.tokenizer_path",
    "moshi_paths.config_path": "backbone.config_path",
    "first_codebook_weight_multiplier": "backbone.first_codebook_weight_multiplier",
    "text_padding_weight": "backbone.text_padding_weight",
    "duration_sec": "data.duration_sec",
    "max_steps": "train.max_steps",
    "num_microbatches": "train.num_microbatches",
    "optim.lr": "train.lr",
    "optim.weight_decay": "train.weight_decay",
    "max_norm": "train.max_norm",
    "param_dtype": "train.param_dtype",
    "seed": "train.seed",
    "log_freq": "train.log_freq",
    "num_ckpt_keep": "train.ckpt_keep",
}
_SAME_TTT = {
    "base_lr": "ttt.base_lr",
    "mini_batch_size": "ttt.mini_batch_size",
    "initial_gating_alpha": "ttt.initial_gating_alpha",
    "rope_theta": "ttt.rope_theta",
    "weight_lr_multiplier": "train.weight_lr_multiplier",
    "alpha_lr_multiplier": "train.alpha_lr_multiplier",
}
_DEFAULTS: dict[str, tuple[str, Any]] = {
    "first_codebook_weight_multiplier": ("backbone.first_codebook_weight_multiplier", 1.0),
    "duration_sec": ("data.duration_sec", 10),
    "data.shuffle": ("data.shuffle", False),
    "max_steps": ("train.max_steps", 100),
    "gradient_checkpointing": ("train.gradient_checkpointing", True),
    "param_dtype": ("train.param_dtype", "bfloat16"),
}
"""moshi-finetune's defaults that differ from this project's."""
_NOT_HERE = {
    "lora": "TTT layers learn here, in place of LoRA",
    "wandb": "a run writes metrics.jsonl, pictures and, with the extra `tensorboard`, TensorBoard files",
    "save_adapters": "adapters are always saved alone, never merged",
    "overwrite_run_dir": "a folder that holds a run is never written over",
    "world_size": "a run uses one device",
}


def import_config(text: str, *, file: str) -> ImportedConfig | None:
    """The config of a moshi-finetune run, or None if the file is not one."""
    source = parse_source(text, file=file)
    if not any(mark in source.data for mark in MARKS):
        return None
    moving = Import(source, FORMAT)
    moving.add("backbone.name", "moshi", "whose config it is")
    moving.add("backbone.preset", "7b", "moshi-finetune trains Moshi itself")
    for old, new in _SAME.items():
        moving.move(old, new)
    _move_data(moving)
    _move_schedule(moving)
    move_evaluation(moving)
    _move_what_learns(moving)
    _move_ttt(moving)
    for old, (new, value) in _DEFAULTS.items():
        if not moving.has(old):
            moving.add(new, value, "moshi-finetune's default, which the file left to it")
    for old, why in _NOT_HERE.items():
        moving.drop(old, why)
    return moving.done()


def _move_flag(moving: Import, old: str, new: str) -> None:
    moving.move(old, new, value=flag(moving.get(old)))


def _move_data(moving: Import) -> None:
    for old, new in (("data.train_data", "data.train_data"), ("data.eval_data", "data.eval_data"), ("run_dir",) * 2):
        empty = moving.get(old) == ""
        moving.move(old, new, value=None if empty else moving.get(old), note="an empty text is null" if empty else "")
    _move_flag(moving, "data.shuffle", "data.shuffle")
    moving.move("batch_size", "train.batch_size", note="of one device; there it was of each GPU")


def _move_schedule(moving: Import) -> None:
    """`OneCycleLR`, and saving."""
    steps, share = number(moving.get("max_steps", 100)), number(moving.get("optim.pct_start", 0.05))
    if steps is not None and share is not None and abs(steps * share) <= MOST_STEPS:
        warmup = round(steps * share)
        told = f"{share:g} of {steps:g} steps"
        moving.move("optim.pct_start", "train.warmup_steps", value=warmup, note=f"{told}; linear here, a cosine there")
        if not moving.has("optim.pct_start"):
            moving.add("train.warmup_steps", warmup, f"moshi-finetune's default pct_start, {told}")
    else:
        moving.drop("optim.pct_start", "it, or max_steps, is not a number that steps can have")
    moving.add("train.min_lr_ratio", ONE_CYCLE_END, "where moshi-finetune's OneCycleLR ends")
    _move_flag(moving, "gradient_checkpointing", "train.gradient_checkpointing")

    if flag(moving.get("do_ckpt", True)) is False:
        moving.drop("do_ckpt", "a run always saves what it trained at its end")
        moving.move("ckpt_freq", "train.ckpt_freq", value=0, note="do_ckpt: false")
    else:
        moving.drop("do_ckpt", "a run always saves; ckpt_freq says how often")
        moving.move("ckpt_freq", "train.ckpt_freq")


def _move_what_learns(moving: Import) -> None:
    if flag(moving.get("full_finetuning", False)) is True:
        moving.move("full_finetuning", "train.trainable", value="all", note="true: everything learns")
    else:
        moving.move("full_finetuning", "train.trainable", value="ttt", note="false: the backbone is frozen")


def _move_ttt(moving: Import) -> None:
    """The `ttt:` section of forks; its MLP is the inner model."""
    section = moving.source.data.get("ttt")
    if not isinstance(section, dict) or not section:
        why = "the file has no TTT; these are the layers of this project's own 7B config"
        moving.add("ttt.layers", list(LAYERS_WITHOUT_A_SECTION), why)
        return
    if flag(section.get("enable", True)) is False:
        moving.move("ttt.enable", "ttt.layers", value="none", note="false: no layer has TTT")
        moving.drop("ttt.layers", "ttt.enable: false")
    else:
        moving.drop("ttt.enable", "true: what ttt.layers names has TTT")
        moving.move("ttt.layers", "ttt.layers")
    for old, new in _SAME_TTT.items():
        moving.move(f"ttt.{old}", new)
    _move_flag(moving, "ttt.persistent_states", "ttt.persistent_states")
    rope = flag(section.get("use_rope", True))
    moving.move("ttt.use_rope", "ttt.rope", value="none" if rope is False else "mini_batch")
    _move_inner_model(moving, section)
    handled = {"enable", "layers", "persistent_states", "use_rope", *_SAME_TTT}
    for key in section:
        if key in TTTConfig.model_fields and key not in handled:
            moving.move(f"ttt.{key}", f"ttt.{key}")


def _move_inner_model(moving: Import, section: dict[str, Any]) -> None:
    mlp = [key for key in section if key.startswith("ttt_mlp_")]
    if section.get("ttt_mlp_layers") == 1:
        moving.move("ttt.ttt_mlp_layers", "ttt.layer_type", value="linear", note="one matrix is the linear inner model")
        for key in mlp:
            if key != "ttt_mlp_layers":
                moving.drop(f"ttt.{key}", "a linear inner model has no hidden layer")
        return
    if mlp and "layer_type" not in section:
        moving.add("ttt.layer_type", "mlp", "the inner model that ttt_mlp_… describe")
    moving.move("ttt.ttt_mlp_layers", "ttt.mlp_layers")
    if section.get("ttt_mlp_hidden_dims"):
        moving.move("ttt.ttt_mlp_hidden_dims", "ttt.mlp_hidden_dims")
        moving.drop("ttt.ttt_mlp_expansion_factor", "ttt_mlp_hidden_dims gives the widths")
    else:
        moving.drop("ttt.ttt_mlp_hidden_dims", "it names no width; the factor gives them")
        moving.move("ttt.ttt_mlp_expansion_factor", "ttt.mlp_expansion_factor")
