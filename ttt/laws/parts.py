"""Helpers of several laws: the parts of an injection, and the largest difference between two passes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ttt.adapter import Gate
from ttt.inject import Injection
from ttt.laws.bench import Bench, distance
from ttt.layer import TTTLayer


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **{f"buffer {name}": buffer for name, buffer in model.named_buffers()}}


def shapes_of(injection: Injection) -> dict[str, torch.Size]:
    """Shapes of the adapters' tensors."""
    return {name: value.shape for name, value in injection.state_dict().items()}


def layers_of(injection: Injection) -> dict[str, TTTLayer]:
    """The TTT layer of each adapter, by site name."""
    return {
        name: module
        for name, adapter in injection.adapters.items()
        for module in adapter.modules()
        if isinstance(module, TTTLayer)
    }


def gates_of(injection: Injection) -> list[Gate]:
    """Every gate."""
    return [
        module for adapter in injection.adapters.values() for module in adapter.modules() if isinstance(module, Gate)
    ]


def worst_of(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    """The entry with the largest distance; gradients are scaled by the largest, since small ones are mostly noise."""
    scale = max(
        torch.linalg.vector_norm(value.double()).item() for name, value in expected.items() if name != "outputs"
    )
    worst = ("outputs", distance(found["outputs"], expected["outputs"]))
    for name, value in expected.items():
        if name == "outputs":
            continue
        difference = torch.linalg.vector_norm((found[name] - value).double()).item()
        size = max(torch.linalg.vector_norm(value.double()).item(), 1e-3 * scale)
        away = difference / size if size else difference
        if not away <= worst[1]:
            worst = (f"the gradient of {name}", away if away == away else float("inf"))
    return worst


def random_tokens(layer: TTTLayer, bench: Bench) -> tuple[Tensor, Tensor | None]:
    """Random tokens for one layer, and rotary angles `[T,F/2]` if the backbone provides them."""
    generator = torch.Generator().manual_seed(3)
    shape = (bench.batch_size, bench.tokens, layer.dim)
    x = torch.randn(shape, generator=generator).to(layer.ttt_norm_weight.device)
    if layer.config.rope != "backbone":
        return x, None
    return x, torch.rand(bench.tokens, layer.head_width // 2, generator=generator).to(x) * 3


def rotary_of(angles: Tensor | None, tokens: slice) -> tuple[Tensor, Tensor] | None:
    """The cosines and sines of some tokens' angles, as a layer takes them; None if there are no angles."""
    return None if angles is None else (angles[tokens].cos(), angles[tokens].sin())
