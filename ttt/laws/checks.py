"""The laws as functions of a `Bench`. Each returns what it measured, by name, and raises `LawBrokenError`.

Where a law asks for the same number twice, the two runs differ in nothing but what the law names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ttt import inject
from ttt.adapter import Gate, gates_closed
from ttt.adapter_file import load_adapter, save_adapter
from ttt.config import TTTConfig
from ttt.errors import AdapterMismatchError, InjectionError, PluginError
from ttt.evidence import observe
from ttt.inject import Injection
from ttt.laws.bench import Bench, LawBrokenError, Wrapper, distance, non_reentrant, reentrant
from ttt.layer import TTTLayer

GROUP_SIZES = (0, 1, 2, 16)
NESTINGS: dict[str, tuple[Wrapper, ...]] = {
    "no checkpoint": (),
    "reentrant": (reentrant,),
    "non-reentrant": (non_reentrant,),
    "reentrant in non-reentrant": (non_reentrant, reentrant),
    "non-reentrant twice": (non_reentrant, non_reentrant),
}


def purity(bench: Bench) -> Mapping[str, float]:
    """Law 1: a forward and backward pass writes to no parameter or buffer, and a second one gives the same."""
    injection = bench.injected()
    model = injection.model
    batch = bench.batch(model)
    before = {name: tensor.clone() for name, tensor in _tensors(model).items()}
    versions = {name: tensor._version for name, tensor in _tensors(model).items()}
    runs = [bench.gradients(model, batch)]
    try:
        runs.append(bench.gradients(model, batch))
    except (RuntimeError, PluginError) as error:
        # Fast weights kept with their graph: the second pass reaches into the first one's, which is gone.
        first = str(error).strip().splitlines()[0]
        raise LawBrokenError(1, f"a second pass over the same tokens fails where the first did not: {first}") from error
    bench.outputs(model, batch)
    for name, tensor in _tensors(model).items():
        if not torch.equal(tensor, before[name]) or tensor._version != versions[name]:
            raise LawBrokenError(1, f"a forward pass wrote to {name}")
    worst = _worst(runs[1], runs[0])
    if worst[1] > 0:
        raise LawBrokenError(
            1, f"a second pass over the same tokens gives another {worst[0]} ({worst[1]:.1e} away)", worst[1]
        )
    return {"difference of two passes": worst[1]}


def remat_invariance(
    bench: Bench,
    *,
    group_sizes: Iterable[int] = GROUP_SIZES,
    nestings: Mapping[str, Sequence[Wrapper]] = NESTINGS,
    inside_own: Iterable[bool] = (False, True),
) -> Mapping[str, float]:
    """Law 2: outputs and gradients are the same for every group size and every nesting of checkpoints.

    Args:
        bench: what it is checked on.
        group_sizes: to be compared with keeping everything.
        nestings: what is wrapped around each adapter, by name.
        inside_own: whether the backbone's own activation checkpointing surrounds that.
    """
    plain = replace(bench, options=bench.bare or bench.options).injected(scan_checkpoint_group_size=0)
    bench.checkpointed(plain.model, False)
    batch = bench.batch(plain.model)
    expected = bench.gradients(plain.model, batch)
    measured = {}
    for group_size in group_sizes:
        for nesting, wrappers in nestings.items():
            for around in inside_own:
                injection = bench.injected(scan_checkpoint_group_size=group_size)
                # Reentrant checkpointing loses gradients inside another one of its kind or of none, in PyTorch
                # itself, only where its inputs need none; ours always do.
                if not bench.checkpointed(injection.model, around):
                    continue
                where = f"group size {group_size}, {nesting}" + " inside the backbone's own" * around
                try:
                    with bench.wrapped(injection, wrappers):
                        found = bench.gradients(injection.model, batch)
                except torch.utils.checkpoint.CheckpointError as error:
                    first = str(error).strip().splitlines()[0]
                    raise LawBrokenError(
                        2, f"at {where} recomputation differs from the forward pass: {first}"
                    ) from error
                name, away = _worst(found, expected)
                if away > bench.tolerance:
                    raise LawBrokenError(
                        2, f"at {where}, {name} is {away:.1e} away from what no checkpoint gives", away
                    )
                measured[where] = away
    return measured


def causality(bench: Bench, *, tokens: Iterable[int] | None = None) -> Mapping[str, float]:
    """Law 3: on a causal backbone, changing token t changes no output before t (and some from t on).

    Args:
        bench: what it is checked on.
        tokens: every t that is changed, from 1; None changes each.
    """
    if not bench.backbone.causal:
        return {}
    injection = bench.injected()
    batch = bench.batch(injection.model)
    expected = bench.outputs(injection.model, batch)
    worst = 0.0
    for token in range(1, bench.tokens) if tokens is None else tokens:
        found = bench.outputs(injection.model, bench.backbone.perturb(batch, token=token))
        away = distance(found[:, :token], expected[:, :token])
        worst = max(worst, away)
        if away > bench.tolerance:
            first = int((found - expected).abs().flatten(2).amax((0, 2)).gt(0).nonzero()[0])
            raise LawBrokenError(
                3, f"changing token {token} changes the output at {first} ({away:.1e} before it)", away
            )
        if torch.equal(found[:, token:], expected[:, token:]):
            raise LawBrokenError(3, f"changing token {token} changes nothing at all: the bench cannot tell")
    return {"change before the changed token": worst}


def chunk_invariance(
    bench: Bench,
    *,
    mini_batch_sizes: Iterable[int] = (1, 4, 16),
    cuts: Sequence[Sequence[int]] | None = None,
    layers: bool = True,
    model: bool = True,
) -> Mapping[str, float]:
    """Law 4: a stream fed in pieces gives the outputs and the final state of feeding it whole.

    Args:
        bench: what it is checked on; each of its layers, and the model where it streams.
        mini_batch_sizes: each with its own model.
        cuts: lengths of the pieces, one list for each way to cut the sequence; None cuts it into single tokens
            (whole mini-batches where they are not causal) and in two uneven ways.
        layers: whether each TTT layer is fed in pieces.
        model: whether the whole model is, where it streams.
    """
    measured = {}
    for size in mini_batch_sizes:
        if not bench.config().causal and size == 1:
            continue
        injection = bench.injected(mini_batch_size=size)
        batch = bench.batch(injection.model)
        for pieces in cuts or _pieces(bench.tokens, size if not bench.config().causal else 1):
            where = f"mini-batches of {size}, {_in_words(pieces)}"
            for name, layer in _layers(injection).items() if layers else ():
                away = _pieces_of_layer(layer, pieces, bench)
                if away > bench.tolerance:
                    raise LawBrokenError(4, f"with {where}, {name} is {away:.1e} away from the whole", away)
                measured[f"{name}, {where}"] = away
            if model and bench.backbone.streaming:
                with torch.no_grad():
                    streamed = bench.backbone.stream(injection.model, batch, pieces=pieces)
                away = distance(streamed, bench.outputs(injection.model, batch))
                if away > bench.tolerance:
                    raise LawBrokenError(4, f"with {where}, the streamed model is {away:.1e} away from the whole", away)
                measured[f"model, {where}"] = away
    return measured


def stream_independence(bench: Bench) -> Mapping[str, float]:
    """Law 5: row i of a batch never sees row j; a row can be reset, or paused, alone."""
    injection = bench.injected()
    model = injection.model
    batch = bench.batch(model)
    expected = bench.outputs(model, batch)
    worst = 0.0
    for row in range(bench.batch_size):
        found = bench.outputs(model, bench.backbone.perturb(batch, token=0, row=row))
        others = [other for other in range(bench.batch_size) if other != row]
        away = distance(found[others], expected[others])
        worst = max(worst, away)
        if away > bench.tolerance:
            raise LawBrokenError(5, f"changing row {row} of a batch changes another row by {away:.1e}", away)
        if torch.equal(found[row], expected[row]):
            raise LawBrokenError(5, f"changing row {row} changes nothing at all: the bench cannot tell")
    with torch.no_grad():
        for name, layer in _layers(injection).items():
            away = _rows_alone(layer, bench)
            worst = max(worst, away)
            if away > bench.tolerance:
                raise LawBrokenError(
                    5,
                    f"row by row {name} is {away:.1e} away from the batch, or one row reset or paused changes another",
                    away,
                )
    return {"change of other rows": worst}


def identity(bench: Bench, *, dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16)) -> Mapping[str, float]:
    """Law 6: with its gates closed, or α at 0, the adapted model is the plain one bit for bit."""
    for dtype in dtypes:
        model = bench.model(dtype)
        batch = bench.batch(model)
        plain = bench.outputs(model, batch)
        injection = bench.inject(model)
        adapted = bench.outputs(model, batch)
        if injection.adapters and torch.equal(adapted, plain):
            raise LawBrokenError(6, f"the open gate changes nothing in {dtype}: TTT is not reached")
        with gates_closed(model):
            closed = bench.outputs(model, batch)
        with torch.no_grad():
            for gate in _gates(injection):
                gate.gating_alpha.zero_()
        at_zero = bench.outputs(model, batch)
        for what, found in (("gates closed", closed), ("α at 0", at_zero)):
            if not torch.equal(found, plain):
                away = distance(found, plain)
                raise LawBrokenError(6, f"with {what}, {dtype} outputs are {away:.1e} from the plain", away)
    return {"difference with closed gates": 0.0}


def reversibility(bench: Bench) -> Mapping[str, float]:
    """Law 7: injection keeps the backbone's names and values, ejection restores it, a failed one changes nothing."""
    model = bench.model()
    batch = bench.batch(model)
    before, classes = {k: v.clone() for k, v in model.state_dict().items()}, _classes(model)
    plain = bench.outputs(model, batch)

    def expect_unchanged(after: str) -> None:
        state = model.state_dict()
        if list(state) != list(before) or not all(torch.equal(state[name], before[name]) for name in before):
            raise LawBrokenError(7, f"the state dict differs after {after}")
        if _classes(model) != classes:
            raise LawBrokenError(7, f"a module has another class after {after}")
        if not torch.equal(bench.outputs(model, batch), plain):
            raise LawBrokenError(7, f"outputs differ after {after}")

    injection = bench.inject(model)
    adapted = model.state_dict()
    for name, value in before.items():
        if name not in adapted:
            raise LawBrokenError(7, f"injection renames {name}")
        if not torch.equal(adapted[name], value):
            raise LawBrokenError(7, f"injection changes {name}")
    model.load_state_dict(before)  # strictly: a plain checkpoint loads after injection too
    try:
        bench.inject(model)
    except InjectionError:
        pass
    else:
        raise LawBrokenError(7, "a second injection into the same layers is not refused")
    if not torch.equal(bench.outputs(model, batch), bench.outputs(bench.injected().model, batch)):
        raise LawBrokenError(7, "a refused second injection changed the first")
    injection.eject()
    expect_unchanged("ejection")

    class Failing(nn.Module):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            raise RuntimeError("an adapter that cannot be made")

    for what, sites, config in (
        ("a layer that does not exist", bench.backbone.sites(model), bench.config(layers=(0, 10_000))),
        ("an adapter that fails", _with_last_adapter(bench.backbone.sites(model), Failing), bench.config()),
    ):
        try:
            inject.apply(model, sites, config, causal=bench.backbone.causal)
        except (InjectionError, RuntimeError):
            expect_unchanged(f"an injection that failed on {what}")
        else:
            raise LawBrokenError(7, f"injection does not fail on {what}")
    return {}


