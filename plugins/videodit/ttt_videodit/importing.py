"""Imports TTT-Video's TOML, for training and for sampling.

Keys and defaults are from TTT-Video's `ttt/infra/config_manager.py` and `ttt/models/configs.py`. If a file leaves a key
out and this project's default differs, the imported config states TTT-Video's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ttt.config.schema import MOST_RATE
from ttt.config.source import Source
from ttt.plugins import Import, ImportedConfig
from ttt.plugins.imported import number
from ttt_videodit.toml_files import FORMAT, places_in, read_toml, refuse_script

MARKS = ("ssm_layer", "ttt_base_lr", "video_length")
"""Keys of `[model]` that no other program's config has."""
PUBLISHED_TEXT_LENGTH = {3: 498, 9: 502, 18: 471, 30: 497, 63: 458}
"""Text tokens of a segment by seconds of video, from its `configs/eval`; they make sequences multiples of 64 tokens."""
WEIGHT_DECAY = 1e-4
"""`ParameterGroupManager.WEIGHT_DECAY_VALUE` of its `ttt/infra/optimizers.py`."""

KERNEL_MINI_BATCH = 64
"""Tokens of a mini-batch in the kernel of `ttt_mlp`, a constant of ttt-tk's `kernels/ttt/ttt.cu`; that of `ttt_linear`
takes what the config says."""

NO_DROPOUT = (
    "its train.py drops no text: the branch that would is never reached; guidance leads away from empty texts, as there"
)
"""Why imported configs have no `text_dropout`: tensors are moved to the GPU in the branch before."""

_SAME = {
    "model.ttt_base_lr": "ttt.base_lr",
    "job.seed": "train.seed",
    "training.steps": "train.max_steps",
    "training.warmup_steps": "train.warmup_steps",
    "optimizer.gradient_clipping_norm": "train.max_norm",
    "checkpoint.interval": "train.ckpt_freq",
    "eval.txt_maxlen": "data.text_length",
    "eval.image_width": "data.width",
    "eval.image_height": "data.height",
    "remat.transformer_checkpoint_layer_group_size": "backbone.transformer_checkpoint_layer_group_size",
    "remat.attention": "backbone.remat_attention",
    "remat.forward_ssm": "backbone.remat_forward_ttt",
    "remat.reverse_ssm": "backbone.remat_reverse_ttt",
    "remat.mlp": "backbone.remat_mlp",
    "remat.seq_modeling_block": "backbone.remat_seq_modeling_block",
}
_DEFAULTS: dict[str, tuple[str, Any]] = {
    "model.mini_batch_size": ("ttt.mini_batch_size", 64),
    "model.ttt_base_lr": ("ttt.base_lr", 0.1),
}
_TRAINING_DEFAULTS: dict[str, tuple[str, Any]] = {
    "job.seed": ("train.seed", 42),
    "training.steps": ("train.max_steps", 5000),
    "training.warmup_steps": ("train.warmup_steps", 50),
    "optimizer.gradient_clipping_norm": ("train.max_norm", 0.1),
}
"""TTT-Video's defaults that differ from this project's."""
_NOT_HERE = {
    "job.config_file": "the file itself",
    "model.name": "TTT-Video has cogvideo alone",
    "model.norm_eps": "nothing read it there; the model's own transformer/config.json has it here",
    "training.gc_freq": "Python collects its garbage itself",
    "eval.input_file": "give it to `ttt sample --prompts`",
    "eval.output_dir": "give the video's name to `ttt sample --out`",
    "eval.sampling_fps": "CogVideoX's videos have 16 frames a second",
    "eval.sampling_num_frames": "data.duration_sec says it",
    "eval.latent_channels": "the model's own transformer/config.json says it",
    "eval.num_denoising_steps": "give it to `ttt sample --steps`",
    "eval.scale_factor": "nothing read it there; the VAE's own config.json has it here",
    "eval.vae_scale_factor": "the VAE's own config.json has it",
    "eval.vae_checkpoint_path": "a folder in diffusers' layout holds the VAE too; backbone.pretrained names it",
    "eval.t5_model_dir": "a folder in diffusers' layout holds T5 too; backbone.pretrained names it",
    "guider.scale": "give it to `ttt sample --guidance-scale`",
    "guider.exp": "guidance has the exponent 5, as published",
    "guider.num_steps": "nothing read it there; give the steps to `ttt sample --steps`",
    "denoiser": "diffusers' scheduler has it: the scheduler folder beside the transformer",
    "discretization": "diffusers' scheduler has it: the scheduler folder beside the transformer",
    "optimizer.name": "the optimiser is AdamW, here too",
    "checkpoint.resume": "`ttt train --resume` continues a run",
    "checkpoint.resume_step": "`ttt train --resume` continues from the last complete checkpoint",
    "checkpoint.timeout_minutes": "a signal ends a run at its next step and saves it",
    "parallelism.tp_sharding": "a run uses one device",
    "parallelism.dp_sharding": "a run uses one device",
    "parallelism.dp_replicate": "a run uses one device",
    "remat.shard_transformer_inputs": "a run uses one device",
    "comm": "a run uses one device",
    "wandb": "a run writes metrics.jsonl, pictures and, with the extra `tensorboard`, TensorBoard files",
}


