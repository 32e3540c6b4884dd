"""`ttt check --probe`: the laws proved on the config's own backbone, narrowed to what runs in seconds.

What is narrowed is width and depth, to the plugin's `tiny()`. What could break a law stays the config's own: every
setting of the `ttt` section, the mini-batch, the group, the nesting of checkpoints, the type of the parameters.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from ttt.asking import WAY_OUT, owner
from ttt.backbone import Backbone
from ttt.config.diagnostics import Finding, Severity
from ttt.config.estimate import scan_cost
from ttt.config.schema import RunConfig, TTTConfig, select_layers
from ttt.errors import NestedCheckpointWarning, PluginError, TTTError
from ttt.inject import Site
from ttt.laws import Bench, LawBrokenError, checks
from ttt.printable import say
from ttt.probe_codes import LAW_EXPLANATIONS
from ttt.train.setup import narrowed, threads
from ttt.words import first_line

_SHORTEST = 12
"""Tokens that a probe reads at least."""
_LONGEST = 2048
"""Tokens that a probe reads at most: attention and the dual form grow with their square."""
_LONGEST_FOR_GROUPS = 1280
"""Tokens that it reads for the sake of a second checkpoint group."""
_STREAMED = 100
"""Tokens of a mini-batch in the streamed model at most: what a backbone remembers while it streams may be short."""
_PIECES = 400
"""Pieces that a stream is fed in at most."""
_BATCH = 2
_LEAST_GATE = 0.01
_PROBE_GATE = 0.1
_FLOAT32_TOLERANCE = 1e-5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def probe(config: RunConfig, backbone: Backbone, *, console: Console | None = None) -> list[Finding]:
    """Prove the laws for a config on a narrowed model, on the CPU, and print each with its number.

    Proved are laws 1 to 6 and 10: a pass writes nothing and a second one is the same; gradients are those of nothing
    recomputed; the future changes nothing before it; one token at a time is the whole; rows are independent; the
    closed gate is the plain backbone; every layer is reached, moves and gets gradients.

    Args:
        config: what `ttt.config.load_config` returned, without errors.
        backbone: its plugin.
        console: where to; None is standard output.

    Returns:
        A finding for each law that broke, `TTT901` … `TTT910` by the law's number, and `TTT803` where the plugin failed
        while a law was tried. Their places are left out; the path is the key to blame.

    Raises:
        ttt.errors.TTTError: the model cannot be built, or takes no TTT with these settings.
    """
    console = console or Console()
    config = narrowed(config, backbone)
    started = time.monotonic()
    findings: list[Finding] = []
    # One thread: the matrices are small, and more would only wait for each other.
    with threads(1), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", NestedCheckpointWarning)  # what it costs was said by the check itself
        setting = narrow(config, backbone)
        say(console, f"probe: {setting.told[0]}")
        for line in setting.told[1:]:
            say(console, f"  {line}")
        if not setting.layers:
            say(console, "  ttt.layers names no layer: there is nothing to prove")
            return []
        for proof in proofs(setting):
            if proof.compares_passes and any(finding.code == "TTT901" for finding in findings):
                _row(console, proof, "--", "two passes cannot be compared")
                continue
            findings += _try(proof, setting, console)
    broken = len({finding.code for finding in findings})
    verdict = f"{broken} {'law' if broken == 1 else 'laws'} broken" if broken else "every law holds"
    say(console, f"probe: {verdict}, {time.monotonic() - started:.1f} s")
    return findings


@dataclass(frozen=True)
class Setting:
    """What a config is proved on."""

    bench: Bench
    """In the config's own type of parameters, with its own nesting."""
    exact: Bench
    """The same in float32, whose rounding hides no leak."""
    short: Bench
    """The same again on a sequence of three mini-batches: without gradients no group is checkpointed."""
    config: TTTConfig
    """The `ttt` section as it is probed."""
    layers: tuple[int, ...]
    """Where TTT is in the narrowed model."""
    group_size: int
    """Mini-batches per checkpoint in the proof of law 2."""
    told: tuple[str, ...]
    """What was narrowed, in the user's words: the model first."""


@dataclass(frozen=True)
class Proof:
    """A law, what it says, and how it is tried."""

    law: int
    claim: str
    kind: str
    """What numbers it was tried in."""
    tolerance: float | None
    """Largest number that passes; None where nothing but 0 does, or where the number must not be 0."""
    run: Callable[[], Mapping[str, float]]
    applies: str = ""
    """Why it is not tried, where it is not."""
    compares_passes: bool = False
    """Whether it compares passes of one adapted model, which says nothing where a pass changes the next (law 1)."""


