"""The probe: clean on what ships, and the right code on layers that break a law."""

from __future__ import annotations

import dataclasses
import importlib
import io
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from silent_gradients import KeptInAttribute, KeptInParameters
from torch import Tensor
from toy import BlockWithTTT, Cache, ToyBackbone, TwoWayAdapter, TwoWayBlockWithTTT, TwoWayToy

from ttt.adapter import Gate, TTTAdapter
from ttt.check import load_config
from ttt.check.catalogue import DECLARED
from ttt.check.probe import cuts, place_layers, probe, small_setting
from ttt.check.probe_codes import LAWS
from ttt.config.explanation import read_explanations
from ttt.config.findings import Family
from ttt.laws import Bench, checks
from ttt.layer import Rotary, TTTLayer
from ttt.ops.rows import Tokens
from ttt.plugins import get_backbone
from ttt.state import TTTState

SMALL = ["ttt.mini_batch_size=4", "ttt.scan_checkpoint_group_size=2", "ttt.layers=all"]


def probed(backbone, *overrides, preset="demo"):
    """Findings and what was printed."""
    config = load_config(None, text=backbone.presets()[preset], backbone=backbone, overrides=list(overrides)).config
    out = io.StringIO()
    findings = probe(config, backbone, console=Console(file=out, width=80))
    return findings, out.getvalue()


# --- what ships ---


@pytest.mark.parametrize("preset", ["demo", "7b"])
def test_the_shipped_configs_hold_every_law(preset):
    without_files = ["data.train_data=null", *["backbone.random_weights=true"] * (preset == "7b")]
    findings, printed = probed(get_backbone("moshi"), *without_files, preset=preset)
    assert findings == []
    laws = [int(number) for number in re.findall(r"^  law (\d+) +ok ", printed, re.MULTILINE)]
    assert sorted(set(laws)) == [1, 2, 3, 4, 5, 6, 10]
    assert "every law holds" in printed
    assert max(map(len, printed.splitlines())) <= 80
    if preset == "7b":
        assert "layers 29, 30, 31 of 32 stand as 0, 1, 2 of 3" in printed
        assert "inside the backbone's own activation checkpointing" in printed
        assert laws.count(2) == 2  # in float32, and in the config's own bfloat16
    assert "2 checkpoint groups of 16" in printed


@pytest.mark.parametrize(
    "overrides",
    [
        ["ttt.mini_batch_size=1"],
        ["ttt.scan_checkpoint_group_size=0"],
        ["ttt.scan_checkpoint_group_size=1", "train.gradient_checkpointing=true"],
        ["ttt.layer_type=mlp", "ttt.mlp_hidden_dims=[40]"],
        ["ttt.num_heads=8"],
        ["ttt.initial_gating_alpha=0.0"],
        ["train.param_dtype=bfloat16"],
    ],
    ids=" ".join,
)
def test_every_setting_can_be_probed(overrides):
    findings, printed = probed(ToyBackbone(), *SMALL, *overrides)
    assert findings == []
    assert "every law holds" in printed


def test_a_mini_batch_longer_than_what_a_backbone_remembers_can_be_probed(monkeypatch):
    for name in ("proofs", "setting"):
        monkeypatch.setattr(importlib.import_module(f"ttt.check.probe.{name}"), "STREAMED", 20)
    overrides = "ttt.mini_batch_size=21", "ttt.layer_type=linear", "ttt.layers=[1]"
    cut, streamed = checks.chunk_invariance, []

    def spied(of: Bench, *, mini_batch_sizes: tuple[int, ...], model: bool, **more: Any) -> Mapping[str, float]:
        streamed.append((model, mini_batch_sizes, of.tokens >= 2 * mini_batch_sizes[0]))
        return cut(of, mini_batch_sizes=mini_batch_sizes, model=model, **more)

    monkeypatch.setattr(checks, "chunk_invariance", spied)
    findings, printed = probed(get_backbone("moshi"), *overrides)
    assert findings == []
    assert streamed == [(False, (21,), True), (True, (20,), True)]
    assert "the whole model streams in mini-batches of 20, each layer in those of 21" in printed


