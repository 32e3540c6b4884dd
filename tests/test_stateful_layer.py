"""The design that fails: fast weights kept on the layer. It began this project, and the laws must catch it."""

from __future__ import annotations

import pytest
from silent_gradients import KeptInAttribute, KeptInParameters, bench_of, wrong
from toy import ToyBackbone

from ttt.adapter import TTTAdapter
from ttt.laws import LawBrokenError
from ttt.laws.checks import purity, remat_invariance


def bench(design):
    return bench_of(design, ToyBackbone(), tokens=14)


@pytest.mark.parametrize("group_size", [0, 1, 2, 16])
def test_it_dies_in_one_nesting_whatever_the_group(group_size):
    """The failure from the field: a different number of tensors saved in recomputation."""
    assert wrong(bench(KeptInAttribute), "non-reentrant", group_size) == "CheckpointError"


@pytest.mark.parametrize("group_size", [0, 1, 2, 16])
def test_it_is_silently_wrong_in_another_whatever_the_group(group_size):
    assert wrong(bench(KeptInAttribute), "reentrant", group_size) > 0.05
    assert wrong(bench(KeptInParameters), "reentrant", group_size) > 0.05
    assert wrong(bench(KeptInParameters), "non-reentrant", group_size) > 0.05


@pytest.mark.parametrize("nesting", ["no checkpoint", "reentrant", "non-reentrant", "non-reentrant twice"])
@pytest.mark.parametrize("group_size", [0, 1, 2, 16])
def test_the_pure_layer_is_right_in_all_of_them(nesting, group_size):
    assert wrong(bench(TTTAdapter), nesting, group_size) < 1e-6


def test_law_2_catches_it():
    with pytest.raises(LawBrokenError, match=r"law 2: at group size 0, .* recomputation differs from the forward pass"):
        remat_invariance(bench(KeptInAttribute))
    with pytest.raises(LawBrokenError, match="law 2"):
        remat_invariance(bench(KeptInParameters))


def test_law_1_catches_it():
    with pytest.raises(LawBrokenError, match="law 1: a forward pass wrote to"):
        purity(bench(KeptInParameters))
    with pytest.raises(LawBrokenError, match="law 1: a second pass over the same tokens gives another"):
        purity(bench(KeptInAttribute))
