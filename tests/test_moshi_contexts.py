"""What Moshi's attention sees: measured by perturbation in every layer, whole and streaming, and told as measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from moshi.models import LMModel
from rich.console import Console
from torch import Tensor

import ttt
from ttt import inject
from ttt.adapter_file import backbone_identity, save_adapter
from ttt.check.load import check_config
from ttt.check.probe.setting import small_setting
from ttt.config import RunConfig, TTTConfig
from ttt.errors import AdapterMismatchError, PluginError
from ttt.inject import Injection
from ttt.laws import LAWS, Bench, LawBrokenError
from ttt.laws.checks import causality, chunk_invariance, identity, stream_independence
from ttt.laws.training import remat_invariance
from ttt.plugins import get_backbone, run_config_model
from ttt.train.setup import build as build_run
from ttt.train.start import train
from ttt_cli.main import main
from ttt_moshi import contexts
from ttt_moshi import model as moshi_model
from ttt_moshi.options import MoshiOptions
from ttt_moshi.streaming import exact_streaming

MOSHI = get_backbone("moshi")
BY_LAYER = {"ttt_layer_context": 3, "non_ttt_layer_context": 6}
FRAMES = 12


def options(**changes: Any) -> MoshiOptions:
    return MoshiOptions(dim=16, num_heads=2, num_layers=3, **changes)


def config(**changes: Any) -> TTTConfig:
    return TTTConfig.model_validate({**MOSHI.ttt_defaults, "mini_batch_size": 4, "layers": (1,), **changes})


def build(**changes: Any) -> LMModel:
    return MOSHI.build(options(**changes), device="cpu", dtype=torch.float32)


def injected(**changes: Any) -> Injection:
    model = build(**changes)
    return inject.apply(model, MOSHI.sites(model), config(), seed=2)


# --- measured ---


def whole(attention: torch.nn.Module, x: Tensor) -> Tensor:
    return attention(x, x, x)


def in_stream(attention: torch.nn.Module, x: Tensor) -> Tensor:
    """The same in the streaming of the model around it: frame by frame, then two at a time."""
    return torch.cat([attention(piece, piece, piece) for piece in x.split([1] * 4 + [2] * ((FRAMES - 4) // 2), 1)], 1)


def spans(model: LMModel, *, streaming: bool) -> list[int]:
    """How many frames of each layer's attention change with its first frame: what a frame sees of the past."""
    found = []
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, FRAMES, model.dim, generator=generator)
    for layer in model.transformer.layers:
        outputs = []
        for changed in (x, torch.cat([x[:, :1] + 1, x[:, 1:]], 1)):
            if streaming:
                with exact_streaming(model, 1, longest=2):
                    outputs.append(in_stream(layer.self_attn, changed))
            else:
                outputs.append(whole(layer.self_attn, changed))
        differs = (outputs[0] != outputs[1]).any(-1)[0].tolist()
        assert differs == sorted(differs, reverse=True), "a frame that sees what the one before it does not"
        found.append(sum(differs))
    return found


@pytest.mark.parametrize(
    ("written", "plain", "with_ttt"),
    [
        ({}, [FRAMES] * 3, [FRAMES] * 3),
        ({"context": 5}, [5, 5, 5], [5, 5, 5]),
        ({"context": 1}, [1, 1, 1], [1, 1, 1]),
        (BY_LAYER, [6, 6, 6], [6, 3, 6]),
        ({"ttt_layer_context": 4}, [FRAMES] * 3, [FRAMES, 4, FRAMES]),
        ({"non_ttt_layer_context": 4}, [4, 4, 4], [4, FRAMES, 4]),
        ({"context": 7, "ttt_layer_context": 2}, [7, 7, 7], [7, 2, 7]),
    ],
)
@torch.no_grad()
def test_every_layer_sees_what_is_written(written: dict[str, int], plain: list[int], with_ttt: list[int]) -> None:
    """Whole and streaming; with TTT in layer 1, without it, and without it again after it was ejected."""
    model = build(**written)
    depformer = [layer.self_attn.context for layer in model.depformer.layers]
    assert spans(model, streaming=False) == spans(model, streaming=True) == plain
    injection = inject.apply(model, MOSHI.sites(model), config(), seed=2)
    assert spans(model, streaming=False) == spans(model, streaming=True) == with_ttt
    injection.eject()
    assert spans(model, streaming=False) == spans(model, streaming=True) == plain
    inject.prepare(MOSHI.sites(model), config())
    assert spans(model, streaming=False) == with_ttt
    assert [layer.self_attn.context for layer in model.depformer.layers] == depformer == [None, None]


