"""Law 8: every field of the `ttt` section acts, and what cannot be honoured is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ttt.adapter import TTTAdapter, carried
from ttt.config import TTTConfig
from ttt.inject import Injection
from ttt.laws.bench import Bench, LawBrokenError, distance, running
from ttt.laws.parts import layers_of, random_tokens, rotary_of, shapes_of
from ttt.layer import TTTLayer
from ttt.plugins import Batch
from ttt.state import TTTState

FIELD_CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    # field: (other settings that it needs, another value)
    "preset": ({"preset": "lm", "rope": "none", "learnable_token_idx": False}, "video"),
    "layers": ({}, (0,)),
    "layer_type": ({"layer_type": "mlp"}, "linear"),
    "mlp_layers": ({"layer_type": "mlp"}, 3),
    "mlp_expansion_factor": ({"layer_type": "mlp"}, 2.0),
    "mlp_hidden_dims": ({"layer_type": "mlp"}, (5,)),
    "num_heads": ({}, 1),
    "mini_batch_size": ({}, 3),
    "base_lr": ({}, 0.7),
    "qkvo_bias": ({"qkvo_bias": False}, True),
    "normalize_qk": ({"normalize_qk": False}, True),
    "normalize_target": ({"normalize_target": False}, True),
    "rope": ({"rope": "mini_batch"}, "none"),
    "rope_theta": ({"rope": "mini_batch"}, 3.0),
    "learnable_token_idx": ({"learnable_token_idx": False}, True),
    "ln_eps": ({}, 0.5),
    "target_eps": ({"normalize_target": True}, 0.5),
    "input_norm": ({"input_norm": "none"}, "rms"),
    "initial_gating_alpha": ({}, 0.5),
    "causal": ({"causal": False}, True),
}
"""How each field of the `ttt` section is shown to act on outputs or parameters."""


def no_dead_field(bench: Bench) -> Mapping[str, float]:
    """Law 8: every field of the `ttt` section has an effect, and unknown keys are errors.

    `scan_checkpoint_group_size` changes what is kept between forward and backward, `persistent_states` the state with
    which the next window starts, `skip_nonfinite_tokens` the answers to tokens that are not finite; all others change
    outputs or parameters.
    """
    others = {
        "scan_checkpoint_group_size": _group_size_acts,
        "persistent_states": _persistent_states_act,
        "skip_nonfinite_tokens": _nonfinite_tokens_are_skipped,
    }
    untested = set(TTTConfig.model_fields) - set(FIELD_CHANGES) - set(others)
    if untested:
        raise LawBrokenError(8, f"nothing shows that ttt.{sorted(untested)[0]} acts")
    known: dict[str, _Answers] = {}
    measured = {field: _change(bench, field, known) for field in FIELD_CHANGES if _may_change(bench, field)}
    for field, check in others.items():
        found = check(bench)
        if found is not None:
            measured[field] = found
    _require_strict_sections(bench)
    return measured


def _may_change(bench: Bench, field: str) -> bool:
    if bench.backbone.causal:
        return field != "causal"  # false is refused, and law 3 shows that true is honoured
    # those of a causal stream
    return bench.config().causal or field not in ("rope", "rope_theta", "learnable_token_idx")


class _Answers(NamedTuple):
    """What a model with some settings gives for a batch."""

    shapes: dict[str, torch.Size]
    """Of its TTT's parameters, by name."""
    batch: Batch
    outputs: Tensor


def _change(bench: Bench, field: str, known: dict[str, _Answers]) -> float:
    """How much another value of a field changes the outputs; infinite if it changes the parameters' shapes.

    Several fields start from the same settings: `known` has what such a model gave, by its settings.
    """
    beside, value = FIELD_CHANGES[field]
    if field == "preset":
        beside = {**beside, "causal": bench.config().causal}
    if str(beside) not in known:
        injection = bench.injected(**beside)
        batch = bench.batch(injection.model)
        known[str(beside)] = _Answers(shapes_of(injection), batch, bench.outputs(injection.model, batch))
    one, other = known[str(beside)], bench.injected(**{**beside, field: value})
    if one.shapes != shapes_of(other):
        return float("inf")
    away = distance(bench.outputs(other.model, one.batch), one.outputs)
    if away == 0:
        raise LawBrokenError(8, f"ttt.{field}: {value} changes nothing")
    return away


def _require_strict_sections(bench: Bench) -> None:
    for section, model in (("backbone", bench.backbone.options), ("data", bench.backbone.data_options)):
        known = bench.backbone.tiny().model_dump() if section == "backbone" else {}
        try:
            model.model_validate({**known, "no_such_option": 1})
        except ValidationError:
            continue
        raise LawBrokenError(8, f"an unknown key in {section} is not an error")


# --- fields that change no output ---


