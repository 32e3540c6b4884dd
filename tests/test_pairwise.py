"""The cases that stand for a product have every pair of its values; of the kernels' too."""

from __future__ import annotations

import itertools
import random
from typing import Any

import kernels_compared
import pytest
import torch
from kernels_compared import (
    FACTORS,
    LENGTHS,
    Case,
    Problem,
    can_be,
    case_of,
    chosen_cases,
    cost_of,
    differences,
    row_of,
    runs,
)
from pairwise import allowed_rows, covering


def _lacking(rows: list[dict[str, Any]], of: list[dict[str, Any]], strength: int) -> list[object]:
    """Combinations of values that `of` has and `rows` has not, counted without the function that is tested."""
    names = list(of[0])
    return [
        (chosen, values)
        for chosen in itertools.combinations(names, strength)
        for values in {tuple(row[name] for name in chosen) for row in of}
        if not any(all(row[name] == value for name, value in zip(chosen, values, strict=True)) for row in rows)
    ]


@pytest.mark.parametrize("strength", [2, 3])
def test_every_combination_of_any_product_occurs_and_no_row_that_cannot_be(strength: int) -> None:
    draw = random.Random(strength)
    for _ in range(20):
        factors = {name: range(draw.randint(1, 4)) for name in "abcd"}
        refused = {(draw.randrange(4), draw.randrange(4)) for _ in range(3)}
        allowed = lambda row, refused=refused: (row["a"], row["c"]) not in refused  # noqa: E731
        every = allowed_rows(factors, allowed)
        if not every:
            continue
        rows = covering(factors, allowed, lambda row: 1 + row["b"], strength)
        assert all(row in every for row in rows)
        assert len(rows) <= len(every)
        assert _lacking(rows, every, strength) == []
        assert _lacking(rows[:-1], every, strength)  # the last one has brought something


def test_few_rows_stand_for_many_and_cheap_ones_are_taken() -> None:
    factors = {name: range(3) for name in "abcdef"}
    assert len(covering(factors)) <= 18  # of 729; nine at the least
    dear = [row["a"] for row in covering(factors, cost=lambda row: 100 if row["a"] == 2 else 1)]
    assert dear.count(2) <= dear.count(0)


def test_the_kernels_cases_have_every_pair_that_can_be() -> None:
    every = allowed_rows(FACTORS, can_be)
    names = {case_of(row): row for row in every}
    chosen = [names[case] for case in chosen_cases(2)]
    assert _lacking(chosen, every, 2) == []
    assert chosen_cases(2) == chosen_cases(2)
    assert sum(map(cost_of, chosen)) < sum(map(cost_of, every)) / 500
    for name, values in FACTORS.items():  # nothing is refused altogether
        assert {row[name] for row in chosen} == set(values)
    assert {row["tokens"] for row in chosen if row["kind"] == "mlp"} == set(LENGTHS)
    assert all(runs(case_of(row), "cpu") for row in chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_definition_gets_the_numbers_that_the_kernels_get(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise what their inputs lost would count as theirs, and more than that where terms cancel."""
    given: list[list[torch.Tensor]] = []

    def run(self: Problem, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        given.append(self.inputs)
        return {}

    monkeypatch.setattr(Problem, "run", run)
    assert differences(Case("mlp", 64, 16, 17, 3, causal=True, opened=True), "fused", "cpu", dtype) == {}
    assert len(given) == 2
    for inputs in given:
        assert {x.dtype for x in inputs} == {torch.float64}
        assert all(torch.equal(x, x.to(dtype).double()) for x in inputs)
        assert any(not torch.equal(x, x.float().double()) for x in inputs) is (dtype == torch.float64)


@pytest.mark.parametrize(
    ("scale", "single", "told"),
    [(9e-6, True, None), (2e-5, True, 1e-4), (float("nan"), True, 1e-4), (9e-6, False, None)],
)
def test_what_is_too_far_in_float32_is_told_with_how_far_the_definition_is(
    scale: float, single: bool, told: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is too far all the same."""
    far = {"triton": {"answers": 1e-7, "scale": scale}, "reference": {"answers": 1e-7, "scale": 1e-4}}
    monkeypatch.setattr(kernels_compared, "differences", lambda case, which, *where, **against: far[which])
    row = row_of(Case("mlp", 64, 1, 2, 3, causal=True, single=single), "triton", "cpu")
    assert "error" not in row
    assert row["agrees"] is (told is None and single)
    assert row["of"] == "scale"
    assert row.get("definition") == told