@pytest.mark.parametrize("adapter", ["ttt", "ttt+lora"])
def test_a_runs_model_sees_what_it_saw_before_once_its_layers_are_ejected(adapter: str) -> None:
    options = MOSHI.tiny().model_copy(update={"context": 7, "ttt_layer_context": 2})
    run_config = run_config_model(MOSHI).model_validate(
        {"backbone": options.model_dump(), "adapter": adapter, "lora": {"rank": 2}, "ttt": {"layers": [1]}}
    )
    model, injection = build_run(run_config, MOSHI, torch.device("cpu"))
    assert [layer.self_attn.context for layer in model.transformer.layers] == [7, 2, 7]
    injection.eject()
    assert [layer.self_attn.context for layer in model.transformer.layers] == [7, 7, 7]


def _on_a_wrong_attribute(model: LMModel, options: MoshiOptions) -> LMModel:
    for layer in model.transformer.layers:
        if hasattr(layer, "self_attn"):
            layer.context = options.context
    return model


def _one_too_many(model: LMModel, options: MoshiOptions) -> LMModel:
    for layer in model.transformer.layers:
        layer.self_attn.context = options.context + 1
    return model


@pytest.mark.parametrize(
    ("saboteur", "seen", "told"),
    [(_on_a_wrong_attribute, FRAMES, "512 frames (40.96 s)"), (_one_too_many, 6, "6 frames (0.48 s)")],
)
@torch.no_grad()
def test_a_context_that_does_not_act_is_measured(
    monkeypatch: pytest.MonkeyPatch, saboteur: Callable[..., LMModel], seen: int, told: str
) -> None:
    """The measurement sees what the attention does, and the sentence says what was measured, not what was written."""
    monkeypatch.setattr(moshi_model, "set_contexts", saboteur)
    model = build(context=5)
    assert spans(model, streaming=False) == [seen] * 3
    assert MOSHI.describe_model(model) == (f"attention sees {told} in every layer",)


@torch.no_grad()
def test_a_context_that_streaming_ignores_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(context=5)
    attention = type(model.transformer.layers[0].self_attn)
    start = attention._init_streaming_state

    def ignoring(self: Any, batch_size: int) -> Any:
        self.context = 2 if self.context else None
        return start(self, batch_size)

    monkeypatch.setattr(attention, "_init_streaming_state", ignoring)
    assert spans(model, streaming=True) == [2] * 3


# --- the laws ---


def bench(**changes: Any) -> Bench:
    return Bench(MOSHI, options=options(**changes), ttt={"layers": (1,)}, batch_size=2)


LAWS_AT_THE_END_OF_ATTENTION: dict[str, Callable[[Bench], Any]] = {
    "2": lambda b: remat_invariance(b, group_sizes=(0, 2), nestings={"no checkpoint": ()}),
    "3": lambda b: causality(b, tokens=(1, 9)),
    "4": lambda b: chunk_invariance(b, mini_batch_sizes=(4,), layers=False),
    "5": stream_independence,
    "6": lambda b: identity(b, dtypes=(torch.float32,)),
    "9": LAWS[9],
}


@pytest.mark.parametrize("law", LAWS_AT_THE_END_OF_ATTENTION)
@pytest.mark.parametrize("written", [{"context": 5}, BY_LAYER], ids=["one context", "by layer"])
def test_laws_hold_where_attention_ends(law: str, written: dict[str, int]) -> None:
    """On 14 frames, of which attention sees 3 to 6."""
    LAWS_AT_THE_END_OF_ATTENTION[law](bench(**written))