FIELD_CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    # field: (what it needs beside it, another value)
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
    "input_norm": ({"input_norm": "none"}, "rms"),
    "initial_gating_alpha": ({}, 0.5),
}
"""How each field of the `ttt` section is shown to act on outputs or parameters."""
FIELDS_SHOWN_ELSEWHERE = {
    "preset": "acts by what it fills in",
    "causal": "acts on what a token sees: law 3, and the ops' tests against the definition",
    "scan_checkpoint_group_size": "acts on memory alone, which the scan's tests measure",
    "persistent_states": "acts on the training loop, whose tests show it",
    "skip_nonfinite_tokens": "acts on tokens that are not finite, which the layer's tests feed it",
}


def no_dead_field(bench: Bench) -> Mapping[str, float]:
    """Law 8: every field of the `ttt` section changes outputs or parameters, and unknown keys are errors."""
    measured = {}
    untested = set(TTTConfig.model_fields) - set(FIELD_CHANGES) - set(FIELDS_SHOWN_ELSEWHERE)
    if untested:
        raise LawBrokenError(8, f"nothing shows that ttt.{sorted(untested)[0]} acts")
    for field, (beside, value) in FIELD_CHANGES.items():
        if not bench.config().causal and field in ("rope", "rope_theta", "learnable_token_idx"):
            continue  # those of a causal stream
        one, other = bench.injected(**beside), bench.injected(**{**beside, field: value})
        if _shapes(one) != _shapes(other):
            measured[field] = float("inf")
            continue
        batch = bench.batch(one.model)
        measured[field] = distance(bench.outputs(other.model, batch), bench.outputs(one.model, batch))
        if measured[field] == 0:
            raise LawBrokenError(8, f"ttt.{field}: {value} changes nothing")
    for section, model in (("backbone", bench.backbone.options), ("data", bench.backbone.data_options)):
        known = bench.backbone.tiny().model_dump() if section == "backbone" else {}
        try:
            model.model_validate({**known, "no_such_option": 1})
        except ValidationError:
            continue
        raise LawBrokenError(8, f"an unknown key in {section} is not an error")
    return measured


