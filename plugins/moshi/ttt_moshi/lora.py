"""LoRA in Moshi: where it goes, and files of it that moshi-finetune and kyutai's server exchange.

LoRA itself is `ttt.lora`, whose layers compute what kyutai's `LoRALinear` computes. Kyutai's replaces a linear layer by
a module of another class, whose weight is called `frozen_W.weight`; here each parameter keeps its name. A feed-forward
of kyutai's reads its layers' weights itself if they are `nn.Linear`; with LoRA it calls the layers, as kyutai's does if
they are `LoRALinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moshi.models import LMModel, loaders
from moshi.modules.gating import ActivationGating, gating_forward_generic
from torch import Tensor, nn

from ttt.adapter_file import read_info
from ttt.config.lora import Linears
from ttt.errors import UsageError
from ttt.files import read_tensors, write_tensors, write_text, writing
from ttt.lora import LoraLinear
from ttt.plugins import LoraSite
from ttt.printable import json_text
from ttt_moshi.merged_lora import in_todays_names

_ATTENTION = ".self_attn."


class AdaptedGating(ActivationGating):
    """A gated feed-forward that calls its linear layers; with LoRA off it is kyutai's own, bit for bit."""

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `[B,T,D]` to `[B,T,D]`."""
        layers = (self.linear_in, self.linear_out)
        if not any(isinstance(layer, LoraLinear) and not layer.lora_off for layer in layers):
            return super().forward(x)
        return gating_forward_generic(*layers, self.activation, x)


def lora_sites(model: LMModel, linears: Linears) -> list[LoraSite]:
    """The linear layers that `lora.linears` names, in the order of the model's modules.

    `all` is what moshi-finetune replaces: every linear layer, those of the depformer and the output heads too.

    Raises:
        UsageError: one is in cross-attention, which reads weights itself, so that LoRA would not be seen.
    """
    hosts = _hosts(model)
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and _is_named(path, linears):
            if ".cross_attention." in path:
                raise UsageError(f"lora.linears: {linears}: LoRA cannot reach the cross-attention at {path}")
            host = hosts.get(path.rpartition(".")[0])
            found.append(LoraSite(path, module, host, None if host is None else AdaptedGating))
    return found


def _is_named(path: str, linears: Linears) -> bool:
    in_layers = path.startswith("transformer.layers.")
    attends = _ATTENTION in path
    return {
        "all": True,
        "transformer": in_layers,
        "attention": in_layers and attends,
        "feed_forward": in_layers and not attends,
    }[linears]


def _hosts(model: LMModel) -> dict[str, ActivationGating]:
    return {path: module for path, module in model.named_modules() if isinstance(module, ActivationGating)}


def read_lora(model: LMModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `lora.safetensors` under today's names: older ones name `in_proj` and `out_proj`, all steps in one tensor."""
    return in_todays_names(tensors, dict(model.named_parameters()))


def export_lora(
    adapter: str | Path, out: str | Path, *, model_config: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Write an adapter's LoRA as moshi-finetune leaves it: `lora.safetensors` and `config.json`.

    kyutai's server reads them: `python -m moshi.server --lora-weight lora.safetensors --config-path config.json`.

    Args:
        adapter: a run's folder, an adapter's or its file.
        out: folder for the two files; made if need be.
        model_config: the content of the model's own config.json; None is that of the published 7B.

    Returns:
        The two files.

    Raises:
        UsageError: the adapter holds no LoRA, or TTT layers beside it, which kyutai's server does not have.
        EnvironmentProblem: a file is missing or damaged, or the disk is full.
    """
    info, out = read_info(adapter, verify=True), Path(out)
    if info.lora is None or info.sites:
        has = "no LoRA" if info.lora is None else "TTT layers beside its LoRA, and kyutai's server has none"
        raise UsageError(f"{info.path}: has {has}; export a run of adapter: lora")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    weights, settings = out / "lora.safetensors", out / "config.json"
    write_tensors(weights, read_tensors(info.path), {})
    written = dict(loaders._lm_kwargs if model_config is None else model_config)
    lora = {"lora": True, "lora_rank": info.lora.rank, "lora_scaling": info.lora.scaling}
    write_text(settings, json_text({**written, **lora}) + "\n")
    return weights, settings
