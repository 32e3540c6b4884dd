"""The laws as functions of a `Bench`. Each returns what it measured, by name, and raises `LawBrokenError`.

If a law compares two runs, they differ only in what the law names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt import inject
from ttt.adapter import gates_closed
from ttt.adapter_file import backbone_identity, load_adapter, save_adapter
from ttt.errors import AdapterMismatchError, InjectionError
from ttt.laws.bench import Bench, LawBrokenError, distance
from ttt.laws.fields import no_dead_field
from ttt.laws.masking import masked_tokens
from ttt.laws.parts import gates_of, layers_of, random_tokens, rotary_of
from ttt.laws.reach import evidence
from ttt.laws.training import NESTINGS, purity, remat_invariance
from ttt.layer import TTTLayer
from ttt.plugins import Scores, Scoring, Streaming, has_capability

__all__ = [
    "NESTINGS",
    "causality",
    "chunk_invariance",
    "evidence",
    "identity",
    "no_dead_field",
    "purity",
    "remat_invariance",
    "reversibility",
    "self_describing_files",
    "stream_independence",
]


def causality(bench: Bench, *, tokens: Iterable[int] | None = None) -> Mapping[str, float]:
    """Law 3: on a causal backbone, changing token t changes no output before t (and some from t on).

    It is checked in training mode too: a leak there would make the loss look better than it is.

    Args:
        bench: the bench.
        tokens: the tokens t to change, from 1; None changes each.
    """
    if not bench.backbone.causal:
        return {}
    injection = bench.injected()
    batch = bench.batch(injection.model)
    changed = range(1, bench.tokens) if tokens is None else list(tokens)
    worst = 0.0
    for training in (False, True):
        mode = " in training mode" * training
        expected = bench.outputs(injection.model, batch, training=training)
        for token in changed:
            perturbed = bench.backbone.perturb(batch, token=token)
            found = bench.outputs(injection.model, perturbed, training=training)
            away = distance(found[:, :token], expected[:, :token])
            worst = max(worst, away)
            if away > bench.tolerance:
                first = int((found - expected).abs().flatten(2).amax((0, 2)).gt(0).nonzero()[0])
                raise LawBrokenError(
                    3, f"changing token {token} changes the output at {first}{mode} ({away:.1e} before it)", away
                )
            if torch.equal(found[:, token:], expected[:, token:]):
                raise LawBrokenError(3, f"changing token {token} changes nothing at all{mode}: the bench cannot tell")
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
        bench: the bench; each of its layers is checked, and the model if it streams or scores.
        mini_batch_sizes: sizes to check, each with its own model.
        cuts: lengths of the pieces, one list for each way to cut the sequence; None cuts it into single tokens
            (whole mini-batches if they are not causal) and in two uneven ways.
        layers: whether each TTT layer is fed in pieces.
        model: whether the whole model is fed in pieces, if it streams or scores; it scores at the last size only.
    """
    measured = {}
    sizes = list(mini_batch_sizes)
    for size in sizes:
        if not bench.config().causal and size == 1:
            continue
        injection = bench.injected(mini_batch_size=size)
        batch = bench.batch(injection.model)
        for pieces in cuts or _pieces(bench.tokens, size if not bench.config().causal else 1):
            where = f"mini-batches of {size}, {_in_words(pieces)}"
            for name, layer in layers_of(injection).items() if layers else ():
                away = _pieces_of_layer(layer, pieces, bench)
                if away > bench.tolerance:
                    raise LawBrokenError(4, f"with {where}, {name} is {away:.1e} away from the whole", away)
                measured[f"{name}, {where}"] = away
            if model and has_capability(bench.backbone, Streaming):
                with torch.no_grad():
                    streamed = bench.backbone.stream(injection.model, batch, pieces=pieces)
                away = distance(streamed, bench.outputs(injection.model, batch))
                if away > bench.tolerance:
                    raise LawBrokenError(4, f"with {where}, the streamed model is {away:.1e} away from the whole", away)
                measured[f"model, {where}"] = away
            if model and size == sizes[-1] and has_capability(bench.backbone, Scoring):
                where = f"mini-batches of {size}, {_in_words(_gathered(pieces))}"
                away = _pieces_of_scores(bench, injection.model, _gathered(pieces))
                if away > bench.tolerance:
                    raise LawBrokenError(4, f"with {where}, a stream's scores are {away:.1e} away from the whole", away)
                measured[f"scores, {where}"] = away
    return measured


