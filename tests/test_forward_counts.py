"""How often an inner step runs forward in a training step: counted on the running model, against the closed form."""

from __future__ import annotations

import warnings

import pytest
from toy import ToyBackbone

from ttt.config import TTTConfig
from ttt.config.estimate import scan_cost
from ttt.errors import NestedCheckpointWarning
from ttt.laws import Bench
from ttt.laws.checks import NESTINGS
from ttt.ops import minibatch
from ttt.plugins import get_backbone

SIZE = 4
LAYERS = 2


def count_steps(monkeypatch, bench, *, group_size, inside_own, wrappers=()):
    """Mini-batch steps of one forward and backward pass: of the scan, and beside it, for one layer."""
    injection = bench.injected(scan_checkpoint_group_size=group_size, layers=tuple(range(LAYERS)))
    bench.checkpointed(injection.model, inside_own)
    batch = bench.batch(injection.model)
    found = {"scan": 0, "beside": 0}
    for name in ("linear_minibatch", "mlp_minibatch"):
        original = getattr(minibatch, name)

        def counted(weights, gradients, q, *others, original=original, **keywords):
            found["scan" if q.shape[2] == SIZE else "beside"] += 1
            return original(weights, gradients, q, *others, **keywords)

        monkeypatch.setattr(minibatch, name, counted)
    with bench.wrapped(injection, wrappers):
        bench.gradients(injection.model, batch)
    monkeypatch.undo()
    return {where: count / LAYERS for where, count in found.items()}


def runs(group_size, levels):
    """The closed form for 16 tokens: 1, 1 for every checkpoint around, 1 where groups are checkpointed inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NestedCheckpointWarning)
        config = TTTConfig(mini_batch_size=SIZE, scan_checkpoint_group_size=group_size)
    cost = scan_cost(config, dim=16, num_heads=2, tokens=16, batch_size=3)
    assert cost.steps == 4
    return cost.forwards(enclosing=levels)


@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
@pytest.mark.parametrize("inside_own", [False, True])
@pytest.mark.parametrize("group_size", [0, 1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("tokens", [16, 18])
def test_in_the_backbones_own_checkpointing(monkeypatch, layer_type, inside_own, group_size, tokens):
    bench = Bench(ToyBackbone(), ttt={"layer_type": layer_type, "mini_batch_size": SIZE}, tokens=tokens)
    found = count_steps(monkeypatch, bench, group_size=group_size, inside_own=inside_own)
    assert found["scan"] == 4 * runs(group_size, inside_own)
    assert found["beside"] == (tokens > 16) * (1 + inside_own)  # the open mini-batch is in no group


@pytest.mark.parametrize(
    ("nesting", "levels"),
    [
        ("reentrant", 1),
        ("non-reentrant", 1),
        ("reentrant in non-reentrant", 2),
        # Right around another of its kind it recomputes the other's input, which is its own, and stops early there.
        ("non-reentrant twice", 1),
    ],
)
@pytest.mark.parametrize("inside_own", [False, True])
@pytest.mark.parametrize("group_size", [0, 1, 2, 16])
def test_every_level_of_nesting_is_one_more(monkeypatch, nesting, levels, inside_own, group_size):
    bench = Bench(ToyBackbone(), ttt={"mini_batch_size": SIZE}, tokens=16)
    found = count_steps(monkeypatch, bench, group_size=group_size, inside_own=inside_own, wrappers=NESTINGS[nesting])
    assert found == {"scan": 4 * runs(group_size, levels + inside_own), "beside": 0}


@pytest.mark.parametrize(
    ("group_size", "gradient_checkpointing", "times"), [(0, False, 1), (0, True, 2), (2, False, 2), (2, True, 3)]
)
def test_moshi_runs_as_often(monkeypatch, group_size, gradient_checkpointing, times):
    bench = Bench(get_backbone("moshi"), ttt={"layer_type": "mlp", "mini_batch_size": SIZE}, tokens=16)
    found = count_steps(monkeypatch, bench, group_size=group_size, inside_own=gradient_checkpointing)
    assert found == {"scan": 4 * times, "beside": 0}
