"""Imports moshi-finetune's YAML, with or without the `ttt:` section of its forks and what they measure.

Keys and defaults are from `finetune/args.py`, of moshi-finetune and of its fork with TTT, and from the code that reads
them. If a file leaves a key out and this project's default differs, the imported config states theirs.
"""

from __future__ import annotations

from typing import Any

from ttt.config.schema import MOST_STEPS
from ttt.config.source import parse_source
from ttt.plugins import Import, ImportedConfig
from ttt.plugins.imported import number
from ttt_moshi.importing_adapters import move_adapters
from ttt_moshi.importing_data import move_data
from ttt_moshi.importing_eval import move_evaluation
from ttt_moshi.importing_fragments import refuse_fragments
from ttt_moshi.importing_values import drop_the_rest, figure, is_on, move_figure, move_flag

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

ONE_CYCLE_END = 4e-6
"""The last value of `OneCycleLR` as a fraction of its peak: 1 / 25 / 10,000."""

_SAME = {
    "moshi_paths.hf_repo_id": "backbone.hf_repo",
    "moshi_paths.moshi_path": "backbone.moshi_path",
    "moshi_paths.mimi_path": "backbone.mimi_path",
    "moshi_paths.tokenizer_path": "backbone.tokenizer_path",
    "moshi_paths.config_path": "backbone.config_path",
    "param_dtype": "train.param_dtype",
}
_NUMBERS = {
    "first_codebook_weight_multiplier": "backbone.first_codebook_weight_multiplier",
    "text_padding_weight": "backbone.text_padding_weight",
    "duration_sec": "data.duration_sec",
    "max_steps": "train.max_steps",
    "num_microbatches": "train.num_microbatches",
    "optim.weight_decay": "train.weight_decay",
    "max_norm": "train.max_norm",
    "seed": "train.seed",
    "log_freq": "train.log_freq",
    "num_ckpt_keep": "train.ckpt_keep",
}
_DEFAULTS: dict[str, tuple[str, Any]] = {
    "first_codebook_weight_multiplier": ("backbone.first_codebook_weight_multiplier", 1.0),
    "duration_sec": ("data.duration_sec", 10),
    "max_steps": ("train.max_steps", 100),
    "gradient_checkpointing": ("train.gradient_checkpointing", True),
    "param_dtype": ("train.param_dtype", "bfloat16"),
}
"""moshi-finetune's defaults that differ from this project's."""
_NOT_HERE = {
    "wandb.project": "no logger for Weights & Biases ships: a run writes metrics.jsonl and pictures, with the extra "
    "`tensorboard` TensorBoard files too; a plugin can bring a logger (the hook ttt_loggers)",
    "wandb.run_name": "a run is named by its folder, run_dir",
    "wandb.offline": "nothing is uploaded: a run's numbers stay in its folder",
    "wandb.key": "nothing is uploaded, so no key is needed; take it out of the old file too",
    "overwrite_run_dir": "a folder that holds a run is never written over: go on with it by --resume, or name another",
    "world_size": "a run uses one device",
    "cuda_memory_fraction": "no key of the fork's args.py, which refuses it; `ttt check` says before a run what fits",
    "empty_cache_frequency": "no key of the fork's args.py, which refuses it; PyTorch's allocator keeps its cache here",
    "rope_continuous": "the fork set an attribute that its attention never read: positions began anew with each "
    "window there, as they do here",
    "rope_reset_on_new_file": "ttt.persistent_states always begins anew with each file",
}


def import_config(text: str, *, file: str) -> ImportedConfig | None:
    """The config of a moshi-finetune run, or None if the file is not one.

    Raises:
        UsageError: the file is a part of such a config, or a list of parts; the message says what can be done with it.
    """
    source = parse_source(text, file=file)
    if not any(mark in source.data for mark in MARKS):
        refuse_fragments(source)
        return None
    moving = Import(source, FORMAT)
    moving.add("backbone.name", "moshi", "whose config it is")
    moving.add("backbone.preset", "7b", "moshi-finetune trains Moshi itself")
    for old, new in _SAME.items():
        moving.move(old, new)
    for old, new in _NUMBERS.items():
        move_figure(moving, old, new)
    move_data(moving)
    _move_schedule(moving)
    move_evaluation(moving)
    move_adapters(moving)
    for old, (new, value) in _DEFAULTS.items():
        if not moving.has(old):
            moving.add(new, value, "moshi-finetune's default, which the file left to it")
    for old, why in _NOT_HERE.items():
        moving.drop(old, why)
    drop_the_rest(moving, "wandb", "no key of moshi-finetune's WandbArgs, which refuses it")
    return moving.done()


def _move_schedule(moving: Import) -> None:
    """`OneCycleLR`, and saving."""
    moving.move("batch_size", "train.batch_size", value=figure(moving.get("batch_size")), note="there of each GPU")
    steps = number(figure(moving.get("max_steps", 100)))
    share = number(figure(moving.get("optim.pct_start", 0.05)))
    if steps is not None and share is not None and abs(steps * share) <= MOST_STEPS:
        warmup = round(steps * share)
        told = f"{share:g} of {steps:g} steps"
        moving.move("optim.pct_start", "train.warmup_steps", value=warmup, note=f"{told}; linear here, a cosine there")
        if not moving.has("optim.pct_start"):
            moving.add("train.warmup_steps", warmup, f"moshi-finetune's default pct_start, {told}")
    else:
        moving.drop("optim.pct_start", "it, or max_steps, is not a number that steps can have")
    moving.add("train.min_lr_ratio", ONE_CYCLE_END, "where moshi-finetune's OneCycleLR ends")
    move_flag(moving, "gradient_checkpointing", "train.gradient_checkpointing")
    _move_saving(moving)


def _move_saving(moving: Import) -> None:
    if is_on(moving, "save_adapters", default=True):
        moving.drop("save_adapters", "what is trained is always saved alone, never merged into the backbone's weights")
    else:
        moving.drop("save_adapters", "false: merged there; here what is trained is saved beside the backbone's weights")
    often = number(figure(moving.get("ckpt_freq")))
    if not is_on(moving, "do_ckpt", default=True):
        moving.drop("do_ckpt", "a run always saves what it trained at its end")
        moving.move("ckpt_freq", "train.ckpt_freq", value=0, note="do_ckpt: false")
        return
    moving.drop("do_ckpt", "a run always saves; ckpt_freq says how often")
    if often is not None and often < 1:
        moving.move("ckpt_freq", "train.ckpt_freq", value=0, note=f"{often:g}: at the end only")
    else:
        move_figure(moving, "ckpt_freq", "train.ckpt_freq")