def stream_independence(bench: Bench) -> Mapping[str, float]:
    """Law 5: no row of a batch depends on another; a row can be reset, paused, or masked token by token."""
    injection = bench.injected()
    worst = max(_rows_of_model(bench, injection.model, training=training) for training in (False, True))
    with torch.no_grad():
        for name, layer in layers_of(injection).items():
            away = _rows_alone(layer, bench)
            worst = max(worst, away)
            if away > bench.tolerance:
                raise LawBrokenError(
                    5,
                    f"row by row {name} is {away:.1e} away from the batch, or one row reset or paused changes another",
                    away,
                )
            away = masked_tokens(layer, bench)
            worst = max(worst, away)
            if away > bench.tolerance:
                raise LawBrokenError(
                    5, f"with a mask {name} is {away:.1e} away from reading each row's counted tokens alone", away
                )
    return {"change of other rows": worst}


def _rows_of_model(bench: Bench, model: nn.Module, *, training: bool) -> float:
    """How much a change of one row of a batch changes another row."""
    batch, mode = bench.batch(model), " in training mode" * training
    expected = bench.outputs(model, batch, training=training)
    worst = 0.0
    for row in range(bench.batch_size):
        found = bench.outputs(model, bench.backbone.perturb(batch, token=0, row=row), training=training)
        others = [other for other in range(bench.batch_size) if other != row]
        away = distance(found[others], expected[others])
        if away > bench.tolerance:
            if training and _rows_meet_without_ttt(bench, row):
                return worst
            raise LawBrokenError(5, f"changing row {row} of a batch changes another row by {away:.1e}{mode}", away)
        worst = max(worst, away)
        if torch.equal(found[row], expected[row]):
            raise LawBrokenError(5, f"changing row {row} changes nothing at all{mode}: the bench cannot tell")
    return worst


def _rows_meet_without_ttt(bench: Bench, row: int) -> bool:
    """Whether the plain backbone already mixes rows in training, as batch norm does; then TTT is not the cause."""
    model = bench.model()
    batch = bench.batch(model)
    expected = bench.outputs(model, batch, training=True)
    found = bench.outputs(model, bench.backbone.perturb(batch, token=0, row=row), training=True)
    others = [other for other in range(bench.batch_size) if other != row]
    return distance(found[others], expected[others]) > bench.tolerance


def identity(bench: Bench, *, dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16)) -> Mapping[str, float]:
    """Law 6: with its gates closed, or α at 0, the adapted model is the plain one, its sites prepared, bit for bit."""
    for dtype in dtypes:
        model = bench.prepared(dtype)
        batch = bench.batch(model)
        plain = bench.outputs(model, batch)
        trained = bench.outputs(bench.prepared(dtype), batch, training=True)  # a pass that may write buffers
        injection = bench.inject(model)
        adapted = bench.outputs(model, batch)
        if injection.adapters and torch.equal(adapted, plain):
            raise LawBrokenError(6, f"the open gate changes nothing in {dtype}: TTT is not reached")
        with gates_closed(model):
            closed = bench.outputs(model, batch)
        with torch.no_grad():
            for gate in gates_of(injection):
                gate.gating_alpha.zero_()
        at_zero = bench.outputs(model, batch)
        with gates_closed(model):
            closed_in_training = bench.outputs(model, batch, training=True)
        for what, found, expected in (
            ("gates closed", closed, plain),
            ("gates closed in training mode", closed_in_training, trained),
            ("α at 0", at_zero, plain),
        ):
            if not torch.equal(found, expected):
                away = distance(found, expected)
                raise LawBrokenError(6, f"with {what}, {dtype} outputs are {away:.1e} from the plain", away)
    return {"difference with closed gates": 0.0}


def reversibility(bench: Bench) -> Mapping[str, float]:
    """Law 7: injection keeps the backbone's names and values, ejection restores it; if it fails, nothing changes."""
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
        ("a layer that does not exist", bench.backbone.sites(model), bench.config(layers=(0, 4095))),
        ("an adapter that fails", _with_last_adapter(bench.backbone.sites(model), Failing), bench.config()),
    ):
        try:
            inject.apply(model, sites, config, causal=bench.backbone.causal)
        except (InjectionError, RuntimeError):
            expect_unchanged(f"an injection that failed on {what}")
        else:
            raise LawBrokenError(7, f"injection does not fail on {what}")
    return {}


