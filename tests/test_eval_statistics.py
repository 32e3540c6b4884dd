"""Means over units, errors over clusters, paired arms: against a bootstrap, against enumeration, and by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import zerospeech_agreement as zerospeech
from hypothesis import given
from hypothesis import strategies as st

from ttt.eval.by_position import Binned, bin_by_position, log_edges, moving_average, over_clusters
from ttt.eval.statistics import Z_95, Estimate, average, draw, estimate, mcnemar, paired_difference

DRAWS = 10_000
Rows = tuple[list[float], list[str], list[str]]
"""Values, units and clusters of items."""


def outcomes(*, clusters: int, pairs: int, seed: int, skill: float = 0.3) -> Rows:
    """Pairs of clips that four voices read: 1, ½ or 0. Pairs of a cluster are alike, and so are voices of a pair."""
    generator = np.random.default_rng(seed)
    rows: Rows = ([], [], [])
    for cluster in range(clusters):
        hard = generator.normal(0, 1)
        for pair in range(1 + generator.integers(pairs)):
            ease = skill + hard + generator.normal(0, 1)
            for _ in range(4):
                margin = round(ease + generator.normal(0, 0.5), 1)
                rows[0].append(0.5 if margin == 0 else float(margin > 0))
                rows[1].append(f"{cluster}/{pair}")
                rows[2].append(str(cluster))
    return rows


def bootstrap(values: Sequence[float], units: Sequence[str], clusters: Sequence[str]) -> float:
    """The spread of the mean of unit means over 10,000 draws of whole clusters, by nothing that `ttt.eval` has."""
    names, cluster_of = sorted(set(units)), dict(zip(units, clusters, strict=True))
    means = np.array([np.mean([v for v, u in zip(values, units, strict=True) if u == name]) for name in names])
    groups = sorted(set(clusters))
    member = np.array([[cluster_of[name] == group for group in groups] for name in names], dtype=float)
    generator = np.random.default_rng(0)
    taken = generator.multinomial(len(groups), [1 / len(groups)] * len(groups), size=DRAWS)
    return float(np.std((taken @ (means @ member)) / (taken @ member.sum(0))))


def naive(values: Sequence[float], *_: object) -> float:
    """The saboteur: every item as if it were independent."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def by_unit(values: Sequence[float], units: Sequence[str], clusters: Sequence[str]) -> float:
    """Another: units as if they were independent, whatever their clusters."""
    return estimate(values, units, units).stderr or math.nan


# --- one arm ---


@pytest.mark.parametrize("pairs", [1, 6])
def test_standard_errors_are_those_of_a_bootstrap(pairs: int) -> None:
    rows = outcomes(clusters=150, pairs=pairs, seed=pairs)
    assert {0.0, 0.5, 1.0} == set(rows[0])
    truth = bootstrap(*rows)
    assert estimate(*rows).stderr == pytest.approx(truth, rel=0.05)
    assert naive(*rows) < 0.7 * truth
    if pairs > 1:
        assert by_unit(*rows) < 0.85 * truth


def test_the_error_of_a_difference_is_that_of_a_bootstrap_and_smaller_than_two_apart() -> None:
    closed = outcomes(clusters=150, pairs=4, seed=1)
    generator = np.random.default_rng(2)
    ttt = [value if generator.random() < 0.8 else 1.0 for value in closed[0]]  # the same items, some of them mended
    difference = paired_difference(ttt, closed[0], *closed[1:])
    each = [a - b for a, b in zip(ttt, closed[0], strict=True)]
    assert difference.stderr == pytest.approx(bootstrap(each, *closed[1:]), rel=0.05)
    apart = math.hypot(*(estimate(arm, *closed[1:]).stderr or math.nan for arm in (ttt, closed[0])))
    assert difference.stderr is not None
    assert difference.stderr < 0.6 * apart