def import_config(text: str, *, file: str) -> ImportedConfig | None:
    """The config of a TTT-Video job, or None if the file is not one.

    Raises:
        UsageError: the file is named .toml and is not TOML, or is a script that starts TTT-Video.
    """
    refuse_script(text, file)
    data = read_toml(text, file)
    model = data.get("model")
    if not isinstance(model, Mapping) or not (any(mark in model for mark in MARKS) or model.get("name") == "cogvideo"):
        return None
    moving = Import(Source(file, data, places_in(text, file)), FORMAT)
    samples = any(section in data for section in ("eval", "guider", "denoiser", "discretization"))
    trains = not samples or any(section in data for section in ("training", "optimizer", "checkpoint"))
    moving.add("backbone.name", "videodit", "whose config it is")
    moving.add("backbone.sampling_schedule", "ttt-video", "its sampler's steps, which are not diffusers'")
    _move_model(moving)
    for old, new in _SAME.items():
        moving.move(old, new)
    _move_remat(moving, trains)
    if trains:
        _move_schedule(moving)
        _move_batch(moving)
        _move_what_learns(moving)
    _move_data(moving, trains)
    _move_dtype(moving, trains)
    for old, (new, value) in {**_DEFAULTS, **(_TRAINING_DEFAULTS if trains else {})}.items():
        if not moving.has(old):
            moving.add(new, value, "TTT-Video's default, which the file left to it")
    for old, why in _NOT_HERE.items():
        moving.drop(old, why)
    return moving.done()


def _number(value: Any) -> float | None:
    """A positive number that a rate can be, or None."""
    found: float | None = number(value)
    return found if found is not None and 1e-30 <= found <= MOST_RATE else None


def _ratio(value: float, of: float) -> float:
    return float(f"{value / of:.12g}")


def _move_model(moving: Import) -> None:
    size = moving.get("model.size", "5B")
    if size == "debug":
        moving.move("model.size", "backbone.preset", value="demo", note="a small model with random weights")
        for key, value in (("dim", 512), ("num_heads", 8), ("num_layers", 6)):
            moving.add(f"backbone.{key}", value, "of TTT-Video's size `debug`")
    elif moving.has("model.size"):
        moving.move("model.size", "backbone.preset", value="5b" if size == "5B" else size)
    else:
        moving.add("backbone.preset", "5b", "TTT-Video's default, which the file left to it")

    layer = moving.get("model.ssm_layer", "ttt_mlp")
    _move_mini_batch(moving, layer)
    if layer == "none":
        moving.move("model.ssm_layer", "ttt.layers", value="none")
    else:
        moving.add("ttt.layers", "all", "every block has TTT there")
        known = {"ttt_mlp": "mlp", "ttt_linear": "linear"}
        if moving.has("model.ssm_layer"):
            moving.move("model.ssm_layer", "ttt.layer_type", value=known.get(str(layer), layer))
        else:
            moving.add("ttt.layer_type", "mlp", "TTT-Video's default, which the file left to it")

    scale = moving.get("model.scale_factor", 1.0)
    moving.drop(
        "model.scale_factor",
        "latents are multiplied by the VAE's own scaling_factor when they are precomputed; "
        f"there by {scale}, so write that as scaling_factor into vae/config.json to have the same",
    )


