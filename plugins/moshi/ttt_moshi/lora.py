"""LoRA in Moshi: where it goes, and files of it that moshi-finetune and kyutai's server exchange.

LoRA itself is `ttt.lora`, whose layers compute what kyutai's `LoRALinear` computes. Kyutai's replaces a linear layer by
a module of another class, whose weight is called `frozen_W.weight`; here each parameter keeps its name. A feed-forward
of kyutai's reads its layers' weights itself if they are `nn.Linear`; with LoRA it calls the layers, as kyutai's does if
they are `LoRALinear`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moshi.models import LMModel
from moshi.modules.gating import ActivationGating, gating_forward_generic
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

from ttt.config.lora import Linears
from ttt.errors import UsageError
from ttt.lora import LoraLinear
from ttt.plugins import LoraSite

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
    renamed = dict(tensors)
    for path, module in _attentions(model):
        StreamingMultiheadAttention._load_hook(module, renamed, f"{path}.")
    return renamed


def _attentions(model: LMModel) -> Iterator[tuple[str, StreamingMultiheadAttention]]:
    for path, module in model.named_modules():
        if isinstance(module, StreamingMultiheadAttention):
            yield path, module