def test_a_mean_by_hand() -> None:
    # unit a: (1 + 0) / 2, unit b: 1, unit c: ½ in the cluster of b; the mean of items would be 0.625
    values, units, clusters = [1.0, 0.0, 1.0, 0.5], ["a", "a", "b", "c"], ["x", "x", "y", "y"]
    found = estimate(values, units, clusters)
    mean = (0.5 + 1 + 0.5) / 3
    deviations = (0.5 - mean) ** 2 + ((1 - mean) + (0.5 - mean)) ** 2
    assert found.mean == pytest.approx(mean)
    assert found.stderr == pytest.approx(math.sqrt(2 / 1 * deviations) / 3)
    assert (found.items, found.units, found.clusters) == (4, 3, 2)


def test_units_that_are_clusters_have_the_familiar_error() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 1.0]
    found = estimate(values, list("abcde"), list("abcde"))
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert found.interval == pytest.approx((0.7 - 1.96 * found.stderr, 0.7 + 1.96 * found.stderr), rel=1e-4)


def test_one_cluster_has_no_error() -> None:
    found = estimate([0.0, 1.0], ["a", "b"], ["x", "x"])
    assert (found.mean, found.stderr, found.interval, found.clusters) == (0.5, None, None, 1)


def test_the_order_of_items_changes_no_digit() -> None:
    generator = random.Random(0)
    items = [(generator.gauss(0, 1), f"u{n // 3}", f"c{n // 9}") for n in range(99)]
    other = [generator.gauss(0, 1) for _ in items]
    found = estimate(*zip(*items, strict=True))
    difference = paired_difference([item[0] for item in items], other, *list(zip(*items, strict=True))[1:])
    for _ in range(20):
        both = list(zip(items, other, strict=True))
        generator.shuffle(both)
        values, units, clusters = zip(*(item for item, _ in both), strict=True)
        assert estimate(values, units, clusters) == found
        assert paired_difference(values, [b for _, b in both], units, clusters) == difference


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 5)), min_size=1, max_size=40))
def test_laws_of_a_mean(items: list[tuple[float, int]]) -> None:
    values, units = [value for value, _ in items], [f"{unit}" for _, unit in items]
    clusters = [f"{unit % 3}" for _, unit in items]
    found = estimate(values, units, clusters)
    assert min(values) <= found.mean <= max(values)
    assert found.units == len(set(units))
    assert found.clusters == len(set(clusters))
    assert (found.stderr is None) == (found.clusters == 1)
    again = estimate(values * 2, units * 2, clusters * 2)  # the same items twice say nothing new
    assert (again.mean, again.stderr) == (found.mean, found.stderr)
    flipped = estimate([1 - value for value in values], units, clusters)
    assert flipped.mean == pytest.approx(1 - found.mean)
    assert (flipped.stderr or 0) == pytest.approx(found.stderr or 0, abs=1e-15)
    nothing = paired_difference(values, values, units, clusters)
    assert (nothing.mean, nothing.stderr or 0) == (0, 0)