def _move_mini_batch(moving: Import, layer: Any) -> None:
    """The mini-batch size that the layer computes with: for `ttt_mlp` the kernel's, not the file's.

    The published `configs/eval/ttt-mlp` say 16, but the kernel is the only path, forward and backward.
    """
    written = number(moving.get("model.mini_batch_size"), whole=True)
    if layer != "ttt_mlp" or written is None or written < 1 or written == KERNEL_MINI_BATCH:
        moving.move("model.mini_batch_size", "ttt.mini_batch_size")
        return
    moving.move(
        "model.mini_batch_size",
        "ttt.mini_batch_size",
        value=KERNEL_MINI_BATCH,
        note=(
            f"{written} in the file, but ttt_mlp's kernel has {KERNEL_MINI_BATCH} built in, and its weights learned "
            f"with that; if yours did not, write --set ttt.mini_batch_size={written} after `ttt train` or `ttt sample`"
        ),
    )


def _move_remat(moving: Import, trains: bool) -> None:
    if trains:
        moving.move("remat.scan_checkpoint_group_size", "ttt.scan_checkpoint_group_size")
        moving.add("train.gradient_checkpointing", True, "groups of blocks are always rematerialised there")
    else:
        moving.drop(
            "remat.scan_checkpoint_group_size",
            "sampling keeps no activations, whatever the group; it acts on training alone",
        )


def _move_schedule(moving: Import) -> None:
    """Learning rates by role: there each role has its own peak and all share one end, here all share peak and ratio."""
    peak, ttt_peak, end = (moving.get(f"optimizer.{key}") for key in ("lr", "lr_ssm", "lr_end"))
    peak, ttt_peak = 1e-4 if peak is None else peak, 1e-4 if ttt_peak is None else ttt_peak
    if _number(peak) is None or _number(ttt_peak) is None or not (end is None or end == 0 or _number(end) is not None):
        for key in ("lr", "lr_ssm", "lr_end", "lr_schedule", "lr_ssm_schedule"):
            moving.drop(f"optimizer.{key}", "it, or a learning rate beside it, is not a positive number")
        return
    _say(moving, "optimizer.lr_ssm", "train.lr", ttt_peak, "of TTT and its gates")
    _say(moving, "optimizer.lr", "train.backbone_lr_multiplier", _ratio(peak, ttt_peak), f"{peak:g} of the rest")
    ttt_end, rest_end = _ratio(end or 0.0, ttt_peak), _ratio(end or 0.0, peak)
    ttt_curve, ttt_note = _curve(moving, "lr_ssm_schedule", ttt_end)
    rest_curve, rest_note = _curve(moving, "lr_schedule", rest_end)
    _say(moving, "optimizer.lr_ssm_schedule", "train.lr_schedule", ttt_curve, ttt_note)
    ratio = rest_end if ttt_curve == "constant" and rest_curve != "constant" else ttt_end
    if rest_curve not in ("constant", None) and rest_end != ratio:
        rest_note = f"down to {ratio:g} of its peak, as TTT; there down to {rest_end:g}"
    _say(moving, "optimizer.lr_schedule", "train.backbone_lr_schedule", rest_curve, rest_note)
    _say(moving, "optimizer.lr_end", "train.min_lr_ratio", ratio, f"ends at {end or 0.0:g}")
    moving.add("train.weight_decay", WEIGHT_DECAY, "as its optimiser has it; gates decay there and not here")


def _curve(moving: Import, key: str, end: float) -> tuple[Any, str]:
    """A schedule in this project's terms: it is constant if its end equals its peak."""
    curve = moving.get(f"optimizer.{key}", "linear")
    return ("constant", f"{curve}, but it ends at its peak") if end == 1 else (curve, "")


def _say(moving: Import, old: str, new: str, value: Any, note: str = "") -> None:
    """Move a key; if the file leaves it out, state TTT-Video's default."""
    if moving.has(old):
        moving.move(old, new, value=value, note=note)
    else:
        told = "TTT-Video's default, which the file left to it"
        moving.add(new, value, f"{told}; {note}" if note else told)