def test_law_4_sees_a_context_that_streaming_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is as long as the context says, but what is in it is seen by another one."""
    monkeypatch.setattr("ttt_moshi.streaming._widen", lambda attention, longest: setattr(attention, "context", 9))
    with pytest.raises(LawBrokenError, match="law 4"):
        chunk_invariance(bench(context=5), mini_batch_sizes=(4,), layers=False)


def test_law_6_sees_a_context_that_only_attaching_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """With closed gates the model must be the plain one with the same contexts."""
    monkeypatch.setattr(Bench, "prepared", Bench.model)
    with pytest.raises(LawBrokenError, match="law 6: with gates closed"):
        identity(bench(**BY_LAYER), dtypes=(torch.float32,))


def test_law_9_sees_an_identity_without_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_moshi.plugin.identifying", lambda options: dict.fromkeys(("context",)))
    with pytest.raises(LawBrokenError, match=r"law 9: .* knows of context: 5, and `identity` says None"):
        LAWS[9](bench(context=5))


@torch.no_grad()
def test_a_stream_equals_the_whole_far_beyond_the_context() -> None:
    """5,000 frames, a thousand contexts long: pieces of 200, then frame by frame."""
    model = injected(**{"ttt_layer_context": 3, "non_ttt_layer_context": 5}).model
    codes = MOSHI.example_batch(model, batch_size=1, tokens=5000, seed=3)
    streamed = MOSHI.stream(model, codes, pieces=[200] * 24 + [7] * 20 + [1] * 60)
    torch.testing.assert_close(streamed, MOSHI.outputs(model, codes), rtol=1e-4, atol=1e-5)


# --- told, and kept ---


def test_the_sentence_names_every_layer_once() -> None:
    told = "attention sees 3 frames (0.24 s) in layer 1 (TTT), 6 frames (0.48 s) in layers 0, 2"
    assert MOSHI.describe_model(injected(**BY_LAYER).model) == (told,)
    assert MOSHI.describe_model(build(context=1)) == ("attention sees 1 frame (0.08 s) in every layer",)
    assert contexts._layers([0, 1, 2, 4, 6, 7]) == "layers 0 to 2, 4, 6, 7"


def test_contexts_that_come_to_the_same_are_the_same() -> None:
    """The demo sees 512 frames by itself: to write so changes no adapter file, as one for all layers does not."""
    same = [
        ({}, {"context": 512}),
        ({"context": 5}, {"ttt_layer_context": 5, "non_ttt_layer_context": 5}),
        ({"ttt_layer_context": 3}, {"context": 3, "non_ttt_layer_context": 512}),
    ]
    for one, other in same:
        assert backbone_identity(MOSHI, options(**one)) == backbone_identity(MOSHI, options(**other))
    assert backbone_identity(MOSHI, options(context=5)) != backbone_identity(MOSHI, options())


def test_an_adapter_is_refused_by_a_model_that_sees_something_else(tmp_path: Path) -> None:
    """As the README loads it: the model and its sites alone are known."""
    made = injected(**BY_LAYER)
    save_adapter(tmp_path, made, backbone=backbone_identity(MOSHI, options(**BY_LAYER)))
    for written in ({}, {"context": 3}, {"ttt_layer_context": 6, "non_ttt_layer_context": 3}):
        model = build(**written)
        with pytest.raises(AdapterMismatchError, match="ttt_layer_context: 3 in the file"):
            ttt.load_adapter(tmp_path, model, sites=MOSHI.sites(model))
        assert not hasattr(model.transformer.layers[1], "ttt")
    model = build(**BY_LAYER)
    ttt.load_adapter(tmp_path, model, sites=MOSHI.sites(model))
    codes = MOSHI.example_batch(model, batch_size=1, tokens=FRAMES, seed=0)
    with torch.no_grad():
        assert torch.equal(MOSHI.outputs(model, codes), MOSHI.outputs(made.model, codes))


def test_a_model_built_elsewhere_says_what_its_attention_sees(tmp_path: Path) -> None:
    made = injected(context=5)
    save_adapter(tmp_path, made, backbone=backbone_identity(MOSHI, options(context=5)))
    model = moshi_model._build(options(), device="cpu", dtype=torch.float32)  # kyutai's, without our contexts
    with pytest.raises(AdapterMismatchError, match=r"backbone\.context: 5 in the file, null here"):
        ttt.load_adapter(tmp_path, model, sites=MOSHI.sites(model))
    for layer in model.transformer.layers:
        layer.self_attn.context = 5
    ttt.load_adapter(tmp_path, model, sites=MOSHI.sites(model))


def test_a_context_set_by_hand_stays_and_is_known() -> None:
    """As by kyutai's `set_attention_context`: TTT changes nothing about it, and files say it."""
    model = build()
    for layer in model.transformer.layers:
        layer.self_attn.context = 5
    inject.apply(model, MOSHI.sites(model), config()).eject()
    assert MOSHI.describe_model(model) == ("attention sees 5 frames (0.4 s) in every layer",)
    assert MOSHI.sites(model)[0].known_options["context"] == 5