def narrow(config: RunConfig, backbone: Backbone) -> Setting:
    """The config on the plugin's smallest model.

    Raises:
        ttt.errors.TTTError: the model cannot be built, or the config's facts cannot be had.
    """
    ttt, facts = config.ttt, backbone.facts(config)
    options = backbone.tiny_like(config.backbone)
    # On the CPU from the start: a plugin may settle, when it first builds, what its package compiles.
    sites = backbone.sites(backbone.build(options, device="cpu", dtype=torch.float32))
    dim, heads = sites[0].dim, sites[0].num_heads
    chosen = select_layers(ttt.layers, facts.num_layers)
    layers = place_layers(chosen, facts.num_layers, len(sites))
    told = [f"{backbone.name} at width {dim}, {heads} heads, {len(sites)} layers, on the CPU"]
    if chosen != layers or facts.num_layers != len(sites):
        told.append(f"{_layers_in_words(chosen)} of {facts.num_layers} stand as {_numbers(layers)} of {len(sites)}")
    changes: dict[str, Any] = {"layers": layers}
    if ttt.num_heads is not None:
        changes["num_heads"] = _heads(ttt.num_heads, facts.num_heads, sites[0], ttt)
        told.append(f"ttt.num_heads: {ttt.num_heads} stands as {changes['num_heads'] or heads}")
    if ttt.mlp_hidden_dims is not None:
        before, after = facts.dim // (ttt.num_heads or facts.num_heads), dim // (changes.get("num_heads") or heads)
        changes["mlp_hidden_dims"] = tuple(max(1, round(width * after / before)) for width in ttt.mlp_hidden_dims)
        told.append(f"hidden widths {_numbers(ttt.mlp_hidden_dims)} stand as {_numbers(changes['mlp_hidden_dims'])}")
    if abs(ttt.initial_gating_alpha) < _LEAST_GATE:
        changes["initial_gating_alpha"] = _PROBE_GATE
        told.append(f"gates start at {_PROBE_GATE}, not {ttt.initial_gating_alpha:g}, which would hide what TTT does")
    size = min(ttt.mini_batch_size, _LONGEST // 4)
    if size < ttt.mini_batch_size:
        changes["mini_batch_size"] = size
        told.append(f"mini-batches of {size}, not {ttt.mini_batch_size}: three of those would take too long")
    if backbone.streaming and size > _STREAMED:
        told.append(f"the whole model streams in mini-batches of {_STREAMED}, each layer in those of {size}")
    wanted = ttt.scan_checkpoint_group_size
    if wanted == "auto":  # what it comes to in this config
        wanted = scan_cost(
            ttt,
            dim=facts.dim,
            num_heads=facts.num_heads,
            tokens=facts.tokens_per_window or _LONGEST,
            batch_size=config.train.batch_size,
        ).group_size
        told.append(f"scan_checkpoint_group_size: auto is {wanted}")
    tokens, group_size = _lengths(size, wanted)
    full, short = tokens // size, _length(_fewest(size), size)
    open_one = " and an open one" if tokens % size else ""
    told.append(f"{tokens} tokens: {full} mini-batches of {size}{open_one}, {short} in law 4; a batch of {_BATCH}")
    told.append(_groups_in_words(full, wanted, group_size, config.train.gradient_checkpointing))
    settings = {**ttt.model_dump(), **changes}
    dtype = _DTYPES[config.train.param_dtype]

    def bench(dtype: torch.dtype, tokens: int) -> Bench:
        return Bench(
            backbone,
            options=options,
            bare=backbone.tiny(),
            ttt=settings,
            tokens=tokens,
            batch_size=_BATCH,
            device="cpu",
            tolerance=tolerance_of(dtype),
            dtype=dtype,
            gradient_checkpointing=config.train.gradient_checkpointing,
        )

    exact = bench(torch.float32, tokens)
    return Setting(
        bench(dtype, tokens), exact, bench(torch.float32, short), exact.config(), layers, group_size, tuple(told)
    )


def tolerance_of(dtype: torch.dtype) -> float:
    """How far two results may be apart that a law says are equal.

    In float32 the suite's own 1e-5. Else one rounding of the type: gradients of groups are summed in another order,
    which turns a last bit here and there on the way back through the backbone.
    """
    return _FLOAT32_TOLERANCE if dtype is torch.float32 else torch.finfo(dtype).eps


def place_layers(layers: tuple[int, ...], of: int, onto: int) -> tuple[int, ...]:
    """Layers of a model of `of` layers as layers of one of `onto`: in the same order, each near its relative depth.

    Where they do not all fit, those that fall on one another become one. A model of the same depth keeps them.
    """
    if of == onto or not layers:
        return layers
    wanted = [round(layer * (onto - 1) / max(of - 1, 1)) for layer in layers]
    if len(layers) > onto:
        return tuple(sorted(set(wanted)))
    for index in range(len(wanted) - 1, -1, -1):  # from the top: the one above takes its place, this one goes below
        ceiling = wanted[index + 1] - 1 if index + 1 < len(wanted) else onto - 1
        wanted[index] = min(wanted[index], ceiling)
    for index in range(len(wanted)):  # and up again, where there is no more below
        floor = wanted[index - 1] + 1 if index else 0
        wanted[index] = max(wanted[index], floor)
    return tuple(wanted)


def proofs(setting: Setting) -> list[Proof]:
    """What is tried, in order."""
    bench, exact, short, config = setting.bench, setting.exact, setting.short, setting.config
    own = str(bench.dtype).removeprefix("torch.")
    causal, size = bench.backbone.causal, config.mini_batch_size

    def remat(of: Bench) -> Mapping[str, float]:
        return checks.remat_invariance(
            of,
            group_sizes=(setting.group_size,),
            nestings={"no other checkpoint": ()},
            inside_own=(bench.gradient_checkpointing,),
        )

    def streams() -> Mapping[str, float]:
        measured: dict[str, float] = {}
        for layers, length in ((True, size), (False, min(size, _STREAMED))):
            of = replace(short, tokens=_length(_fewest(length), length))
            pieces = cuts(of.tokens, length, unit=1 if config.causal else length, at_most=_PIECES)
            measured |= checks.chunk_invariance(
                of, mini_batch_sizes=(length,), cuts=pieces, layers=layers, model=not layers
            )
        return measured

    pieces = "token by token" if config.causal else "in mini-batches"
    streamed = f"a stream {pieces} is the whole" if bench.backbone.streaming else f"a layer {pieces} is the whole"
    found = [
        Proof(1, "a pass writes nothing, and repeats", own, None, lambda: checks.purity(bench)),
        Proof(2, "recomputing changes no gradient", "float32", exact.tolerance, lambda: remat(exact)),
    ]
    if bench.dtype is not torch.float32:
        found.append(Proof(2, "recomputing changes no gradient", own, bench.tolerance, lambda: remat(bench)))
    return [
        *found,
        Proof(
            3,
            "no token changes an earlier output",
            "float32",
            exact.tolerance,
            lambda: checks.causality(exact, tokens=_telling_tokens(exact.tokens, size, setting.group_size)),
            "" if causal else f"{bench.backbone.name} is not causal",
            compares_passes=True,
        ),
        Proof(
            4,
            streamed,
            "float32",
            short.tolerance,
            streams,
            compares_passes=True,
        ),
        Proof(
            5,
            "rows are independent",
            "float32",
            exact.tolerance,
            lambda: checks.stream_independence(exact),
            compares_passes=True,
        ),
        Proof(
            6,
            "gates closed, it is the plain model",
            own,
            None,
            lambda: checks.identity(bench, dtypes=(bench.dtype,)),
        ),
        Proof(
            10,
            "every TTT layer is reached and moves",
            own,
            None,
            lambda: checks.evidence(bench),
            compares_passes=True,
        ),
    ]


def cuts(tokens: int, size: int, *, unit: int, at_most: int) -> list[list[int]]:
    """Ways to cut a sequence into pieces: as fine as `at_most` pieces allow, and unevenly.

    Args:
        tokens: length of the sequence.
        size: of a mini-batch.
        unit: length of the smallest piece: 1, or a mini-batch where they are not causal.
        at_most: pieces. Where single units are more, they are fed one by one around every boundary of mini-batches and
            in longer pieces between.
    """
    if unit > 1:
        whole, rest = divmod(tokens, unit)
        fine = [unit] * whole + [rest] * bool(rest)
        return [fine, [unit * (whole // 2), tokens - unit * (whole // 2)]]
    uneven = [1, size, tokens - 1 - size]
    if tokens <= at_most:
        return [[1] * tokens, uneven]
    boundaries = range(0, tokens + 1, size)
    around = max(1, at_most // (4 * len(boundaries)))
    alone = {place for boundary in boundaries for place in range(boundary - around, boundary + around)}
    longest = 4 * size // around + 1 if size // around > 64 else 64
    fine = []
    long = 0
    for token in range(tokens):
        if token in alone or long == longest:
            fine += [long] * bool(long)
            long = 0
        if token in alone:
            fine.append(1)
        else:
            long += 1
    return [[*fine, *[long] * bool(long)], uneven]


def _try(proof: Proof, setting: Setting, console: Console) -> list[Finding]:
    """Try one, and print what came out."""
    if proof.applies:
        _row(console, proof, "--", proof.applies)
        return []
    try:
        measured = proof.run()
    except LawBrokenError as broken:
        _row(console, proof, "BROKEN", "" if broken.measured is None else f"{broken.measured:.1e}")
        return [_finding(broken, setting.bench.backbone)]
    except PluginError as error:
        _row(console, proof, "FAILED", type(error.__cause__ or error).__name__)
        return [_failed(str(error).removesuffix(WAY_OUT), proof)]
    except TTTError:
        raise
    except Exception as error:  # a plugin's code: whatever it raises is its failure, not ours
        _row(console, proof, "FAILED", type(error).__name__)
        return [_failure(error, proof, setting.bench.backbone)]
    if proof.law == 10:
        _row(console, proof, "ok", f"{min(measured.values()):.1e}")
    else:
        worst = max(measured.values(), default=0.0)
        _row(console, proof, "ok", f"{worst:.1e}" if worst else "0")
    return []


def _finding(broken: LawBrokenError, backbone: Backbone) -> Finding:
    code = f"TTT9{broken.law:02d}"
    return Finding(
        code=code,
        severity=Severity.ERROR,
        path="backbone.name",
        message=f"{backbone.name} breaks law {broken.law}: {broken.what}",
        fix=f"In the plugin {backbone.name}: {LAW_EXPLANATIONS[code].fix}",
        value=broken.measured,
    )


def _failure(error: Exception, proof: Proof, backbone: Backbone) -> Finding:
    where = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {first_line(error, otherwise='')}"
    return _failed(f"{owner(backbone)} failed, {where.filename}:{where.lineno}: {what}", proof)


def _failed(what: str, proof: Proof) -> Finding:
    return Finding(
        code="TTT803",
        severity=Severity.ERROR,
        path="backbone.name",
        message=f"law {proof.law} ({proof.claim}): {what}",
        fix="ttt.testing.laws runs the same in pytest",
    )


# --- what is narrowed, and how that is told ---


def _lengths(size: int, group_size: int) -> tuple[int, int]:
    """Tokens that cross at least three mini-batches and end inside one, and the group that is checkpointed there."""
    full = max(_fewest(size), group_size + 1)
    if group_size and _length(full, size) <= _LONGEST_FOR_GROUPS:
        return _length(full, size), group_size
    return _length(_fewest(size), size), min(group_size, 2) or 1


def _fewest(size: int) -> int:
    """Mini-batches that a sequence crosses at least: three, and more of very short ones."""
    return max(3, _SHORTEST // size)


def _length(full: int, size: int) -> int:
    """Tokens of so many full mini-batches, and of a half one that stays open."""
    return full * size + size // 2


def _heads(wanted: int, of: int, site: Site, ttt: TTTConfig) -> int | None:
    """Heads of the narrowed layer in the proportion of the config's, None for the backbone's."""
    heads = max(1, round(wanted * site.num_heads / of))
    fits = site.dim % heads == 0 and (ttt.rope == "none" or (site.dim // heads) % 2 == 0)
    return heads if fits else None


def _telling_tokens(tokens: int, size: int, group_size: int) -> list[int]:
    """Places where a leak would show: inside a mini-batch, on its boundaries, on those of groups, at the end."""
    places = {1, size // 2, size - 1, size, size + 1, size + size // 2, 2 * size - 1}
    places |= {group_size * size - 1, group_size * size, group_size * size + 1, tokens - 1}
    return sorted(place for place in places if 0 < place < tokens)


def _groups_in_words(full: int, wanted: int, group_size: int, nested: bool) -> str:
    nesting = ", inside the backbone's own activation checkpointing" if nested else ""
    groups = -(-full // group_size)
    counted = f"{groups} checkpoint groups of {group_size}{nesting}"
    if wanted == group_size:
        return counted
    if wanted == 0:
        return f"{counted}; scan_checkpoint_group_size: 0 keeps everything"
    return f"{counted}, not {wanted}: more than one group of those would take too long"


def _layers_in_words(layers: tuple[int, ...]) -> str:
    return f"{'layer' if len(layers) == 1 else 'layers'} {_numbers(layers)}"


def _numbers(numbers: tuple[int, ...]) -> str:
    """`29, 30, 31`; `0 to 31` for a long run."""
    if len(numbers) > 4 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _row(console: Console, proof: Proof, verdict: str, number: str) -> None:
    limit = f" ≤{proof.tolerance:.0e}" if proof.tolerance is not None and verdict in ("ok", "BROKEN") else ""
    say(console, f"  law {proof.law:<2}  {verdict:<6}  {proof.claim:<36}  {number}{limit} {proof.kind}".rstrip())