def _move_batch(moving: Import) -> None:
    """The batch: there each GPU, or group that shares a model, reads its share of it in `grad_accum_steps` parts."""
    batch = number(moving.get("training.global_batch_size", 8), whole=True)
    parts = number(moving.get("training.grad_accum_steps", 1), whole=True)
    gpus = [
        number(moving.get(f"parallelism.{key}", default), whole=True)
        for key, default in (("dp_sharding", 8), ("dp_replicate", 1))
    ]
    if not all(count is not None and count > 0 for count in (batch, parts, *gpus)):
        moving.drop("training.global_batch_size", "it, or a number of GPUs or of parts, is not a positive whole number")
        moving.drop("training.grad_accum_steps", "it, or a number beside it, is not a positive whole number")
        return
    passes = min(batch, gpus[0] * gpus[1] * parts)
    size = batch // passes if batch % passes == 0 else 1
    told = f"{batch} videos a step, {size} at a time"
    _say(moving, "training.global_batch_size", "train.num_microbatches", batch // size, told)
    if moving.has("training.grad_accum_steps"):
        moving.move("training.grad_accum_steps", "train.batch_size", value=size, note="windows in one forward pass")
    else:
        moving.add("train.batch_size", size, "windows in one forward pass")


def _move_what_learns(moving: Import) -> None:
    method = moving.get("training.adapter_method")
    known = {"sft": ("all", "everything learns"), "qkvo": ("ttt+attention", "TTT and the attention's projections")}
    if isinstance(method, str):
        value, note = known.get(method, (method, ""))
        moving.move("training.adapter_method", "train.trainable", value=value, note=f"{method}: {note}" if note else "")
    else:
        moving.drop("training.adapter_method", "it is not text")
        moving.add(
            "train.trainable", "ttt+attention", "without adapter_method TTT-Video does not train; this is its qkvo"
        )


def _move_data(moving: Import, trains: bool) -> None:
    moving.add("backbone.text_dropout", 0, NO_DROPOUT)
    length = moving.get("model.video_length", "3sec")
    seconds = re.fullmatch(r"(\d{1,6})sec", length, re.ASCII) if isinstance(length, str) else None
    _say(moving, "model.video_length", "data.duration_sec", int(seconds[1]) if seconds else length)
    if trains:
        _move_run_dir(moving)
        other = (
            "TTT-Video's lists name .pt files; make an index of the videos and captions with `ttt precompute`, from "
            "data.videos, and name it here"
        )
        moving.move("training.jsonl_paths", "data.train_data", value=None, note=other)
        moving.drop("training.dataset_path", "the files of an index lie beside it")
        published = PUBLISHED_TEXT_LENGTH.get(int(seconds[1])) if seconds else None
        if published and moving.get("model.size", "5B") == "5B" and not moving.has("eval.txt_maxlen"):
            moving.add("data.text_length", published, "as its configs/eval have it for this length")
    else:
        moving.drop("job.exp_name", "give the video's name to `ttt sample --out`")
        moving.drop("job.dump_folder", "give the video's name to `ttt sample --out`")
    moving.drop(
        "checkpoint.init_state_dir",
        "a folder of TTT-Video's; `ttt import-weights` makes of it what backbone.pretrained and train.init_from name",
    )


def _move_run_dir(moving: Import) -> None:
    """The run's folder: there each experiment has a folder in a folder for all of them."""
    folder, name = (moving.get(f"job.{key}") for key in ("dump_folder", "exp_name"))
    if isinstance(name, str):
        parent = folder.rstrip("/") if isinstance(folder, str) else "runs"
        moving.move("job.exp_name", "run_dir", value=f"{parent}/{name}")
        moving.drop("job.dump_folder", "run_dir begins with it")
    else:
        moving.drop("job.exp_name", "it is not text")
        moving.drop("job.dump_folder", "run_dir names one folder, and the file has no exp_name")


def _move_dtype(moving: Import, trains: bool) -> None:
    """The parameters' type: training takes FSDP's key, sampling its own."""
    of_training, of_sampling = "parallelism.fsdp_unsharded_dtype", "eval.dtype"
    used, other = (of_training, of_sampling) if trains or not moving.has(of_sampling) else (of_sampling, of_training)
    if moving.get(used) == "float16":
        moving.move(used, "train.param_dtype", value="bfloat16", note="float16 there; its range is too small to train")
    else:
        _say(moving, used, "train.param_dtype", moving.get(used, "bfloat16"), "of the backbone; TTT is float32")
    moving.drop(other, f"{used} says it")