@pytest.mark.parametrize(
    ("values", "units", "clusters", "told"),
    [
        ([], [], [], "there are no items"),
        ([1.0], ["a", "b"], ["x"], "1 values, but 2 units"),
        ([1.0, 0.0], ["a", "b"], ["x"], "2 units, but 1 clusters"),
        ([1.0, math.nan], ["a", "b"], ["x", "y"], "item 2 is nan"),
        ([math.inf, 1.0], ["a", "b"], ["x", "y"], "item 1 is inf"),
        ([1.0, 1.0, 0.0], ["a", "b", "a"], ["x", "x", "y"], "unit 'a' lies in two clusters, 'x' and 'y'"),
    ],
)
def test_what_is_no_sample_is_refused(values: list[float], units: list[str], clusters: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        estimate(values, units, clusters)
    with pytest.raises(ValueError, match=told):
        paired_difference(values, [0.0] * len(values), units, clusters)


def test_arms_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one arm has 1 items, the other 2"):
        paired_difference([1.0], [1.0, 0.0], ["a"], ["a"])
    with pytest.raises(ValueError, match="one arm has 2 items, the other 1"):
        mcnemar([1.0, 0.0], [1.0], ["a", "b"])
    with pytest.raises(ValueError, match="item 1 is inf"):
        paired_difference([math.inf], [math.inf], ["a"], ["a"])  # whose difference is not even a number
    with pytest.raises(ValueError, match="item 1 is nan"):
        mcnemar([math.nan], [1.0], ["a"])


# --- ZeroSpeech's own package ---


def test_accuracies_of_pairs_are_those_of_zerospeechs_package() -> None:
    """Its figures for made-up pairs were recorded, since it cannot be installed beside ttt."""
    recorded = json.loads(zerospeech.RECORDED.read_text(encoding="utf-8"))
    assert recorded["versions"]["zerospeech-benchmarks"] == "0.9.4"
    data = zerospeech.made_up()
    figures = zerospeech.ours(data)
    assert {name: len(groups) for name, groups in figures.items()} == {"lexical": 14, "syntactic": 4}
    assert zerospeech.differences(figures, recorded) == []
    assert zerospeech.ours(zerospeech.shuffled(data)) == figures


def test_a_mean_over_items_is_not_that_of_zerospeechs_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_items(values: Sequence[float], units: Sequence[str], clusters: Sequence[str]) -> Estimate:
        return estimate(values, each := [str(number) for number in range(len(values))], each)

    recorded = json.loads(zerospeech.RECORDED.read_text(encoding="utf-8"))
    monkeypatch.setattr(zerospeech, "estimate", of_items)
    wrong = zerospeech.differences(zerospeech.ours(zerospeech.made_up()), recorded)
    assert any(line.startswith("lexical all: score is") for line in wrong)
    assert any(line.startswith("syntactic all: std is") for line in wrong)


# --- McNemar ---


def enumerated(wins: int, losses: int) -> Fraction:
    """The share of all outcomes of fair coins that are at least as uneven, one by one."""
    total, uneven = wins + losses, abs(wins - losses)
    outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=total)]
    return Fraction(sum(abs(2 * heads - total) >= uneven for heads in outcomes), len(outcomes))


@pytest.mark.parametrize(("wins", "losses"), list(itertools.product(range(7), range(6))))
def test_mcnemar_counts_as_an_enumeration_does(wins: int, losses: int) -> None:
    a = [1.0] * wins + [0.0] * losses + [0.5, 1.0]
    b = [0.0] * wins + [1.0] * losses + [0.5, 1.0]
    found = mcnemar(a, b, [str(number) for number in range(len(a))])
    assert (found.wins, found.losses, found.ties) == (wins, losses, 2)
    assert found.p == float(enumerated(wins, losses))


def test_mcnemar_is_scipys_binomial_test() -> None:
    from scipy.special import bdtr  # the binomial distribution, by the incomplete beta function

    for wins, losses in [(0, 0), (1, 0), (8, 2), (40, 71), (100, 99), (900, 1100), (0, 1000)]:
        units = [str(number) for number in range(wins + losses + 1)]
        found = mcnemar([1.0] * wins + [0.0] * (losses + 1), [0.0] * wins + [1.0] * losses + [0.0], units)
        expected = min(1.0, 2 * bdtr(min(wins, losses), wins + losses, 0.5))
        assert found.p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_counts_units_and_not_their_items() -> None:
    a = [1.0, 1.0, 1.0, 0.0, 0.5, 0.5, 1.0, 0.0]
    b = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    units = list("aaaabbcc")
    found = mcnemar(a, b, units)  # a wins its unit once, b and c are ties over their items
    assert (found.wins, found.losses, found.ties, found.p) == (1, 0, 2, 1.0)
    assert mcnemar(a, b, list("abcdefgh")).wins == 5  # items as if they were independent


# --- the average of tasks ---