@pytest.mark.parametrize(
    "overrides",
    [
        ["ttt.layer_type=mlp", "ttt.base_lr=0.1"],
        ["backbone.recompute_forward=true", "train.gradient_checkpointing=true"],
        ["backbone.recompute_forward=true", "backbone.recompute_reverse=true", "train.param_dtype=bfloat16"],
        ["ttt.rope=none", "ttt.mini_batch_size=64", "ttt.scan_checkpoint_group_size=0"],
    ],
    ids=" ".join,
)
def test_a_bidirectional_backbone_holds_every_law_that_is_one_for_it(overrides):
    findings, printed = probed(TwoWayToy(), *SMALL, *overrides)
    assert findings == []
    assert "law 3   --      no token changes an earlier output    twoway is not causal" in printed
    assert "a layer in mini-batches is the whole" in printed
    laws = [int(number) for number in re.findall(r"^  law (\d+) +ok ", printed, re.MULTILINE)]
    assert sorted(set(laws)) == [1, 2, 4, 5, 6, 10]


def test_what_the_options_recompute_is_probed_too():
    class Drifting(TwoWayAdapter):
        """What it reads in reverse is another thing while backward runs it again."""

        def read(self, x, reverse):
            again = torch._C._current_graph_task_id() != -1
            return super().read(x * (1.1 if again and reverse else 1), reverse)

    backbone = type("Saboteur", (TwoWayToy,), {"adapter": Drifting})()
    assert not probed(backbone, *SMALL)[0]
    findings, _ = probed(backbone, *SMALL, "backbone.recompute_reverse=true")
    assert "TTT902" in [finding.code for finding in findings]


def test_a_bidirectional_layer_that_is_not_reached_is_found():
    class Skipping(TwoWayBlockWithTTT):
        def after_attention(self, x, cache):
            return x

    backbone = type("Saboteur", (TwoWayToy,), {"adapted": Skipping})()
    assert "TTT910" in [finding.code for finding in probed(backbone, *SMALL)[0]]


def test_a_config_without_layers_has_nothing_to_prove():
    findings, printed = probed(ToyBackbone(), "ttt.layers=none", "train.trainable=all")
    assert findings == []
    assert "nothing to prove" in printed
    assert "holds" not in printed


# --- saboteurs ---


class Sabotaged(ToyBackbone):
    """The toy with another adapter, or another block."""

    adapter: ClassVar[type[TTTAdapter]] = TTTAdapter
    block: ClassVar[type[BlockWithTTT]] = BlockWithTTT

    def sites(self, model):
        return [dataclasses.replace(site, adapter=self.adapter, subclass=self.block) for site in super().sites(model)]


def sabotaged(**parts: Any) -> Sabotaged:
    return type("Saboteur", (Sabotaged,), parts)()


def with_layer(layer: type[TTTLayer]) -> Sabotaged:
    """The toy with another TTT layer in its adapters."""

    class Adapter(TTTAdapter):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            self.layer.__class__ = layer

    return sabotaged(adapter=Adapter)


class KeptWithGraph(TTTAdapter):
    """Fast weights kept with the graph that made them, as a module's attribute."""

    fast: TTTState | None = None

    def forward(self, x: Tensor, *, rotary: Rotary | None = None) -> Tensor:
        out, self.fast = self.adapt(x, self.fast, rotary=rotary)
        return out


class NonCausal(TTTLayer):
    """The inner update of a whole mini-batch for each of its tokens."""

    def _inner(self, dtype):
        return super()._inner(dtype)._replace(causal=False)


class LearnsFromRow0(TTTLayer):
    """Fast weights that learn from row 0 alone, for all rows."""

    def _tokens(self, x, state, rotary, mask):
        q, *others = super()._tokens(x, state, rotary, mask)
        return Tokens(q, *(other[:1].expand_as(other) for other in others))


