"""The check of a backbone's LoRA: each linear layer that it names is reached in every mode, and off when closed."""

from __future__ import annotations

import typing

import torch
from torch import Tensor, nn

from ttt.adapter import gates_closed
from ttt.config import RunConfig
from ttt.config.lora import Linears, LoraSettings
from ttt.laws.bench import Bench, distance, running
from ttt.laws.plugin import MethodBrokenError, method_of
from ttt.lora import Lora, LoraPlan, shapes_of
from ttt.plugins import Batch, LowRank, Streaming, capability, has_capability

_RANK = 2


def lora_acts(bench: Bench) -> None:
    """A plugin's LoRA: it is where the plugin says, acts in every mode, starts and ends as the plain backbone.

    Without the capability `LowRank` there is nothing to check.

    Raises:
        MethodBrokenError: naming what does not hold, and the linear layer.
    """
    backbone = bench.backbone
    if not has_capability(backbone, LowRank):
        return
    for linears in typing.get_args(Linears):
        _require_shapes(bench, linears)
    with method_of(bench, "lora_sites") as method:
        _require_place_and_effect(method, bench)
    _require_streams(bench)


def _require_place_and_effect(method: str, bench: Bench) -> None:
    config, model = bench.run_config(), bench.model()
    batch = bench.batch(model)
    names, classes = [name for name, _ in model.named_parameters()], [type(module) for module in model.modules()]
    plain = _loss(bench, model, batch, config)
    lora = _added(bench, model, "all")
    added = lora.parameters()
    if [name for name, _ in model.named_parameters() if name not in added] != names:
        raise MethodBrokenError(method, "with LoRA, the backbone's own parameters have other names")
    _require_equal(method, "LoRA that has not learned", plain, _loss(bench, model, batch, config))
    for training in (True, False):
        _require_reached(method, bench, model, lora, batch, config, training=training)
    _fill(lora)
    if _loss(bench, model, batch, config) == plain:
        raise MethodBrokenError(method, "LoRA with values changes no loss")
    with gates_closed(model):
        _require_equal(method, "LoRA that is off", plain, _loss(bench, model, batch, config))
    lora.remove()
    _require_equal(method, "a model whose LoRA was removed", plain, _loss(bench, model, batch, config))
    if [type(module) for module in model.modules()] != classes:
        raise MethodBrokenError(method, "a model whose LoRA was removed has modules of other classes")


def _added(bench: Bench, model: nn.Module, linears: Linears) -> Lora:
    sites = capability(bench.backbone, LowRank).lora_sites(model, linears)
    return Lora(model, LoraPlan(tuple(sites), LoraSettings(_RANK, 2.0, linears)))


@torch.no_grad()
def _fill(lora: Lora) -> None:
    """Give A and B values, those of each layer their own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.parameters().values():
        parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))


def _require_shapes(bench: Bench, linears: Linears) -> None:
    options, backbone = bench.options or bench.backbone.tiny(), capability(bench.backbone, LowRank)
    model = bench.backbone.build(options, device="meta", dtype=torch.float32)
    with method_of(bench, "lora_shapes") as method:
        said, found = backbone.lora_shapes(options, linears), dict(shapes_of(backbone.lora_sites(model, linears)))
        if said is not None and dict(said) != found:
            raise MethodBrokenError(method, f"for {linears} it says {said}, and the model has {found}")


def _loss(bench: Bench, model: nn.Module, batch: Batch, config: RunConfig) -> float:
    with torch.no_grad(), running(model, training=False):
        return float(bench.backbone.loss(model, batch, config).loss)


def _require_equal(method: str, what: str, plain: float, found: float) -> None:
    if found != plain:
        raise MethodBrokenError(method, f"{what} has the loss {found:.9g}, and the plain backbone {plain:.9g}")


def _require_reached(
    method: str, bench: Bench, model: nn.Module, lora: Lora, batch: Batch, config: RunConfig, *, training: bool
) -> None:
    """The loss has a gradient for B of each layer: so B changes it."""
    parameters = lora.parameters()
    for parameter in parameters.values():
        parameter.grad = None
    with running(model, training=training):
        bench.backbone.loss(model, batch, config).loss.backward()
    for name, parameter in parameters.items():
        if name.endswith("lora_B.weight") and (parameter.grad is None or not bool(parameter.grad.count_nonzero())):
            mode = "training" if training else "evaluation"
            raise MethodBrokenError(
                method,
                f"in {mode} mode the loss does not depend on {name}: the linear layer is not called, or its weight is "
                f"read by a module that is not its host",
            )


def _require_streams(bench: Bench) -> None:
    """A model that streams does so with LoRA as it does whole: law 4."""
    backbone = bench.backbone
    if not has_capability(backbone, Streaming):
        return
    with method_of(bench, "stream") as method:
        model = bench.model()
        batch = bench.batch(model)
        plain = bench.outputs(model, batch)
        _fill(_added(bench, model, "transformer"))
        whole = bench.outputs(model, batch)
        with torch.no_grad():
            streamed: Tensor = backbone.stream(model, batch, pieces=[1] * bench.tokens)
        away = distance(streamed, whole)
        if away > bench.tolerance or distance(whole, plain) <= bench.tolerance:
            raise MethodBrokenError(method, f"with LoRA the streamed model is {away:.1e} away from the whole")