def self_describing_files(bench: Bench) -> Mapping[str, float]:
    """Law 9: an adapter file alone rebuilds the adapter; loading it into anything else is refused."""
    injection = bench.injected()
    options = (bench.options or bench.backbone.tiny()).model_dump(mode="json")
    with torch.no_grad():
        for number, parameter in enumerate(injection.state_dict().values()):
            parameter.add_(0.01 * (number + 1))
    batch = bench.batch(injection.model)
    expected = bench.outputs(injection.model, batch)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), injection, backbone=options)
        model = bench.model()
        load_adapter(
            Path(folder), model, sites=bench.backbone.sites(model), backbone=options, causal=bench.backbone.causal
        )
        away = distance(bench.outputs(model, batch), expected)
        if away > 0:
            raise LawBrokenError(9, f"the loaded adapter's outputs are {away:.1e} from the saved one's")
        for changes in ({"mini_batch_size": 3}, {"layers": (0,)}, {"base_lr": 0.3}):
            other = bench.injected(**changes)
            values = {name: value.clone() for name, value in other.state_dict().items()}
            try:
                load_adapter(Path(folder), other.model, injection=other, backbone=options)
            except AdapterMismatchError as error:
                if next(iter(changes)) not in str(error):
                    raise LawBrokenError(9, f"the refusal does not name {next(iter(changes))}: {error}") from error
            else:
                raise LawBrokenError(9, f"an adapter made otherwise ({changes}) takes the file")
            if not all(torch.equal(value, values[name]) for name, value in other.state_dict().items()):
                raise LawBrokenError(9, "a refused file was partly loaded")
    return {"difference after a round trip": away}


