"""Checkpoints of kyutai's format, made on the spot: a tiny language model, a narrow Mimi, the demo's tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, MimiModel, loaders
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import save_file
from torch import Tensor

from ttt_moshi import demo


def config_json(*, codebooks: int = 8, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model with so many codebooks for each speaker."""
    delays = [0, *2 * [0, *[1] * (codebooks - 1)]]
    sizes = {"dim": 32, "num_heads": 2, "num_layers": 2, "text_card": 300, "card": 64, "context": 64}
    depth = {
        "depformer_dim": 16,
        "depformer_dim_feedforward": 32,
        "depformer_num_heads": 2,
        "depformer_num_layers": 1,
        "depformer_context": codebooks,
    }
    streams = {"n_q": 2 * codebooks, "dep_q": codebooks, "delays": delays}
    return {**loaders._lm_kwargs, "hidden_scale": 2.0, **sizes, **depth, **streams, **changes}


def language_model(config: dict[str, Any], *, seed: int = 0) -> LMModel:
    """What kyutai's package makes of it, with random weights."""
    torch.manual_seed(seed)
    known = {key: value for key, value in config.items() if not key.endswith("_name")}
    return loaders.get_moshi_lm(None, {**known, "lora": False}, device="cpu", dtype=torch.float32)


def mimi_config() -> dict[str, Any]:
    """Of a Mimi of kyutai's structure, narrow enough to be quick."""
    config = copy.deepcopy(loaders._mimi_config)
    config["seanet"].update(dimension=32, n_filters=4)
    config["quantizer"].update(dimension=16, bins=64, input_dimension=32, output_dimension=32)
    config["transformer"].update(
        d_model=32, num_heads=2, num_layers=1, dim_feedforward=64, input_dimension=32, output_dimensions=[32]
    )
    return config


def mimi(config: dict[str, Any], **changes: Any) -> MimiModel:
    """One with random weights and codebooks."""
    torch.manual_seed(0)
    model = loaders.get_mimi(None, config, **changes)
    for name, buffer in model.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_(std=0.02)
    return model


def checkpoint(folder: Path, *, with_mimi: bool = False, seed: int = 0, **config: Any) -> dict[str, str]:
    """A checkpoint in a folder; the options of the preset 7b that name its files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = config_json(**config)
    if with_mimi:
        (folder / "mimi.json").write_text(json.dumps(mimi_config()))
        written["mimi_config_name"] = f"file://{folder / 'mimi.json'}"
        save_file(mimi(mimi_config()).state_dict(), folder / "mimi.safetensors")
    else:
        save_file({"w": torch.zeros(1)}, folder / "mimi.safetensors")
    (folder / "config.json").write_text(json.dumps(written))
    save_file(language_model(written, seed=seed).state_dict(), folder / "moshi.safetensors")
    names = {"moshi_path": "moshi.safetensors", "mimi_path": "mimi.safetensors", "config_path": "config.json"}
    return {"tokenizer_path": str(demo.TOKENIZER), **{key: str(folder / name) for key, name in names.items()}}


def lora(config: dict[str, Any], *, rank: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """A LoRA of all linears with random factors, as moshi-finetune saves it: what it trains, and nothing else."""
    model = language_model(config)
    torch.manual_seed(seed)
    replace_all_linear_with_lora(model, rank, 2.0, device="cpu")
    factors = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    return {name: torch.randn_like(tensor) * 0.05 for name, tensor in factors.items()}
