"""Means of units, standard errors over clusters, and paired comparisons of two arms.

An *item* is what one number is of, such as a pair of clips of one voice. Items of the same *unit* (a word over its
voices) are averaged first. A *cluster* holds units that are not independent of each other, such as the chapters of a
book; most often each unit is a cluster of its own. With `m_u` the mean of unit u, over U units in G clusters:

    mean   = Σ_u m_u / U
    stderr = sqrt( G/(G−1) · Σ_g ( Σ_{u in g} (m_u − mean) )² ) / U

This is the cluster-robust ("sandwich") error of a mean with its usual correction for few clusters (Cameron & Miller
2015, "A practitioner's guide to cluster-robust inference"; Miller 2024, "Adding error bars to evals",
arXiv:2411.00640). If every unit is a cluster of its own, it is the familiar `sd(m) / sqrt(U)`.

Sums are exact (`math.fsum`), so no order of the items changes a digit. This module imports no torch and no numpy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution: 95 % lie within so many standard errors."""
MCNEMAR_BELOW = 200
"""McNemar's exact test is reported for fewer units than this; with more of them the standard error says the same."""


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far it can be trusted."""

    mean: float
    """Of unit means."""
    stderr: float | None
    """Its standard error; None if there is one cluster, which says nothing about the next."""
    items: int
    """How many numbers it was made from."""
    units: int
    """How many unit means it is the mean of."""
    clusters: int
    """How many independent groups these units form."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The normal 95 % confidence interval, `mean ± 1.96 stderr`; None if the error is unknown.

        It is not cut at 0 and 1. If all units agree, it has no width, however few they are: read it with their number.
        """
        if self.stderr is None:
            return None
        return self.mean - Z_95 * self.stderr, self.mean + Z_95 * self.stderr


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test of two arms on the same units."""

    wins: int
    """Units in which the first arm is better."""
    losses: int
    """Units in which the second arm is better."""
    ties: int
    """Units in which both are equal. The test does not use them."""
    p: float
    """Two-sided: how probable so uneven a split is, if neither arm is better; 1 if there are only ties."""


def estimate(values: Sequence[float], units: Sequence[str], clusters: Sequence[str]) -> Estimate:
    """The mean over units of the means over their items, with its standard error clustered.

    Args:
        values: a finite number for each item.
        units: for each item its unit.
        clusters: for each item the cluster of its unit.

    Raises:
        ValueError: there are no items; the three differ in length; a value is not finite; a unit lies in two clusters.
    """
    means = unit_means(values, units)
    home = _clusters_of(units, clusters)
    mean = _mean(list(means.values()))
    deviations: dict[str, list[float]] = {}
    for unit, value in means.items():
        deviations.setdefault(home[unit], []).append(value - mean)
    return Estimate(mean, _clustered(list(deviations.values())), len(values), len(means), len(deviations))


def paired_difference(
    a: Sequence[float], b: Sequence[float], units: Sequence[str], clusters: Sequence[str]
) -> Estimate:
    """How much larger `a` is than `b`, item by item, with the error of this difference.

    What both arms find hard cancels, so that the error is smaller than that of two separate means (Miller 2024, 4.2).

    Args:
        a: the first arm's number for each item.
        b: the second arm's, of the same items in the same order.
        units: as for `estimate`.
        clusters: as for `estimate`.

    Raises:
        ValueError: as for `estimate`.
    """
    _require_finite(a)
    _require_finite(b)
    return estimate([first - second for first, second in _paired(a, b)], units, clusters)


def mcnemar(a: Sequence[float], b: Sequence[float], units: Sequence[str]) -> McNemar:
    """McNemar's exact test (McNemar 1947): of the units that differ, does one arm win more than chance would give it?

    A unit is won by the arm with the higher mean over its items. With w wins and l losses, n = w + l:

        p = min(1, 2 · Σ_{k ≤ min(w, l)} C(n, k) / 2^n)

    Units must be independent of each other: give clusters as units if they hold several.

    Args:
        a: the first arm's number for each item.
        b: the second arm's, of the same items in the same order.
        units: for each item its unit.

    Raises:
        ValueError: there are no items; the three differ in length; a value is not finite.
    """
    pairs = _paired(a, b)
    first = unit_means([pair[0] for pair in pairs], units)
    second = unit_means([pair[1] for pair in pairs], units)
    wins = sum(first[unit] > second[unit] for unit in first)
    losses = sum(first[unit] < second[unit] for unit in first)
    return McNemar(wins, losses, len(first) - wins - losses, _two_sided(wins, losses))