class KeepsRow0(TTTLayer):
    """The state of row 0, kept for all rows: right in one window, wrong in the next."""

    def forward(self, x, state=None, *, rotary=None, mask=None):
        y, state = super().forward(x, state, rotary=rotary, mask=mask)
        return y, TTTState.from_tensors({key: value[:1].expand_as(value) for key, value in state.tensors().items()})


class DeafGate(Gate):
    """A gate that ignores its parameter."""

    def forward(self, x, y):
        return x + 0.1 * y


class WithDeafGate(TTTAdapter):
    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.gate.__class__ = DeafGate


class GroupDependent(TTTLayer):
    """A rate that shrinks where groups are checkpointed."""

    def _tokens(self, x, state, rotary, mask):
        tokens = super()._tokens(x, state, rotary, mask)
        return tokens._replace(rate=tokens.rate / (1 + self.config.scan_checkpoint_group_size))


class FirstAlone(BlockWithTTT):
    """A block that calls its adapter only where there is nothing before it: the others are never reached."""

    def after_attention(self, x: Tensor, cache: Cache | None) -> Tensor:
        return super().after_attention(x, cache) if getattr(self, "reached", False) else x


class SecondUnreached(Sabotaged):
    block = FirstAlone

    def build(self, options, *, device, dtype):
        model = super().build(options, device=device, dtype=dtype)
        model.layers[0].reached = True
        return model


SABOTEURS = {
    # name: (backbone, every code that must come out, and no other)
    "stateful forward": (sabotaged(adapter=KeptInAttribute), ["TTT901"]),
    "stateful forward, with its graph": (sabotaged(adapter=KeptWithGraph), ["TTT901"]),
    "stateful forward, in parameters": (sabotaged(adapter=KeptInParameters), ["TTT901", "TTT902"]),
    "non-causal update": (with_layer(NonCausal), ["TTT903", "TTT904"]),
    "row 0 kept for all rows": (with_layer(KeepsRow0), ["TTT904", "TTT905"]),
    "row 0 teaches all rows": (with_layer(LearnsFromRow0), ["TTT905"]),
    "gate that ignores its parameter": (sabotaged(adapter=WithDeafGate), ["TTT906", "TTT910"]),
    "group-dependent result": (with_layer(GroupDependent), ["TTT902"]),
    "layer never reached": (SecondUnreached(), ["TTT910"]),
}


@pytest.mark.parametrize("name", SABOTEURS)
def test_a_saboteur_is_named(name):
    backbone, codes = SABOTEURS[name]
    findings, printed = probed(backbone, *SMALL)
    found = [finding.code for finding in findings]
    print(name, found, [f.message for f in findings], printed)
    assert found == codes


def test_a_finding_says_what_broke_by_how_much_and_the_way_out():
    (finding,), printed = probed(with_layer(GroupDependent), *SMALL)
    assert (finding.path, finding.severity.value) == ("backbone.name", "error")
    assert "law 2: at group size 2" in finding.message
    assert finding.value > 1e-5
    assert "pure function" in finding.fix
    assert re.search(r"law 2 +BROKEN .* ≤1e-05 float32", printed)
    assert "1 law broken" in printed


def test_what_a_state_on_the_layer_makes_meaningless_is_not_blamed():
    _, printed = probed(sabotaged(adapter=KeptInAttribute), *SMALL)
    assert re.findall(r"law (\d+) +-- .*two passes cannot be compared", printed) == ["3", "4", "5", "10"]


def test_a_plugin_that_fails_is_a_finding_with_its_line():
    class Failing(ToyBackbone):
        def stream(self, model, batch, *, pieces):
            raise IndexError("no such cache")

    (finding,), printed = probed(Failing(), *SMALL)
    assert finding.code == "TTT803"
    assert "law 4" in finding.message
    assert "IndexError: no such cache" in finding.message
    assert re.search(r"failed in `stream`, .*test_probe\.py:\d+: ", finding.message)
    assert re.search(r"law 5 +ok", printed)


def test_the_probe_leaves_pytorch_as_it_was():
    before = torch.random.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    probed(ToyBackbone(), *SMALL)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before[1:]


