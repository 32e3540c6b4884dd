"""How often an inner step runs forward in a training step: counted on the running model, against the closed form."""

from __future__ import annotations

import pytest
from toy import ToyBackbone, TwoWayToy

from ttt.check import check_config
from ttt.check.estimate import enclosing_checkpoints
from ttt.config import TTTConfig
from ttt.costs import scan_cost
from ttt.laws import Bench
from ttt.laws.checks import NESTINGS
from ttt.ops import minibatch
from ttt.ops.fused import operator
from ttt.plugins import get_backbone

SIZE = 4
LAYERS = 2


def count_steps(monkeypatch, bench, *, group_size, inside_own, wrappers=()):
    """Mini-batch steps of one forward and backward pass: of the scan, and beside it, for one layer."""
    injection = bench.injected(scan_checkpoint_group_size=group_size, layers=tuple(range(LAYERS)))
    bench.checkpointed(injection.model, inside_own)
    batch = bench.batch(injection.model)
    found = {"scan": 0, "beside": 0}
    chunk = operator.forward_chunk

    def counted_chunk(common, views, *others, **keywords):
        found["scan" if common.closes else "beside"] += views.steps
        return chunk(common, views, *others, **keywords)

    monkeypatch.setattr(operator, "forward_chunk", counted_chunk)
    original = minibatch.mlp_minibatch  # mini-batches that are open on either side, where small

    def counted(*arguments, **keywords):
        found["beside"] += 1
        return original(*arguments, **keywords)

    monkeypatch.setattr(minibatch, "mlp_minibatch", counted)
    with bench.wrapped(injection, wrappers):
        bench.gradients(injection.model, batch)
    monkeypatch.undo()
    return {where: count / LAYERS for where, count in found.items()}


def runs(group_size, levels):
    """The closed form for 16 tokens: 1, 1 for every checkpoint around, 1 where groups are checkpointed inside."""
    config = TTTConfig.model_validate({"mini_batch_size": SIZE, "scan_checkpoint_group_size": group_size})
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


TWO_WAY = TwoWayToy()


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("group_size", [0, 2])
def test_a_layer_that_scans_twice_runs_as_its_facts_say(monkeypatch, group_size, forward, reverse, around):
    options = {"name": "twoway", "recompute_forward": forward, "recompute_reverse": reverse}
    settings = {"layer_type": "linear", "mini_batch_size": SIZE}
    text = f"{{backbone: {options}, train: {{gradient_checkpointing: {around}}}}}"
    config = check_config(
        "c.yaml", text=text.replace("True", "true").replace("False", "false"), backbone=TWO_WAY
    ).config
    scans = enclosing_checkpoints(config, TWO_WAY.facts(config))
    assert len(scans) == 2
    bench = Bench(TWO_WAY, options=TWO_WAY.tiny_like(config.backbone), ttt=settings, tokens=16)
    found = count_steps(monkeypatch, bench, group_size=group_size, inside_own=around)
    assert found == {"scan": 4 * sum(runs(group_size, level) for level in scans), "beside": 0}


def test_what_is_said_of_two_scans_is_what_they_run():
    def message(backbone="", **sections):
        text = f"backbone: {{name: twoway, {backbone}}}\nttt: {{scan_checkpoint_group_size: 2}}\n"
        text += "".join(f"{name}: {{{keys}}}\n" for name, keys in sections.items())
        found = check_config("c.yaml", text=text, backbone=TWO_WAY).findings
        return [(finding.code, finding.path, finding.message, finding.fix) for finding in found]

    assert message() == []
    ((code, path, told, fix),) = message(train="gradient_checkpointing: true")
    assert (code, path) == ("TTT202", "train.gradient_checkpointing")
    assert "every inner step runs forward 3 times in a layer's 2 scans, once more for each level" in told
    assert "(then it runs twice)" in fix
    ((_, path, told, fix),) = message("recompute_reverse: true")
    assert path == "ttt.scan_checkpoint_group_size"
    assert "every inner step runs forward 2 and 3 times in a layer's 2 scans" in told
    assert "(then it runs 1 and 2 times)" in fix
    ((_, _, told, _),) = message("recompute_reverse: true", train="gradient_checkpointing: true")
    assert "3 and 4 times" in told