def average(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """The plain average of tasks, or of their paired differences; None if one of them is missing, or there are none.

    Tasks have no item in common, so that their errors are independent: `sqrt(Σ stderr²) / k`. The error is unknown if
    that of one task is.
    """
    present = [one for one in estimates if one is not None]
    if not present or len(present) < len(estimates):
        return None
    errors = [one.stderr for one in present if one.stderr is not None]
    return Estimate(
        mean=_mean([one.mean for one in present]),
        stderr=math.hypot(*errors) / len(present) if len(errors) == len(present) else None,
        items=sum(one.items for one in present),
        units=sum(one.units for one in present),
        clusters=sum(one.clusters for one in present),
    )


def draw(units: Collection[str], limit: int | None, seed: int) -> frozenset[str]:
    """Draw `limit` of the units, the same ones on every machine and whatever order they come in.

    Units are ranked by the SHA-256 of seed and unit, so that a larger limit keeps what a smaller one drew, and a unit
    that is added or taken away changes at most one of the others.

    Args:
        units: their names; one that stands there twice counts once.
        limit: how many to draw; None is all of them, as is a number that is no smaller than theirs.
        seed: another one draws others.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} leaves nothing to evaluate; draw 1 or more")
    return frozenset(sorted(set(units), key=lambda unit: (_rank(unit, seed), unit))[:limit])


def unit_means(values: Sequence[float], units: Sequence[str]) -> dict[str, float]:
    """The mean of each unit over its items, units in the order in which they first come.

    Raises:
        ValueError: there are no items; the two differ in length; a value is not finite.
    """
    if len(values) != len(units):
        raise ValueError(f"there are {len(values)} values, but {len(units)} units; give one for each item")
    if not values:
        raise ValueError("there are no items, so there is no mean")
    _require_finite(values)
    grouped: dict[str, list[float]] = {}
    for value, unit in zip(values, units, strict=True):
        grouped.setdefault(unit, []).append(float(value))
    return {unit: _mean(group) for unit, group in grouped.items()}


def _clusters_of(units: Sequence[str], clusters: Sequence[str]) -> dict[str, str]:
    """The cluster of each unit."""
    if len(units) != len(clusters):
        raise ValueError(f"there are {len(units)} units, but {len(clusters)} clusters; give one for each item")
    home: dict[str, str] = {}
    for unit, cluster in zip(units, clusters, strict=True):
        if home.setdefault(unit, cluster) != cluster:
            raise ValueError(f"unit {unit!r} lies in two clusters, {home[unit]!r} and {cluster!r}; it can be in one")
    return home


def _clustered(deviations: Sequence[Sequence[float]]) -> float | None:
    """The standard error from each cluster's deviations from the mean; None for one cluster."""
    groups, units = len(deviations), sum(map(len, deviations))
    if groups < 2:
        return None
    sums = [math.fsum(group) for group in deviations]
    return math.hypot(*sorted(sums)) * math.sqrt(groups / (groups - 1)) / units


def _paired(a: Sequence[float], b: Sequence[float]) -> list[tuple[float, float]]:
    if len(a) != len(b):
        raise ValueError(f"one arm has {len(a)} items, the other {len(b)}; compare them on the same items")
    return list(zip(a, b, strict=True))


def _require_finite(values: Sequence[float]) -> None:
    for number, value in enumerate(values, 1):
        if not math.isfinite(value):
            raise ValueError(f"the value of item {number} is {value}; leave out an item that failed, and count it")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _two_sided(wins: int, losses: int) -> float:
    """The probability of a split at least as uneven, in whole numbers but for the last division."""
    total, term, tail = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


def _rank(unit: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{unit}".encode("utf-8", "surrogatepass")).digest()