# --- how it is made small ---


@pytest.mark.parametrize(
    ("layers", "of", "onto", "expected"),
    [
        ((29, 30, 31), 32, 3, (0, 1, 2)),
        ((31,), 32, 3, (2,)),
        ((0,), 32, 3, (0,)),
        ((0, 1), 32, 3, (0, 1)),
        ((30, 31), 32, 4, (2, 3)),
        ((0, 31), 32, 3, (0, 2)),
        ((1, 2), 4, 3, (0, 1)),
        (tuple(range(32)), 32, 3, (0, 1, 2)),
        ((28, 29, 30, 31), 32, 3, (2,)),
        ((1, 2), 3, 3, (1, 2)),
        ((), 32, 3, ()),
        ((2,), 3, 1, (0,)),
        ((0,), 1, 3, (0,)),
    ],
)
def test_layers_keep_their_order_and_depth(layers, of, onto, expected):
    assert place_layers(layers, of, onto) == expected


@pytest.mark.parametrize(
    ("tokens", "size", "unit", "at_most"), [(56, 16, 1, 400), (56, 16, 16, 400), (1500, 400, 1, 400), (14, 4, 1, 400)]
)
def test_cuts_cover_the_sequence_and_are_as_fine_as_allowed(tokens, size, unit, at_most):
    fine, uneven = cuts(tokens, size, unit=unit, at_most=at_most)
    assert sum(fine) == sum(uneven) == tokens
    assert min(fine[:-1]) == unit
    assert len(fine) <= at_most
    assert len(set(uneven)) > 1 or unit > 1
    starts = [sum(fine[:index]) for index in range(len(fine))]
    for boundary in range(size, tokens, size):
        assert boundary in starts
        assert fine[starts.index(boundary)] == unit or unit > 1


@pytest.mark.parametrize(
    ("overrides", "tokens", "full_group"),
    [
        (["ttt.mini_batch_size=16", "ttt.scan_checkpoint_group_size=16"], 280, 16),
        (["ttt.mini_batch_size=16", "ttt.scan_checkpoint_group_size=0"], 56, 1),
        (["ttt.mini_batch_size=256", "ttt.scan_checkpoint_group_size=16"], 896, 2),
        (["ttt.mini_batch_size=4096"], 1792, 2),
        (["ttt.mini_batch_size=1", "ttt.scan_checkpoint_group_size=1"], 12, 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_sequences_cross_three_mini_batches_and_a_group_where_they_can(overrides, tokens, full_group):
    backbone = ToyBackbone()
    text = backbone.presets()["demo"] + "data:\n  window: 9000\n"
    config = load_config(None, text=text, backbone=backbone, overrides=overrides).config
    setting = small_setting(config, backbone)
    assert (setting.exact.tokens, setting.group_size) == (tokens, full_group)
    size = setting.config.mini_batch_size
    assert tokens // size >= 3
    assert -(-(tokens // size) // full_group) > 1
    if size != config.ttt.mini_batch_size:
        assert any(f"mini-batches of {size}, not {config.ttt.mini_batch_size}" in line for line in setting.told)


def test_a_closed_gate_is_opened_and_said():
    backbone = ToyBackbone()
    config = load_config(
        None, text=backbone.presets()["demo"], backbone=backbone, overrides=["ttt.initial_gating_alpha=0.0"]
    ).config
    setting = small_setting(config, backbone)
    assert setting.config.initial_gating_alpha == 0.1
    assert "gates start at 0.1, not 0, which would hide what TTT does" in setting.told


def test_every_code_of_the_probe_is_registered_and_explained():
    of_laws = [code for code in DECLARED.values() if code.family is Family.LAWS]
    assert of_laws == list(LAWS.values())
    assert all(code.number == f"TTT9{law:02}" for law, code in LAWS.items())
    explained = read_explanations(of_laws)
    assert {number: entry.title for number, entry in explained.items()} == {code.number: code.title for code in of_laws}
    assert all(entry.fix for entry in explained.values())
