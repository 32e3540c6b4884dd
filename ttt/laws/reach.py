"""Law 10: TTT acts. Every layer is reached, in training and outside it, reads every token, moves and learns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttt.evidence import LayerEvidence, Observation
from ttt.inject import Injection
from ttt.laws.bench import Bench, LawBrokenError, distance
from ttt.laws.parts import gates_of, layers_of
from ttt.plugins import Batch

_HALF = 0.02
"""A gate so small that the change of the output is in proportion to the gate."""


def evidence(bench: Bench) -> Mapping[str, float]:
    """Law 10: every injected layer is reached, its fast weights move, and its gate is measured.

    This holds in evaluation mode and in training mode. Each layer reads the whole sequence, gets a gradient for every
    parameter, passes the gradient to what precedes it, and keeps its parameters in float32 in a backbone of half
    precision. Half the gate has half the effect.
    """
    injection = bench.injected()
    batch = bench.batch(injection.model)
    measured = {}
    for training in (False, True):
        for name, layer in _watched(bench, injection, batch, training=training).items():
            measured[f"movement of {name}" + " in training mode" * training] = layer.movement
    _require_last_token(bench, injection, batch)
    _require_gradients(bench, injection, batch)
    _require_proportion(bench, injection)
    _require_wide_parameters(bench)
    return measured


def _watched(bench: Bench, injection: Injection, batch: Batch, *, training: bool) -> dict[str, LayerEvidence]:
    """The evidence of every layer; raises if one does not act."""
    mode = " in training mode" * training
    unseen = bench.outputs(injection.model, batch, training=training)
    with Observation(injection) as seen:
        watched = bench.outputs(injection.model, batch, training=training)
    if not torch.equal(watched, unseen):
        raise LawBrokenError(10, f"watching the model changes its outputs{mode}")
    missing = sorted(set(injection.adapters) - seen.reached)
    if missing:
        raise LawBrokenError(10, f"{missing[0]} is injected and never reached{mode}")
    for name, layer in seen.layers().items():
        if not layer.movement > 0:
            raise LawBrokenError(10, f"the fast weights of {name} do not move{mode}")
        if not layer.gate > 0:
            raise LawBrokenError(10, f"the gate of {name} is closed{mode}")
    return seen.layers()


def _require_last_token(bench: Bench, injection: Injection, batch: Batch) -> None:
    """Require that the last token changes the input of every layer, so that none reads only the beginning."""
    with _read(injection) as before:
        last = bench.outputs(injection.model, batch).shape[1] - 1
    with _read(injection) as after:
        bench.outputs(injection.model, bench.backbone.perturb(batch, token=last))
    for name, tokens in before.items():
        if all(torch.equal(one, other) for one, other in zip(tokens, after.get(name, []), strict=False)):
            raise LawBrokenError(10, f"{name} does not read the whole sequence: the last token changes nothing in it")


def _require_gradients(bench: Bench, injection: Injection, batch: Batch) -> None:
    """Require a gradient for every parameter of an adapter and for the tokens that it reads."""
    named = {name for name, _ in injection.model.named_parameters()}
    with _read(injection) as read:
        found = bench.gradients(injection.model, batch)
    without_effect = {f"{site.name}.{key}" for site in injection.sites for key in site.without_effect}
    for site, adapter in injection.adapters.items():
        for key, _ in adapter.named_parameters():
            name = f"{site}.{key}"
            if name not in named:
                raise LawBrokenError(10, f"{name} is not a parameter of the model by that name: is it shared?")
            if found[name].abs().max() == 0 and name not in without_effect:
                raise LawBrokenError(10, f"{name} gets no gradient")
    if all(parameter.requires_grad for parameter in injection.model.parameters()):
        for name, tokens in read.items():
            if not any(x.requires_grad for x in tokens):
                raise LawBrokenError(
                    10, f"the tokens that {name} reads are detached: no gradient goes through it to what is before it"
                )


def _require_proportion(bench: Bench, injection: Injection) -> None:
    """Require that half the gate has half the effect, so that `tanh(α)` is the gate that the evidence reports."""
    if not injection.sites:
        return
    of = bench.injected(torch.float32, layers=(injection.sites[0].layer,))
    batch = bench.batch(of.model)

    def outputs(opening: float) -> Tensor:
        with torch.no_grad():
            for gate in gates_of(of):
                gate.gating_alpha.fill_(math.atanh(opening))
        return bench.outputs(of.model, batch).double()

    plain = outputs(0.0)
    half, whole = distance(outputs(_HALF), plain), distance(outputs(2 * _HALF), plain)
    if not 1.5 < whole / max(half, 1e-30) < 2.5:
        raise LawBrokenError(
            10,
            f"twice the gate has {whole / max(half, 1e-30):.1f} times the effect at {of.sites[0].name}: apply tanh(α) "
            f"once, as ttt.adapter.Gate does",
        )


def _require_wide_parameters(bench: Bench) -> None:
    """Require that adapters stay in float32 in a backbone of half precision, so that small updates are kept."""
    injection = bench.injected(torch.bfloat16)
    for name, value in injection.state_dict().items():
        if value.is_floating_point() and torch.finfo(value.dtype).bits < 32:
            kind = str(value.dtype).removeprefix("torch.")
            raise LawBrokenError(
                10, f"{name} is {kind} in a bfloat16 backbone: small updates of it would be rounded away"
            )


@contextlib.contextmanager
def _read(injection: Injection) -> Iterator[dict[str, list[Tensor]]]:
    """A context that records the tokens that each TTT layer reads, call by call."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(name, []).append(args[0] if args else kwargs["x"])

        return keep

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers_of(injection).items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