def test_a_run_announces_what_was_measured_and_its_adapter_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "backbone": {**options(**BY_LAYER).model_dump(exclude_none=True), "name": "moshi"},
        "ttt": {**MOSHI.ttt_defaults, "layers": [1], "mini_batch_size": 4},
        "data": {"duration_sec": 1},
        "train": {"max_steps": 1, "batch_size": 1, "device": "cpu"},
        "run_dir": str(tmp_path / "run"),
    }
    checked = check_config("c.yaml", text=yaml.safe_dump(settings), backbone=MOSHI)
    assert checked.config is not None, checked.findings
    console = Console(record=True, width=300, quiet=False)
    train(checked.config, MOSHI, console=console)
    told = "attention sees 3 frames (0.24 s) in layer 1 (TTT), 6 frames (0.48 s) in layers 0, 2"
    assert told in console.export_text()
    capsys.readouterr()
    assert main(["info", str(tmp_path / "run")]) == 0
    assert f"model, as measured when it was built\n  {told}\n" in capsys.readouterr().out


def test_an_answer_that_is_no_sentence_is_the_plugins_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, told in (("all", "a str, not a sequence"), ([3], "3 as number 0, not a"), ([""], "'' as num")):
        monkeypatch.setattr(contexts, "describe", lambda model, answer=answer: answer)
        with pytest.raises(PluginError, match=told):
            MOSHI.describe_model(build())


def test_scores_know_how_far_attention_sees() -> None:
    def span(layers: Any, **written: int) -> int | None:
        run = RunConfig(backbone=options(**written), ttt=config(layers=layers))
        return MOSHI.score_facts(run).attention_span

    assert span((1,)) == 512
    assert span((1,), **BY_LAYER) == 6
    assert span("all", **BY_LAYER) == 3
    assert span("none", **BY_LAYER) == 6


def test_a_probe_has_the_configs_contexts() -> None:
    """On both sides of law 2: the model that keeps everything is the same model."""
    run = check_config("c.yaml", text=yaml.safe_dump({"backbone": {"name": "moshi", **BY_LAYER}}), backbone=MOSHI)
    assert run.config is not None
    setting = small_setting(run.config, MOSHI)
    for given in (setting.exact.options, setting.exact.bare):
        assert {key: getattr(given, key) for key in BY_LAYER} == BY_LAYER


@pytest.mark.parametrize(
    ("backbone", "layers", "found"),
    [
        ({"ttt_layer_context": 3}, "none", ["backbone.ttt_layer_context"]),
        ({"non_ttt_layer_context": 3}, "all", ["backbone.non_ttt_layer_context"]),
        ({"context": 3, "ttt_layer_context": 2}, "all", ["backbone.context"]),
        ({"context": 3, "non_ttt_layer_context": 2}, "none", ["backbone.context"]),
        (BY_LAYER, [0, 1, 2, 3], ["backbone.non_ttt_layer_context"]),
        (BY_LAYER, "middle", []),
        ({"context": 3}, "none", []),
        ({"context": 3, "ttt_layer_context": 2}, [9], []),
    ],
)
def test_a_context_that_no_layer_has_is_found(backbone: dict[str, int], layers: Any, found: list[str]) -> None:
    text = yaml.safe_dump({"backbone": {"name": "moshi", **backbone}, "ttt": {"layers": layers}})
    findings = check_config("c.yaml", text=text, backbone=MOSHI).findings
    assert [finding.path for finding in findings if finding.code == "MSH201"] == found


def test_contexts_are_told_by_their_keys() -> None:
    text = "backbone: {name: moshi, context: 3, ttt_layer_context: 2, non_ttt_layer_context: 4}"
    (finding,) = check_config("c.yaml", text=text, backbone=MOSHI).findings
    assert finding.path == "backbone.context"
    assert "ttt_layer_context and non_ttt_layer_context name all layers" in finding.message
    assert finding.fix == "leave out context"
    text = "backbone: {name: moshi, context: 0}\ndata: {duration_sec: 3601}"
    paths = [finding.path for finding in check_config("c.yaml", text=text, backbone=MOSHI).findings]
    assert paths == ["backbone.context", "data.duration_sec"]


def test_a_saved_model_is_refused_by_one_that_sees_something_else(tmp_path: Path) -> None:
    """Without a config: what the built model shows of its contexts is kept, and compared."""
    made = ttt.get_ttt_model(build(**BY_LAYER), config())
    made.save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match="non_ttt_layer_context: 6 in the file, null here"):
        ttt.TTTModel.from_pretrained(build(), tmp_path)
    loaded = ttt.TTTModel.from_pretrained(build(**BY_LAYER), tmp_path)
    assert [layer.self_attn.context for layer in loaded.transformer.layers] == [6, 3, 6]