def test_an_average_needs_every_task() -> None:
    one, two = Estimate(0.6, 0.03, 40, 10, 10), Estimate(0.5, 0.04, 8, 8, 4)
    found = average([one, two])
    assert found is not None
    assert found.mean == pytest.approx(0.55)
    assert found.stderr == pytest.approx(0.025)
    assert (found.items, found.units, found.clusters) == (48, 18, 14)
    assert average([one, None]) is average([None]) is average([]) is None
    unknown = average([one, Estimate(0.5, None, 2, 2, 1)])
    assert unknown is not None
    assert (unknown.mean, unknown.stderr) == (pytest.approx(0.55), None)
    assert average([one]) == one


def test_the_error_of_an_average_is_that_of_simulated_tasks() -> None:
    generator = np.random.default_rng(3)
    tasks = generator.random((4000, 3, 20)) < np.array([0.5, 0.6, 0.8])[:, None]
    spread = float(np.std(tasks.mean(2).mean(1)))
    names = [str(n) for n in range(20)]
    found = [average([estimate(t.astype(float).tolist(), names, names) for t in run]) for run in tasks[:300]]
    errors = [one.stderr for one in found if one is not None and one.stderr is not None]
    assert float(np.mean(errors)) == pytest.approx(spread, rel=0.05)


# --- what a limit draws ---


def test_a_draw_is_the_same_in_any_order_and_process() -> None:
    units = [f"pair-{number}" for number in range(200)]
    drawn = draw(units, 20, seed=1)
    assert len(drawn) == 20
    assert drawn == draw(list(reversed(units)), 20, seed=1) == draw(set(units), 20, seed=1) == draw(units * 4, 20, 1)
    assert drawn != draw(units, 20, seed=2)
    assert drawn < draw(units, 21, seed=1)
    assert draw(units[1:], 20, seed=1) >= drawn - {units[0]}
    program = "from ttt.eval.statistics import draw; print(sorted(draw([f'pair-{n}' for n in range(200)], 20, 1)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(sorted(drawn))


def test_a_draw_is_the_one_that_it_was() -> None:
    """What was evaluated with `--limit` stays comparable."""
    assert draw(list("abcdefghij"), 3, seed=0) == {"f", "g", "h"}


def test_every_unit_is_drawn_as_often_as_any_other() -> None:
    units = [f"{number:03d}" for number in range(10)]
    counts = dict.fromkeys(units, 0)
    for seed in range(2000):
        for unit in draw(units, 3, seed):
            counts[unit] += 1
    assert all(abs(count - 600) < 5 * math.sqrt(600 * 0.7) for count in counts.values())


def test_a_limit_that_is_none_or_more_draws_all() -> None:
    assert draw(["a", "b"], None, 0) == draw(["a", "b", "b"], 2, 0) == draw(["b", "a"], 99, 0) == {"a", "b"}
    assert draw([], 3, 0) == set()
    assert len(draw(["\udcff", "b"], 1, 0)) == 1  # a file's name that is no UTF-8
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"a limit of {limit} leaves nothing"):
            draw(["a"], limit, 0)


# --- by position ---


@given(st.integers(1, 200_000), st.integers(1, 8))
def test_edges_hold_every_position_once_and_depend_on_no_length(length: int, per_octave: int) -> None:
    edges = log_edges(length, per_octave)
    assert edges[0] == 1
    assert edges[-2] <= length < edges[-1]
    assert (np.diff(edges) > 0).all()
    assert list(edges) == list(log_edges(300_000, per_octave)[: len(edges)])


def test_bins_by_hand() -> None:
    edges = log_edges(6, per_octave=1)
    assert list(edges) == [1, 2, 4, 8]
    values = [[1.0, 2.0, 4.0, math.nan, 8.0, 9.0], [3.0, 2.0, 0.0, 5.0, 7.0, 9.0]]
    mask = [[True, True, True, False, True, True], [True, False, False, True, True, True]]
    found = bin_by_position(values, mask, edges)
    assert list(found.counts) == [2, 2, 5]
    assert list(found.means) == [2.0, 3.0, 38 / 5]
    assert list(found.centres) == pytest.approx([1.0, math.sqrt(6), math.sqrt(28)])