def _group_size_acts(bench: Bench) -> float | None:
    """By what share the bytes kept for backward change if each mini-batch is its own checkpoint group."""
    size = max(1, bench.tokens // 4)  # mini-batches, so that there are several
    of = replace(bench, options=bench.bare or bench.options, ttt={**(bench.ttt or {}), "mini_batch_size": size})
    everything, checkpoints = (_kept_for_backward(of, of.injected(scan_checkpoint_group_size=g)) for g in (0, 1))
    if everything is None or checkpoints is None:
        return None  # a layer that is never reached is law 10's
    if everything == checkpoints:
        raise LawBrokenError(
            8, f"ttt.scan_checkpoint_group_size: 1 changes nothing: backward needs {everything} bytes, as with 0"
        )
    return abs(everything - checkpoints) / everything


def _kept_for_backward(bench: Bench, injection: Injection) -> int | None:
    """Bytes that autograd keeps of a pass in which only the scan's groups are recomputed; None if no scan runs."""
    bench.checkpointed(injection.model, False)
    batch = bench.batch(injection.model)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with (
        bench.counted(injection) as counts,
        running(injection.model, training=True),
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        bench.backbone.outputs(injection.model, batch)
    return kept if counts else None


def _persistent_states_act(bench: Bench) -> float | None:
    """How much carried states change the outputs of the next window: the smallest change over the layers.

    None if the backbone's adapters carry no states; the field is refused for them.
    """
    injection = bench.injected(persistent_states=True)
    if not all(isinstance(adapter, TTTAdapter) for adapter in injection.adapters.values()):
        return None
    model = injection.model
    first, second = bench.batch(model), bench.batch(model, seed=1)
    for training in (True, False):
        mode = "training" if training else "evaluation"
        with carried(injection) as carry, _states_read(injection) as seen:
            bench.outputs(model, first, training=training)
        for name in seen.left:  # a layer that is never reached is law 10's
            if name not in carry.states:
                raise LawBrokenError(
                    8,
                    f"ttt.persistent_states: true changes nothing at {name}: in {mode} mode no state of it reaches "
                    f"`ttt.adapter.carried`; call the adapter by its forward, as self.ttt(x)",
                )
            if not any(_same(carry.states[name], state) for state in seen.left.get(name, [])):
                raise LawBrokenError(
                    8, f"ttt.persistent_states: the state that {name} hands on is not where its layer ended"
                )
    states = carry.states
    measured = []
    for training in (True, False):
        mode = "training" if training else "evaluation"
        fresh = bench.outputs(model, second, training=training)
        for name in states:
            with carried(injection, {name: states[name]}), _states_read(injection) as seen:
                away = distance(bench.outputs(model, second, training=training), fresh)
            if away == 0 or not any(_same(state, states[name]) for state in seen.entered.get(name, [])):
                raise LawBrokenError(
                    8,
                    f"ttt.persistent_states: true changes nothing at {name}: in {mode} mode the layer does not start "
                    f"from the state that `ttt.adapter.carried` gives it",
                )
            measured.append(away)
    return min(measured, default=None)


@torch.no_grad()
def _nonfinite_tokens_are_skipped(bench: Bench) -> float:
    """How many tokens a layer skips if one token of each row is NaN; without the field their rows are lost."""
    counted = 0
    for asked in (True, False):
        for name, layer in layers_of(bench.injected(skip_nonfinite_tokens=asked)).items():
            x, angles = random_tokens(layer, bench)
            x[:, 1] = torch.nan
            y, state = layer(x, rotary=rotary_of(angles, slice(None)))
            kept = bool(y.isfinite().all()) and all(bool(value.isfinite().all()) for value in state.tensors().values())
            if kept != asked:
                told = "a NaN token reaches the fast weights" if asked else "false acts as true"
                raise LawBrokenError(8, f"ttt.skip_nonfinite_tokens: {told} in {name}")
            counted += int(state.skipped.sum()) if state.skipped is not None else 0
    if counted == 0:
        raise LawBrokenError(8, "ttt.skip_nonfinite_tokens: true counts nothing")
    return float(counted)


class _states_read:  # noqa: N801 - used as `with _states_read(injection) as seen`
    """A context that records the states with which each layer was called, and the states after its calls."""

    def __init__(self, injection: Injection) -> None:
        self.entered: dict[str, list[TTTState]] = {}
        self.left: dict[str, list[TTTState]] = {}
        self._layers = layers_of(injection)

    def __enter__(self) -> _states_read:
        self._handles = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True) for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def keep(layer: nn.Module, args: Any, kwargs: Any, result: tuple[Tensor, TTTState]) -> None:
            assert isinstance(layer, TTTLayer)
            state = args[1] if len(args) > 1 else kwargs.get("state")
            if state is not None:
                self.entered.setdefault(name, []).append(state.detach())
            self.left.setdefault(name, []).append(result[1].detach())

        return keep


def _same(one: TTTState, other: TTTState) -> bool:
    a, b = one.opened().tensors(), other.opened().tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