def evidence(bench: Bench) -> Mapping[str, float]:
    """Law 10: every injected layer is reached, its fast weights move, and what the gates let through is measured."""
    injection = bench.injected()
    batch = bench.batch(injection.model)
    unseen = bench.outputs(injection.model, batch)
    with observe(injection) as seen:
        watched = bench.outputs(injection.model, batch)
    if not torch.equal(watched, unseen):
        raise LawBrokenError(10, "watching the model changes its outputs")
    missing = sorted(set(injection.adapters) - seen.reached)
    if missing:
        raise LawBrokenError(10, f"{missing[0]} is injected and never reached")
    measured = {}
    for name, layer in seen.layers().items():
        if not layer.movement > 0:
            raise LawBrokenError(10, f"the fast weights of {name} do not move")
        if not layer.gate > 0:
            raise LawBrokenError(10, f"the gate of {name} is closed")
        measured[f"movement of {name}"] = layer.movement
    found = bench.gradients(injection.model, batch)
    without_effect = {f"{site.name}.{key}" for site in injection.sites for key in site.without_effect}
    for name in injection.state_dict():
        if name in found and found[name].abs().max() == 0 and name not in without_effect:
            raise LawBrokenError(10, f"{name} gets no gradient")
    return measured


# --- what several laws need ---


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **{f"buffer {name}": buffer for name, buffer in model.named_buffers()}}


def _classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def _shapes(injection: Injection) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in injection.state_dict().items()}


