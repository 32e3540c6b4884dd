"""The laws that a probe tries, in order, and how it tries them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ttt.check.probe.setting import STREAMED, Setting, fewest, tokens_in
from ttt.laws import Bench, checks
from ttt.plugins import Streaming, has_capability

_PIECES = 400
"""Most pieces that a stream is fed in."""


@dataclass(frozen=True)
class Proof:
    """A law, what it claims, and how it is tried."""

    law: int
    claim: str
    kind: str
    """The dtype that it is tried in."""
    tolerance: float | None
    """Largest measured number that passes; None if only 0 passes, or if the number must not be 0."""
    run: Callable[[], Mapping[str, float]]
    applies: str = ""
    """Why it is not tried; empty if it is."""
    compares_passes: bool = False
    """Whether it compares passes of one adapted model. That means nothing if a pass changes the next one (law 1)."""


def proofs(setting: Setting) -> list[Proof]:
    """The laws to try for a setting, in order."""
    bench = setting.bench
    own = str(bench.dtype).removeprefix("torch.")
    return [
        Proof(1, "a pass writes nothing, and repeats", own, None, lambda: checks.purity(bench)),
        *_recomputation(setting, own),
        *_streams(setting),
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


def _recomputation(setting: Setting, own: str) -> Iterator[Proof]:
    """Law 2 in float32, and in the type of the config's parameters, whose name is `own`, if that is another."""

    def remat(of: Bench) -> Mapping[str, float]:
        return checks.remat_invariance(
            of,
            group_sizes=(setting.group_size,),
            nestings={"no other checkpoint": ()},
            inside_own=(setting.bench.gradient_checkpointing,),
        )

    bench, exact, claim = setting.bench, setting.exact, "recomputing changes no gradient"
    yield Proof(2, claim, "float32", exact.tolerance, lambda: remat(exact))
    if bench.dtype is not torch.float32:
        yield Proof(2, claim, own, bench.tolerance, lambda: remat(bench))


def _streams(setting: Setting) -> Iterator[Proof]:
    """Laws 3, 4 and 5: what tokens and rows may not see of each other."""
    exact, short, config, backbone = setting.exact, setting.short, setting.config, setting.bench.backbone
    size = config.mini_batch_size

    def streamed() -> Mapping[str, float]:
        measured: dict[str, float] = {}
        for layers, length in ((True, size), (False, min(size, STREAMED))):
            of = replace(short, tokens=tokens_in(fewest(length), length))
            pieces = cuts(of.tokens, length, unit=1 if config.causal else length, at_most=_PIECES)
            measured |= checks.chunk_invariance(
                of, mini_batch_sizes=(length,), cuts=pieces, layers=layers, model=not layers
            )
        return measured

    fed = "stream" if has_capability(backbone, Streaming) else "layer"
    pieces = "token by token" if config.causal else "in mini-batches"
    yield Proof(
        3,
        "no token changes an earlier output",
        "float32",
        exact.tolerance,
        lambda: checks.causality(exact, tokens=_telling_tokens(exact.tokens, size, setting.group_size)),
        "" if backbone.causal else f"{backbone.name} is not causal",
        compares_passes=True,
    )
    yield Proof(4, f"a {fed} {pieces} is the whole", "float32", short.tolerance, streamed, compares_passes=True)
    yield Proof(
        5,
        "rows are independent",
        "float32",
        exact.tolerance,
        lambda: checks.stream_independence(exact),
        compares_passes=True,
    )


def cuts(tokens: int, size: int, *, unit: int, at_most: int) -> list[list[int]]:
    """Two ways to cut a sequence into pieces, as lists of lengths: as fine as `at_most` allows, and unevenly.

    Args:
        tokens: length of the sequence.
        size: tokens in a mini-batch.
        unit: length of the smallest piece in tokens: 1, or a whole mini-batch if mini-batches are not causal.
        at_most: most pieces. If single tokens would be more, tokens near the boundaries of mini-batches are single
            pieces, and those between are in longer ones.
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


def _telling_tokens(tokens: int, size: int, group_size: int) -> list[int]:
    """Tokens that would show a leak: inside a mini-batch, at boundaries of mini-batches and of groups, at the end."""
    places = {1, size // 2, size - 1, size, size + 1, size + size // 2, 2 * size - 1}
    places |= {group_size * size - 1, group_size * size, group_size * size + 1, tokens - 1}
    return sorted(place for place in places if 0 < place < tokens)
