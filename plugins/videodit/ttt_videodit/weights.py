"""A checkpoint of TTT-Video as this project's files: the transformer in diffusers' layout, and an adapter.

The names are those of TTT-Video's `ttt/models/cogvideo/dit.py` and `ttt/models/ssm/ttt_layer.py`; what belongs to
CogVideoX is the inverse of its `weight_conversion/from_hf.py`. Tensors stay on the disk until they are written: a
model needs no more memory than its largest file does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttt import inject
from ttt.adapter_file import backbone_identity, save_adapter
from ttt.config import TTTConfig
from ttt.errors import UsageError
from ttt.files import require_space, temporary_beside, write_tensors, write_text, writing
from ttt.printable import say
from ttt.words import first_few
from ttt_videodit.checkpoint import TOLD, Checkpoint, open_checkpoint
from ttt_videodit.model import VideoDiT, sites
from ttt_videodit.options import ROTARY_UNIT, VideoDiTOptions
from ttt_videodit.pretrained import write_record

if TYPE_CHECKING:
    from rich.console import Console

    from ttt.plugins import Backbone

PROGRAM = "TTT-Video"
TRANSFORMER = "transformer"
ADAPTER = "adapter"
SHARD_BYTES = 4 << 30
"""Largest file of the transformer's weights."""
PUBLISHED = {"mlp": {"mini_batch_size": 64, "base_lr": 0.1}, "linear": {"mini_batch_size": 16, "base_lr": 1.0}}
"""What no tensor says: the settings of TTT-Video's configs, by inner model."""

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch.compile, FSDP and activation checkpointing put in."""
_OUTER = frozenset({"module", "model", "dit"})
"""Parts that may stand before the transformer's own names."""
_MODULES = {
    "patch_embedding.vid_proj": "patch_embed.proj",
    "patch_embedding.text_proj": "patch_embed.text_proj",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "transformer_norm": "norm_final",
    "final_layer.norm": "norm_out.norm",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_BLOCK_MODULES = {
    "pre_seq_adaLN_modulation.1": "norm1.linear",
    "pre_seq_layernorm": "norm1.norm",
    "pre_mlp_adaLN_modulation.1": "norm2.linear",
    "pre_mlp_layernorm": "norm2.norm",
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    "seq_modeling_block.q": "attn1.to_q",
    "seq_modeling_block.k": "attn1.to_k",
    "seq_modeling_block.v": "attn1.to_v",
    "seq_modeling_block.o": "attn1.to_out.0",
    "seq_modeling_block.q_norm": "attn1.norm_q",
    "seq_modeling_block.k_norm": "attn1.norm_k",
    "seq_modeling_block.ssm.ttt.wq": "attn1.ttt.layer.q_proj",
    "seq_modeling_block.ssm.ttt.wk": "attn1.ttt.layer.k_proj",
    "seq_modeling_block.ssm.ttt.wv": "attn1.ttt.layer.v_proj",
    "seq_modeling_block.ssm.ttt.wo": "attn1.ttt.layer.o_proj",
    "seq_modeling_block.ssm.ttt.post_norm": "attn1.ttt.layer.post_norm",
}
_TTT = "seq_modeling_block.ssm.ttt"
_BLOCK_TENSORS = {
    f"{_TTT}.{name}": f"attn1.ttt.layer.{name}"
    for name in (
        *("W1", "b1", "W2", "b2", "ttt_norm_weight", "ttt_norm_bias"),
        *("learnable_ttt_lr_weight", "learnable_ttt_lr_bias"),
    )
} | {
    f"seq_modeling_block.{way}_ssm_gating_{part}.gating_alpha": f"attn1.ttt.{way}_gate_{part}.gating_alpha"
    for way in ("forward", "backward")
    for part in ("video", "text")
}
_BLOCK = re.compile(r"layers\.(\d+)\.(.+)")
_TABLES = re.compile(r"layers\.\d+\.seq_modeling_block\.(?:rotary\.freqs_(?:sin|cos)|ssm\.freqs_cis)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def import_weights(source: Path, out: Path, *, backbone: Backbone, console: Console) -> list[Path]:
    """Turn a checkpoint of TTT-Video into `OUT/transformer`, in diffusers' layout, and `OUT/adapter`.

    Args:
        source: `.safetensors`, in one file or a folder of several, or a `.pt`; no code in it is run.
        out: a folder that does not exist or is empty.
        backbone: whose files they become.
        console: where each tensor is accounted for.

    Returns:
        The two folders.

    Raises:
        UsageError: the file is not such a checkpoint, a tensor of it is missing, unknown or of another shape, or `out`
            is in use; nothing was written then.
        EnvironmentProblem: a file is missing or damaged, or the disk is full.
    """
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not empty; name a folder that does not exist yet")
    checkpoint = open_checkpoint(source)
    names, left_out = _rename(source, checkpoint.tensors)
    tensors = {names[old]: tensor for old, tensor in checkpoint.tensors.items() if old in names}
    config = _transformer_config(source, tensors)
    settings = _ttt_settings(tensors)
    old_names = {new: old for old, new in names.items()}
    injection = _fill(source, config, settings, tensors, old_names, causal=backbone.causal)
    adapters = injection.state_dict().keys()
    require_space(out, sum(tensor.nbytes for tensor in tensors.values()), what="the converted model")
    with _folder(out) as folder:
        _write_json(folder / TRANSFORMER / "config.json", {"_class_name": "CogVideoXTransformer3DModel", **config})
        _write_transformer(
            folder / TRANSFORMER, {name: tensor for name, tensor in tensors.items() if name not in adapters}
        )
        write_record(folder / TRANSFORMER)
        save_adapter(
            folder / ADAPTER,
            injection,
            backbone=backbone_identity(backbone, VideoDiTOptions(preset="5b")),
            training={"imported_from": PROGRAM, "checkpoint": source.name},
        )
    _account(console, checkpoint, names, left_out)
    _report(console, tensors, adapters, settings, out)
    return [out / TRANSFORMER, out / ADAPTER]


# --- what each tensor is ---


def _rename(source: Path, tensors: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The new name of each tensor, and the tensors that are computed here instead.

    Raises:
        UsageError: one is unknown, or two are the same.
    """
    names: dict[str, str] = {}
    tables: list[str] = []
    unknown: list[str] = []
    for old in tensors:
        plain = _plain(old)
        new = _new_name(plain)
        if new is not None:
            names[old] = new
        elif _TABLES.fullmatch(plain):
            tables.append(old)
        else:
            unknown.append(old)
    if not names:
        raise UsageError(f"{source}: no checkpoint of {PROGRAM}: it holds {first_few(unknown, TOLD) or 'no tensor'}")
    if unknown:
        raise UsageError(
            f"{source}: {first_few(unknown, TOLD)} {_are(unknown)} no part of {PROGRAM}'s model that is known here"
        )
    twice = sorted(new for new, count in Counter(names.values()).items() if count > 1)
    if twice:
        both = [old for old, new in names.items() if new == twice[0]]
        raise UsageError(f"{source}: {' and '.join(both)} are the same tensor of the model; keep one of them")
    return names, tables


def _plain(name: str) -> str:
    """A name without what wraps the transformer."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] in _OUTER:
        parts = parts[1:]
    return ".".join(parts)


def _new_name(plain: str) -> str | None:
    found = _BLOCK.fullmatch(plain)
    if found is None:
        return _of_module(plain, _MODULES)
    new = _BLOCK_TENSORS.get(found[2]) or _of_module(found[2], _BLOCK_MODULES)
    return new and f"transformer_blocks.{int(found[1])}.{new}"


def _of_module(name: str, modules: Mapping[str, str]) -> str | None:
    module, _, tensor = name.rpartition(".")
    return f"{modules[module]}.{tensor}" if module in modules and tensor in ("weight", "bias") else None


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


# --- what the tensors say of the model ---


def _transformer_config(source: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`config.json` of diffusers' class, with the sizes that the tensors have."""

    def shape(name: str, old: str, extents: int) -> Sequence[int]:
        if name not in tensors:
            raise UsageError(f"{source}: {old} is missing; without it the model's size is not known")
        if tensors[name].dim() != extents or 0 in tensors[name].shape:
            raise UsageError(f"{source}: {old} is {list(tensors[name].shape)}, no {extents}-dimensional weight")
        return tensors[name].shape

    dim, in_channels, patch, _ = shape("patch_embed.proj.weight", "dit.patch_embedding.vid_proj.weight", 4)
    _, text_dim = shape("patch_embed.text_proj.weight", "dit.patch_embedding.text_proj.weight", 2)
    time_dim, _ = shape("time_embedding.linear_1.weight", "dit.time_embed.0.weight", 2)
    rates = "attn1.ttt.layer.learnable_ttt_lr_weight"
    old = "dit.layers.0.seq_modeling_block.ssm.ttt.learnable_ttt_lr_weight"
    heads, _, _ = shape(f"transformer_blocks.0.{rates}", old, 3)
    outputs, _ = shape("proj_out.weight", "dit.final_layer.linear.weight", 2)
    if dim % heads or dim // heads % ROTARY_UNIT:
        raise UsageError(
            f"{source}: {old} has {heads} heads, which do not share the width {dim} in multiples of {ROTARY_UNIT}"
        )
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks.")}
    gone = sorted(set(range(len(blocks))) - blocks)
    if gone:
        raise UsageError(f"{source}: dit.layers.{gone[0]} is missing")
    return {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": outputs // (patch * patch),
        "time_embed_dim": time_dim,
        "text_embed_dim": text_dim,
        "num_layers": len(blocks),
        "patch_size": patch,
        # 480 × 720 pixels in latents, to whose grid TTT-Video's rotary tables belong (`ttt/models/configs.py`).
        "sample_height": 60,
        "sample_width": 90,
        # `layer_norm_eps` of the same file; THUDM's own config says 1e-5.
        "norm_eps": 1e-6,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": False,
    }


def _ttt_settings(tensors: Mapping[str, Tensor]) -> TTTConfig:
    """The `ttt` section: the inner model that the tensors are of, the rest as published."""
    layer_type = "mlp" if "transformer_blocks.0.attn1.ttt.layer.W2" in tensors else "linear"
    return TTTConfig.model_validate({"preset": "video", "layer_type": layer_type, **PUBLISHED[layer_type]})


def _fill(
    source: Path,
    config: Mapping[str, Any],
    settings: TTTConfig,
    tensors: Mapping[str, Tensor],
    old_names: Mapping[str, str],
    *,
    causal: bool,
) -> inject.Injection:
    """The adapted model, made of the checkpoint's own tensors.

    Raises:
        UsageError: a tensor is missing, of another inner model, or has another shape.
    """
    with torch.device("meta"):
        model = VideoDiT(**config)
    injection = inject.apply(model, sites(model), settings, causal=causal)
    own = model.state_dict()
    missing = [_old_name(name) for name in own if name not in tensors]
    if missing:
        raise UsageError(f"{source}: {first_few(missing, TOLD)} {_are(missing)} missing")
    others = [old_names[name] for name in tensors if name not in own]
    if others:
        raise UsageError(
            f"{source}: {first_few(others, TOLD)} {_are(others)} no part of the inner model of block 0, which is "
            f"{settings.layer_type}"
        )
    shapes = [
        f"{old_names[name]} is {list(tensor.shape)}, not {list(own[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != own[name].shape
    ]
    types = [
        f"{old_names[name]} is {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()
    ]
    if shapes or types:
        raise UsageError(f"{source}: does not fit together: {first_few([*shapes, *types], TOLD)}")
    model.load_state_dict(dict(tensors), assign=True)
    return injection


def _old_name(new: str) -> str:
    """The name in TTT-Video of a tensor that this project calls `new`."""
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", new)
    whole = {**_BLOCK_TENSORS, **_BLOCK_MODULES} if found else _MODULES
    name = found[2] if found else new
    back = {value: key for key, value in whole.items()}
    module, _, tensor = name.rpartition(".")
    old = back.get(name) or f"{back[module]}.{tensor}"
    return f"dit.layers.{found[1]}.{old}" if found else f"dit.{old}"


# --- writing ---


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when all of it is written, and is removed if not all is."""
    folder = temporary_beside(out.absolute())
    try:
        with writing(out):
            (folder / TRANSFORMER).mkdir(parents=True)
        yield folder
        with writing(out):
            os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(content, indent=2) + "\n")


def _write_transformer(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """The weights in files of at most `SHARD_BYTES` each, with the index that diffusers reads them by."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    stem = "diffusion_pytorch_model"
    files = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    for file, names in zip(files, shards, strict=True):
        write_tensors(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


# --- telling ---


def _account(console: Console, checkpoint: Checkpoint, names: Mapping[str, str], tables: Sequence[str]) -> None:
    """Say where each tensor went; names that differ only in the block's number share a line."""
    groups: dict[tuple[str, str], list[int]] = {}
    for old, new in names.items():
        numbered = re.match(r"transformer_blocks\.(\d+)\.", new)
        key = (_NUMBER.sub("N", old, count=1), _NUMBER.sub("N", new, count=1)) if numbered else (old, new)
        groups.setdefault(key, []).extend([int(numbered[1])] if numbered else [])
    for (old, new), blocks in groups.items():
        say(console, f"  {old} → {new}" + (f"    N = {min(blocks)} … {max(blocks)}" if len(blocks) > 1 else ""))
    if tables:
        say(console, f"  {first_few(tables, TOLD)}: left out, rotary tables are computed")
    if checkpoint.others:
        say(console, f"  {first_few(checkpoint.others, TOLD)}: left out, no part of the model")


def _report(
    console: Console, tensors: Mapping[str, Tensor], adapters: Iterable[str], settings: TTTConfig, out: Path
) -> None:
    ttt = [tensors[name] for name in adapters]
    rest = len(tensors) - len(ttt), sum(tensor.numel() for tensor in tensors.values()) - sum(map(Tensor.numel, ttt))
    published = ", ".join(f"{key}: {value}" for key, value in PUBLISHED[settings.layer_type].items())
    for text in (
        f"{out / TRANSFORMER}: {rest[0]} tensors, {rest[1]:,} parameters, in diffusers' layout",
        f"{out / ADAPTER}: {len(ttt)} tensors, {sum(map(Tensor.numel, ttt)):,} parameters of TTT and its gates",
        f"No tensor says how it was trained: the adapter has what {PROGRAM} published for ttt_{settings.layer_type} "
        f"({published}). If yours learned with others, write them, as --set ttt.mini_batch_size=…, to train on "
        f"from it.",
        f"{PROGRAM} trained on every video's text and never without: write backbone.text_dropout: 0, as "
        f"`ttt import-config` does, so that guidance leads away from empty texts.",
        f"A config names it with backbone.pretrained: {out} and train.init_from: {out / ADAPTER}; for sampling and "
        f"`ttt precompute`, put vae, text_encoder, tokenizer and scheduler of CogVideoX-5b beside {TRANSFORMER}.",
        f"{PROGRAM}'s configs leave latents as the VAE gives them (model.scale_factor: 1.0): unless yours did not, "
        f"write scaling_factor: 1.0 into {out / 'vae' / 'config.json'}, where CogVideoX-5b has 0.7.",
    ):
        say(console, text)