def _layers(injection: Injection) -> dict[str, TTTLayer]:
    return {
        name: module
        for name, adapter in injection.adapters.items()
        for module in adapter.modules()
        if isinstance(module, TTTLayer)
    }


def _gates(injection: Injection) -> list[Gate]:
    return [
        module for adapter in injection.adapters.values() for module in adapter.modules() if isinstance(module, Gate)
    ]


def _worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    """The entry that is furthest away; gradients are measured on the scale of the largest, not of their own noise."""
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


def _pieces(tokens: int, unit: int) -> list[list[int]]:
    """Ways to cut a sequence: single units, uneven ones, two halves."""
    units, rest = divmod(tokens, unit)
    cuts = [[unit] * units, [unit * n for n in (1, units // 2, units - 1 - units // 2) if n > 0]]
    return [[*cut[:-1], cut[-1] + rest] if unit > 1 else cut for cut in cuts if cut]


def _in_words(pieces: Sequence[int]) -> str:
    """`281 pieces of 1`, `pieces of 1+6+7`, `300 pieces of 1 to 64`."""
    if len(set(pieces)) == 1:
        return f"{len(pieces)} pieces of {pieces[0]}"
    if len(pieces) <= 8:
        return f"pieces of {'+'.join(map(str, pieces))}"
    return f"{len(pieces)} pieces of {min(pieces)} to {max(pieces)}"


def _random_tokens(layer: TTTLayer, bench: Bench) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    shape = (bench.batch_size, bench.tokens, layer.dim)
    x = torch.randn(shape, generator=generator).to(layer.ttt_norm_weight.device)
    if layer.config.rope != "backbone":
        return x, None
    return x, torch.rand(bench.tokens, layer.head_width // 2, generator=generator).to(x) * 3


def _rotary(angles: Tensor | None, tokens: slice) -> tuple[Tensor, Tensor] | None:
    return None if angles is None else (angles[tokens].cos(), angles[tokens].sin())


@torch.no_grad()
def _pieces_of_layer(layer: TTTLayer, pieces: Sequence[int], bench: Bench) -> float:
    """How far a layer's outputs and final state in pieces are from those of the whole."""
    x, angles = _random_tokens(layer, bench)
    expected, end = layer(x, rotary=_rotary(angles, slice(None)))
    parts, state, start = [], None, 0
    for piece in pieces:
        tokens = slice(start, start + piece)
        y, state = layer(x[:, tokens], state, rotary=_rotary(angles, tokens))
        parts.append(y)
        start += piece
    assert state is not None
    found, whole = state.opened().tensors(), end.opened().tensors()
    return max(
        distance(torch.cat(parts, dim=1), expected),
        *(distance(found[name].float(), whole[name].float()) for name in whole),
    )


def _rows_alone(layer: TTTLayer, bench: Bench) -> float:
    """How far rows are from their own course: the last one alone; each when row 1 is reset, or paused, on the way."""
    x, angles = _random_tokens(layer, bench)
    half = 2 * layer.config.mini_batch_size if not layer.config.causal else bench.tokens // 2
    first, second = slice(0, half), slice(half, bench.tokens)
    read, state = layer(x[:, first], rotary=_rotary(angles, first))
    read_alone, alone = layer(x[-1:, first], rotary=_rotary(angles, first))
    reset = torch.zeros(bench.batch_size, dtype=torch.bool, device=x.device)
    reset[1] = True
    y, after = layer(x[:, second], layer.reset(state, reset), rotary=_rotary(angles, second))
    straight, _ = layer(x[:, second], state, rotary=_rotary(angles, second))
    fresh, _ = layer(x[1:2, second], rotary=_rotary(angles, second))
    paused = after.where(~reset, state)  # row 1 paused: it is where it was
    held, expected = paused.opened().tensors(), state.opened().tensors()
    single = alone.opened().tensors()
    return max(
        distance(read[-1:], read_alone),
        *(distance(expected[name][-1:].float(), single[name].float()) for name in single),
        distance(y[~reset], straight[~reset]),
        distance(y[1:2], fresh),
        *(distance(held[name][1].float(), expected[name][1].float()) for name in expected),
    )


def _with_last_adapter(sites: Any, adapter: type[nn.Module]) -> list[Any]:
    sites = list(sites)
    return [*sites[:-1], replace(sites[-1], adapter=adapter)]