def self_describing_files(bench: Bench) -> Mapping[str, float]:
    """Law 9: an adapter file alone rebuilds the adapter; loading it into anything else is refused."""
    injection = bench.injected()
    options = backbone_identity(bench.backbone, bench.options or bench.backbone.tiny())
    for site in injection.sites:
        for key, known in site.known_options.items():
            if key not in options or options[key] != known:
                said = options.get(key)
                raise LawBrokenError(9, f"{site.path} knows of {key}: {known!r}, and `identity` says {said!r}")
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


# --- helpers of several laws ---


def _classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def _pieces(tokens: int, unit: int) -> list[list[int]]:
    """Ways to cut a sequence into pieces: single units, uneven pieces, two halves."""
    units, rest = divmod(tokens, unit)
    cuts = [[unit] * units, [unit * n for n in (1, units // 2, units - 1 - units // 2) if n > 0]]
    return [[*cut[:-1], cut[-1] + rest] if unit > 1 else cut for cut in cuts if cut]


def _gathered(pieces: Sequence[int], most: int = 24) -> list[int]:
    """The pieces, of many only the first and the last as they are: scoring each costs as much as the whole model."""
    if len(pieces) <= most:
        return list(pieces)
    first, last = pieces[: most - 5], pieces[-4:]
    return [*first, sum(pieces) - sum(first) - sum(last), *last]


def _in_words(pieces: Sequence[int]) -> str:
    """`281 pieces of 1`, `pieces of 1+6+7`, `300 pieces of 1 to 64`."""
    if len(set(pieces)) == 1:
        return f"{len(pieces)} pieces of {pieces[0]}"
    if len(pieces) <= 8:
        return f"pieces of {'+'.join(map(str, pieces))}"
    return f"{len(pieces)} pieces of {min(pieces)} to {max(pieces)}"


@torch.no_grad()
def _pieces_of_layer(layer: TTTLayer, pieces: Sequence[int], bench: Bench) -> float:
    """How far a layer's outputs and final state differ if it reads a sequence in pieces instead of whole."""
    x, angles = random_tokens(layer, bench)
    expected, end = layer(x, rotary=rotary_of(angles, slice(None)))
    parts, state, start = [], None, 0
    for piece in pieces:
        tokens = slice(start, start + piece)
        y, state = layer(x[:, tokens], state, rotary=rotary_of(angles, tokens))
        parts.append(y)
        start += piece
    assert state is not None
    found, whole = state.opened().tensors(), end.opened().tensors()
    return max(
        distance(torch.cat(parts, dim=1), expected),
        *(distance(found[name].float(), whole[name].float()) for name in whole),
    )


@torch.no_grad()
def _pieces_of_scores(bench: Bench, model: nn.Module, pieces: Sequence[int]) -> float:
    """How far a backbone's scores differ if it reads clips in pieces instead of whole; infinitely if their masks do."""
    backbone = bench.backbone
    assert has_capability(backbone, Scoring)
    clips = backbone.example_clips(model, batch_size=bench.batch_size, tokens=bench.tokens, seed=0)
    whole = backbone.score(model, clips)
    if not bool(whole.mask.any()):
        raise LawBrokenError(4, "`score` predicts nothing in `example_clips`: the bench cannot tell")
    with backbone.score_stream(model, batch_size=bench.batch_size) as stream:
        read = [stream.read(piece) for piece in clips.split(list(pieces), dim=2)] + [stream.finish()]
    streamed = Scores(torch.cat([part.nll for part in read], 2), torch.cat([part.mask for part in read], 2))
    if not torch.equal(streamed.mask, whole.mask):
        return float("inf")
    return distance(streamed.nll, whole.nll)


def _rows_alone(layer: TTTLayer, bench: Bench) -> float:
    """How far rows differ from reading alone: for the last row; and for each row if row 1 is reset or paused."""
    x, angles = random_tokens(layer, bench)
    half = 2 * layer.config.mini_batch_size if not layer.config.causal else bench.tokens // 2
    first, second = slice(0, half), slice(half, bench.tokens)
    read, state = layer(x[:, first], rotary=rotary_of(angles, first))
    read_alone, alone = layer(x[-1:, first], rotary=rotary_of(angles, first))
    reset = torch.zeros(bench.batch_size, dtype=torch.bool, device=x.device)
    reset[1] = True
    y, after = layer(x[:, second], layer.reset(state, reset), rotary=rotary_of(angles, second))
    straight, _ = layer(x[:, second], state, rotary=rotary_of(angles, second))
    fresh, _ = layer(x[1:2, second], rotary=rotary_of(angles, second))
    paused = after.where(~reset, state)  # row 1 is paused: it keeps its state
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
