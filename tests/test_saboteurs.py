"""That the suite can go red: each wrong plugin is caught, by the one law or check that is meant for it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from fake_distributions import importable, install
from saboteurs import SABOTEURS, PathToNowhere, ScoringToy, with_block
from toy import Block, ToyBackbone, WholeToy

from ttt.errors import InjectionError
from ttt.laws import CHECKS, LAWS, Bench, LawBrokenError, MethodBrokenError
from ttt.laws.checks import chunk_invariance
from ttt.laws.plugin import facts_agree, module_imports_no_torch, presets_load
from ttt.laws.training import remat_invariance
from ttt.plugins import get_backbone

QUICK = (1, 6, "presets", "facts", "model", "dataset")
"""What else each is tried by here, and passes; by all the others, one by one, they were tried when they were made."""


def try_by(law_or_check, bench):
    if law_or_check == 2:
        remat_invariance(bench, group_sizes=(1,), nestings={"no checkpoint": ()})
    elif isinstance(law_or_check, int):
        LAWS[law_or_check](bench)
    else:
        CHECKS[law_or_check](bench)


@pytest.mark.parametrize("name", SABOTEURS)
def test_a_saboteur_is_caught_by_its_law_or_check(name):
    backbone, expected, message = SABOTEURS[name]
    bench = Bench(backbone, tokens=9, batch_size=2)
    with pytest.raises((LawBrokenError, MethodBrokenError), match=message) as caught:
        try_by(expected, bench)
    if isinstance(caught.value, LawBrokenError):
        assert caught.value.law == expected
    for other in QUICK:
        if other != expected and not (expected == "presets" and other in CHECKS):  # which all begin with the demo
            try_by(other, bench)


def test_a_path_to_nowhere_is_refused_before_any_law():
    with pytest.raises(InjectionError, match=r"'blocks.0' names no module of the model; .* goes by 'layers.0'"):
        Bench(PathToNowhere()).injected()
    with pytest.raises(MethodBrokenError, match=r"PathToNowhere.sites: fails with InjectionError: .*'blocks.0'"):
        facts_agree(Bench(PathToNowhere()))


def test_a_plugin_without_a_demo_is_told_so():
    backbone = type("Lacking", (ToyBackbone,), {"presets": lambda self: {"small": "backbone: {name: toy}\n"}})()
    with pytest.raises(MethodBrokenError, match=r"Lacking.presets: .* it returned no preset `demo`"):
        presets_load(Bench(backbone))


def test_a_run_that_cannot_be_is_told_with_its_method():
    class Failing(ToyBackbone):
        def loss(self, model, batch, config):
            raise KeyError("weights")

    with pytest.raises(MethodBrokenError, match=r"run of two steps of the demo: .* in `loss`, .*: KeyError: 'weights'"):
        CHECKS["run"](Bench(Failing()))


PLUGIN = """
{imports}
from toy_config import ToyBackbone, hookimpl

class Mine(ToyBackbone):
    name = "mine"

    def presets(self):
        return {{"demo": "backbone: {{name: mine}}"}}

    def facts(self, config):
        {body}
        return super().facts(config)

@hookimpl
def ttt_backbone():
    return Mine()
"""


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, None),
        ({"imports": "import torch"}, 2),
        ({"imports": "from torch.nn import functional"}, 2),
        ({"imports": "import ttt.layer"}, 2),
        ({"body": "from torch import Tensor"}, 12),
    ],
    ids=["none", "module", "submodule", "by ttt", "facts"],
)
def test_torch_in_a_plugins_module_is_found_with_its_line(tmp_path, parts, line):
    install(tmp_path, "mine", "mine_plugin", PLUGIN.format(**{"imports": "", "body": "pass", **parts}))
    with importable(tmp_path):
        bench = Bench(get_backbone("mine"))
        if line is None:
            module_imports_no_torch(bench)
            return
        with pytest.raises(MethodBrokenError, match=rf"mine_plugin: torch is imported at .*mine_plugin.py:{line},"):
            module_imports_no_torch(bench)


def test_law_4_feeds_the_whole_model_in_pieces_if_it_can_stream_or_score():
    for backbone, fed in (
        (ToyBackbone(), {"layers", "model"}),
        (WholeToy(), {"layers"}),
        (ScoringToy(), {"layers", "model", "scores"}),
    ):
        measured = chunk_invariance(Bench(backbone), mini_batch_sizes=(4,), cuts=[[5, 9]])
        assert {name.partition(".")[0].partition(",")[0] for name in measured} == fed


# --- honest plugins that training mode makes look odd ---


class Normed(Block):
    """A batch norm over rows and tokens: in training it writes buffers of its own, and rows meet in it."""

    def __init__(self, options):
        super().__init__(options)
        self.batch_norm = torch.nn.BatchNorm1d(options.dim)

    def forward(self, x, cache=None):
        return super().forward(self.batch_norm(x.flatten(0, 1)).view_as(x), cache)


@pytest.mark.parametrize("law", [1, 2, 3, 5, 6, 10])
def test_dropout_breaks_no_law(law):
    options = ToyBackbone().tiny().model_copy(update={"dropout": 0.3})
    bench = Bench(ToyBackbone(), options=options, tokens=9, batch_size=2)
    model = bench.model()
    assert not torch.equal(*(bench.outputs(model, bench.batch(model), training=mode) for mode in (True, False)))
    try_by(law, bench)


@pytest.mark.parametrize("law", [1, 2, 5, 6, 10])
def test_what_the_backbone_itself_does_in_training_is_no_matter_of_ttt(law):
    try_by(law, Bench(with_block(Normed), tokens=9, batch_size=2))


def test_a_pass_of_a_law_leaves_generators_and_modes_as_they_were():
    bench = Bench(ToyBackbone(), tokens=9, batch_size=2)
    model = bench.model()
    model.layers[0].train()
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    bench.gradients(model, bench.batch(model))
    bench.outputs(model, bench.batch(model))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert [model.training, model.layers[0].training, model.layers[1].training] == [False, True, False]