def test_pieces_of_a_stream_are_binned_as_the_whole() -> None:
    generator = np.random.default_rng(0)
    values, mask = generator.integers(0, 9, (2, 500)), generator.random((2, 500)) < 0.9
    edges = log_edges(500)
    whole = bin_by_position(values, mask, edges)
    for size in (1, 7, 188):
        pieces = Binned(edges, np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, dtype=np.int64))
        for start in range(0, 500, size):
            cut = slice(start, start + size)
            pieces += bin_by_position(values[:, cut], mask[:, cut], edges, first=start + 1)
        assert list(pieces.sums) == list(whole.sums)
        assert list(pieces.counts) == list(whole.counts)
    shifted = bin_by_position(values, mask, log_edges(501), first=2)
    assert list(shifted.sums) != list(whole.sums)


def test_a_bin_with_nothing_in_it_has_no_mean() -> None:
    found = bin_by_position([1.0, 1.0], [False, True], log_edges(2))
    assert math.isnan(found.means[0])
    assert found.means[1] == 1


def test_what_cannot_be_binned_is_refused() -> None:
    edges = log_edges(4)
    with pytest.raises(ValueError, match="position 2 is not finite"):
        bin_by_position([1.0, math.nan], None, edges)
    with pytest.raises(ValueError, match="positions 1 to 6 do not lie between the edges 1 and 6"):
        bin_by_position([1.0] * 6, None, edges)
    with pytest.raises(ValueError, match="positions 0 to 0"):
        bin_by_position([1.0], None, edges, first=0)
    with pytest.raises(ValueError, match=r"values are \[2\], their mask \[1\]"):
        bin_by_position([1.0, 2.0], [True], edges)
    with pytest.raises(ValueError, match="different edges"):
        bin_by_position([1.0], None, edges) + bin_by_position([1.0], None, log_edges(4, 1))
    for length, per_octave in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="both must be 1 or more"):
            log_edges(length, per_octave)


def test_the_band_over_books() -> None:
    curves = [[1.0, 5.0, math.nan], [3.0, 5.0, 2.0], [2.0, math.nan, math.nan]]
    first, second, third = over_clusters(curves, ["a", "a", "b"])
    assert first == estimate([1.0, 3.0, 2.0], ["0", "1", "2"], ["a", "a", "b"])
    assert second == Estimate(5.0, None, 2, 2, 1)  # one book says nothing about the next
    assert third == Estimate(2.0, None, 1, 1, 1)
    assert over_clusters([[math.nan]], ["a"]) == [None]
    for wrong in ([], [[1.0], [2.0]]):
        with pytest.raises(ValueError, match="a row for each cluster"):
            over_clusters(wrong, ["a"])


def test_a_moving_average_looks_back() -> None:
    assert list(moving_average([1.0, 2.0, 3.0, 7.0], 2)) == [1.0, 1.5, 2.5, 5.0]
    assert list(moving_average(np.arange(12.0))[-2:]) == [5.5, 6.5]  # of 1 to 10 and 2 to 11
    rows = moving_average([[1.0, math.nan, math.nan, 4.0], [0.0, 0.0, 1.0, 1.0]], 2)
    assert list(rows[0][:2]) == [1.0, 1.0]
    assert math.isnan(rows[0][2])
    assert rows[0][3] == 4.0
    assert list(rows[1]) == [0.0, 0.0, 0.5, 1.0]
    assert moving_average([], 3).shape == (0,)
    values = np.random.default_rng(0).normal(size=200_000) + 1e6
    assert moving_average(values, 10)[-1] == pytest.approx(values[-10:].mean(), rel=1e-15)  # no running sum drifts
    with pytest.raises(ValueError, match="a window of 0 positions"):
        moving_average([1.0], 0)


def test_the_interval_holds_95_in_100() -> None:
    assert math.erf(Z_95 / math.sqrt(2)) == pytest.approx(0.95, abs=1e-15)
