"""Plugins that are wrong as a tired author's would be: each is told by plugin, method, and line in its own package."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from fake_distributions import importable, install
from rich.console import Console
from saboteurs import ScoringToy, ToyStream
from torch import nn
from toy import ToyBackbone, ToyData, ToyDataset, ToyOptions

from ttt.check import check_config
from ttt.check.examined import examined
from ttt.config import RunConfig
from ttt.errors import EnvironmentProblem, InactiveLayerError, PluginError, UsageError
from ttt.plugins import (
    Backbone,
    BackboneFacts,
    Capability,
    DataReading,
    DiffusionScoring,
    Indexing,
    LossOutput,
    LowRank,
    PluginInfo,
    Precomputing,
    Sampling,
    Scores,
    SegmentReset,
    SourceFiles,
    Streaming,
    WeightImport,
    capability,
    discover,
    has_capability,
    run_config_model,
)
from ttt.plugins.answers import ANSWERS
from ttt.plugins.asking import TRACEBACK
from ttt.plugins.capabilities import CAPABILITIES
from ttt.plugins.capability_base import kinds_of, members_of
from ttt.plugins.guarding import methods_of
from ttt.sample import sample, sample_many
from ttt.train import train
from ttt_cli.main import main

# --- what a plugin declares ---

DECLARED = {
    "causal: missing": ("causal = Nothing()", "Toy.causal is missing, not True or False"),
    "causal: a word": ("causal = 'yes'", "Toy.causal is 'yes', not True or False"),
    "name: missing": ("name = Nothing()", "Toy.name is missing"),
    "streaming: as once": (
        "streaming = True",
        "Toy.streaming is True, but the class does not inherit ttt.plugins.Streaming; inherit",
    ),
    "options: none": ("options = None", "Toy.options is None, not a subclass of BackboneOptions"),
    "location_options: the older name": ("location_options = {'width'}", "is what non_identity_options was called"),
    "import_config: a hook now": (
        "def import_config(self, text, *, file): ...",
        "Toy.import_config is a hook of its own now; write `ttt_import_config(text, file)`",
    ),
    "non_identity_options: a text": (
        "non_identity_options = 'weights'",
        "Toy.non_identity_options is 'weights', not a set",
    ),
    "non_identity_options: unknown": (
        "non_identity_options = {'wights'}",
        "names 'wights', which is not an option of ToyOptions",
    ),
    "ttt_defaults: unknown key": ("ttt_defaults = {'layrs': 1}", "Toy.ttt_defaults: layrs: Extra inputs"),
    "ttt_defaults: out of range": ("ttt_defaults = {'base_lr': -1.0}", "Toy.ttt_defaults: base_lr: Input should be"),
    "rules: one function": ("rules = len", "Toy.rules is <built-in function len>, not a sequence"),
    "rules: a text": ("rules = ('no_cats',)", "Toy.rules has 'no_cats' as number 0, not a function"),
    "presets: a dict": ("presets = {'demo': ''}", "Toy.presets is {'demo': ''}, not a method"),
    "facts: a property": ("facts = property(lambda self: 1)", "Toy.facts is 1, not a method"),
    "a default of the wrong type": (
        "options = WrongType",
        "a default of WrongType is not valid: dim: Input",
    ),
    "a default out of its range": (
        "options = OutOfRange",
        "a default of OutOfRange is not valid: heads: Input",
    ),
    "a default of the data": (
        "data_options = WrongData",
        "Toy.data_options: a default of WrongData is not valid: win",
    ),
    "a name of another": ("options = Renamed", "options: the default of Renamed.name is 'other', not 'toy'"),
    "a validator that fails": ("options = Fails", "ZeroDivisionError: "),
    "a type that pydantic does not know": ("options = Unknown", "PydanticSchemaGenerationError"),
}
_DECLARING = """\
from typing import Annotated
from pydantic import Field, field_validator
from toy_config import ToyBackbone, ToyData, ToyOptions, hookimpl

class Strange:
    pass

class Nothing:  # as if it were not there
    def __get__(self, *_):
        raise AttributeError

class WrongType(ToyOptions):
    dim: int = "32"

class OutOfRange(ToyOptions):
    heads: Annotated[int, Field(ge=1)] = 0

class WrongData(ToyData):
    window_tokens: int = None

class Renamed(ToyOptions):
    name: str = "other"

class Unknown(ToyOptions):
    strange: Strange | None = None

class Fails(ToyOptions):
    @field_validator("dim")
    @classmethod
    def _fails(cls, value):
        return value // 0

class Toy(ToyBackbone):
    name = "toy"
    LINE

@hookimpl
def ttt_backbone():
    return Toy()
"""


def _declaring(line: str) -> str:
    return _DECLARING.replace("LINE", line)


def _found(folder: Path, name: str = "toy") -> PluginInfo:
    with importable(folder):
        return next(examined(plugin) for plugin in discover() if plugin.name == name)


@pytest.mark.parametrize("wrong", DECLARED)
def test_what_is_declared_wrongly_is_a_broken_plugin(tmp_path: Path, wrong: str) -> None:
    line, cause = DECLARED[wrong]
    install(tmp_path, "toy", "wrong_plugin", _declaring(line))
    found = _found(tmp_path)
    assert found.backbone is None
    assert cause in str(found.error)
    assert "\n" not in str(found.error)


MEMBERS = [(kind, name) for kind in CAPABILITIES for name in members_of(kind)]
"""Everything that comes with a capability."""


@pytest.mark.parametrize(("kind", "member"), MEMBERS, ids=[name for _, name in MEMBERS])
def test_a_part_of_a_capability_that_is_not_inherited_is_told(
    tmp_path: Path, kind: type[Capability], member: str
) -> None:
    written = "def {}(self, *_, **__):\n        return None" if callable(getattr(kind, member)) else "{} = '.txt'"
    install(tmp_path, "toy", "wrong_plugin", _declaring(written.format(member)))
    told = f"Toy.{member}: the class has `{member}`, but does not inherit ttt.plugins.{kind.__name__}; inherit it"
    assert _found(tmp_path).error == told


_ABLE = "from ttt.plugins import {0}\n" + _DECLARING.replace("class Toy(ToyBackbone):", "class Toy(ToyBackbone, {0}):")
_SAMPLES = "plan_sample = sample = lambda *_, **__: None"
_STREAMS = "stream = lambda *_, **__: None"
ABLE = {
    # name: (the capability, what the class has of it, what is told)
    "all that it needs": ("Streaming", (_STREAMS,), None),
    "all that it needs, and no suffix": ("Sampling", (_SAMPLES,), None),
    "a suffix that is none": ("Sampling", (_SAMPLES, "sample_suffix = 'mp4'"), "sample_suffix is 'mp4', not what a"),
    "a suffix of no letters": ("Sampling", (_SAMPLES, "sample_suffix = None"), "sample_suffix is None, not what a"),
    "no method": ("Streaming", ("stream = 7",), "Toy.stream is 7, not a method"),
    "an optional one is not a method": (
        "Sampling",
        (_SAMPLES, "check_sample = {}"),
        "check_sample is {}, not a method",
    ),
    "nothing of it": ("WeightImport", ("pass",), "Can't instantiate abstract class Toy"),
    "half of it": ("Sampling", ("sample = lambda *_, **__: None",), "Can't instantiate abstract class Toy"),
    "streaming: as once": (
        "Streaming",
        (_STREAMS, "streaming = False"),
        "but the class inherits ttt.plugins.Streaming",
    ),
}


@pytest.mark.parametrize("case", ABLE)
def test_what_a_capability_asks_for_is_held_when_it_is_loaded(tmp_path: Path, case: str) -> None:
    kind, lines, cause = ABLE[case]
    install(tmp_path, "toy", "wrong_plugin", _ABLE.replace("{0}", kind).replace("LINE", "\n    ".join(lines)))
    found = _found(tmp_path)
    assert found.error is None if cause is None else cause in str(found.error)


def test_what_is_declared_rightly_is_not(tmp_path: Path) -> None:
    required = (
        "\n\nclass Needs(ToyOptions):\n    weight: int\n\nclass Toy("  # without a default it is the user's to write
    )
    install(tmp_path, "toy", "wrong_plugin", _declaring("options = Needs").replace("\nclass Toy(", required))
    with importable(tmp_path):
        assert [plugin.error for plugin in discover() if plugin.name == "toy"] == [None]


# --- what it is asked without torch ---

ASKED = {
    "presets that raise": (
        "def presets(self):\n        raise OSError(2, 'No such file', 'demo.yaml')",
        "`presets`",
        "FileNotFoundError",
    ),
    "presets of bytes": (
        "def presets(self):\n        return {'demo': b''}",
        "`presets`",
        "a preset 'demo'",
    ),
    "no demo": ("def presets(self):\n        return {'big': ''}", "`presets`", "it returned no preset `demo`"),
    "facts that raise": ("def facts(self, config):\n        return config.backbone.widht", "`facts`", "AttributeError"),
    "facts of half a layer": (
        "def facts(self, config):\n        from dataclasses import replace\n"
        "        return replace(super().facts(config), num_layers=2.5)",
        "`facts`",
        "it returned a BackboneFacts whose num_layers is 2.5",
    ),
    "facts that exit": ("def facts(self, config):\n        raise SystemExit(0)", "`facts`", "SystemExit: 0"),
    "facts without config": ("def facts(self):\n        return None", "`facts`", "TypeError"),
    "a rule that raises": ("rules = (lambda config: 1 / 0,)", "its rule <lambda>", "ZeroDivisionError"),
    "a rule of texts": ("rules = (lambda config: ['bad'],)", "its rule <lambda>", "it returned str, not Finding"),
    "a rule that panics": (
        "def rule(config):\n        raise Toy.Panic\n    rules = (rule,)\n"
        "    class Panic(BaseException):\n        def __str__(self):\n            raise SystemExit('no message')",
        "its rule rule",
        "Panic",
    ),
    "a finding of numbers": (
        "def rule(config):\n        from ttt.config import Finding\n"
        "        return [Finding(code='TOY1', severity='error', path='', message='m')]\n    rules = (rule,)",
        "its rule rule",
        "a Finding whose severity is of type str, not Severity",
    ),
    "a code of two lines": (
        "def rule(config):\n        from ttt.config import Finding, Severity\n"
        "        return [Finding(code='TOY1\\n::error::x', severity=Severity.NOTE, path='', message='m')]\n"
        "    rules = (rule,)",
        "its rule rule",
        "a Finding whose code is 'TOY1",
    ),
    "files that raise": ("def files(self, options):\n        return options.path", "`files`", "AttributeError"),
    "files without their kind": (
        "def files(self, options):\n        return {'width': 'weights.safetensors'}",
        "`files`",
        "not a mapping of options' names to NeededFiles",
    ),
    "files of no option": (
        "def files(self, options):\n        from ttt.plugins import NeededFile\n"
        "        return {'wights': NeededFile('x', 'weights')}",
        "`files`",
        "a file for 'wights', which is none of its options",
    ),
    "explanations": ("def explanations(self):\n        return {'TOY1': 'bad'}", "`explanations`", "not an Explanation"),
}


@pytest.mark.parametrize("wrong", ASKED)
def test_what_answers_wrongly_is_told_with_its_line(tmp_path: Path, wrong: str) -> None:
    written, method, cause = ASKED[wrong]
    install(tmp_path, "toy", "wrong_plugin", _declaring(written))
    line = next(n for n, text in enumerate(_declaring(written).splitlines(), 1) if written.splitlines()[0] in text)
    told = str(_found(tmp_path).error)
    place = re.search(rf"the plugin toy \(ttt-toy 1\.2\) failed in {method}, .*wrong_plugin\.py:(\d+): ", told)
    assert place is not None, told
    assert line <= int(place[1]) <= line + 3
    assert cause in told


def test_the_exit_code_says_whether_all_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path, "toy", "wrong_plugin", _declaring("pass"))
    with importable(tmp_path):
        assert main(["plugins"]) == 0
    assert "BROKEN" not in capsys.readouterr().out
    (tmp_path / "wrong_plugin.py").write_text(_declaring("def facts(self, config):\n        return [][1]"))
    with importable(tmp_path):
        assert main(["plugins", "--json"]) == 1
    (toy,) = [plugin for plugin in json.loads(capsys.readouterr().out) if plugin["name"] == "toy"]
    assert not toy["works"]
    assert "IndexError" in toy["error"]


def test_a_demo_config_with_an_error_is_a_broken_plugin(tmp_path: Path) -> None:
    demo = "def presets(self):\n        return {'demo': 'backbone: {name: toy}\\ntrain: {max_stps: 3}'}"
    install(tmp_path, "toy", "wrong_plugin", _declaring(demo))
    assert "preset demo:2:9: unknown key `max_stps` in `train`" in str(_found(tmp_path).error)


def test_the_traceback_is_there_for_who_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "toy", "wrong_plugin", _declaring("def facts(self, config):\n        return [][1]"))
    install(tmp_path, "torn", "torn_plugin", "import nobody_has_this\n")
    _found(tmp_path), _found(tmp_path, "torn")
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv(TRACEBACK, "1")
    _found(tmp_path), _found(tmp_path, "torn")
    traceback = capsys.readouterr().err
    assert "return [][1]" in traceback
    assert "import nobody_has_this" in traceback


def test_what_a_plugin_refuses_is_the_users_to_mend() -> None:
    class Refusing(ToyBackbone):
        def facts(self, config: Any) -> Any:
            raise EnvironmentProblem("3: no such width", key="backbone.dim", fix="write 4")

    checked = check_config("c.yaml", text="backbone:\n  name: toy\n  dim: 32\n", backbone=Refusing())
    (finding,) = checked.findings
    assert (finding.code, finding.path, finding.fix) == ("TTT605", "backbone.dim", "write 4")
    assert str(finding.place) == "c.yaml:3:8"
    assert "plugin" not in finding.message


# --- what it is asked with torch ---


class Fileless(ToyDataset):
    files = property(lambda self: None)  # type: ignore[assignment]


class Undescribed(ToyDataset):
    def describe(self, index: int) -> str:
        raise KeyError(index)


class Unreadable(ToyDataset):
    def __getitem__(self, index: int) -> Any:
        return self.windows[index]  # type: ignore[attr-defined]


class Uncollated(ToyDataset):
    def collate(self, samples: Any) -> Any:
        return torch.stack(samples)


def _with_dataset(kind: type) -> Any:
    def dataset(self: ToyBackbone, config: Any, *, split: str, device: Any) -> Any:
        made = ToyBackbone.dataset(self, config, split=split, device=device)
        made.__class__ = kind
        return made

    return dataset


def _with_sources(*sources: SourceFiles) -> Any:
    return _with_dataset(type("Sourced", (ToyDataset,), {"sources": sources}))


def _site(**changes: Any) -> Any:
    return lambda self, model: [replace(site, **changes) for site in ToyBackbone.sites(self, model)]


def _loss(change: Any) -> Any:
    return lambda self, model, batch, config: change(ToyBackbone.loss(self, model, batch, config))


class _Attaching(toy.Site):
    def attach(self, adapter: nn.Module) -> None:
        raise KeyError("no such child")


TRAINED: dict[str, tuple[dict[str, Any], str, str]] = {
    "build raises": ({"build": lambda self, options, **_: options.depht}, "`build`", "AttributeError"),
    "build returns nothing": ({"build": lambda self, options, **_: None}, "`build`", "returned None, not a model"),
    "build takes no dtype": ({"build": lambda self, options: None}, "`build`", "TypeError"),
    "sites raise": ({"sites": lambda self, model: [model.nothing]}, "`sites`", "AttributeError"),
    "sites: a generator": ({"sites": lambda self, model: (s for s in [])}, "`sites`", "returned a generator"),
    "sites: none": ({"sites": lambda self, model: []}, "`sites`", "returned an empty sequence"),
    "sites: modules": ({"sites": lambda self, model: [model]}, "`sites`", "as number 0, not a Site"),
    "sites: a width of text": ({"sites": _site(dim="32")}, "`sites`", "whose dim is '32'"),
    "sites: no subclass": ({"sites": _site(subclass=None)}, "`sites`", "whose subclass is None"),
    "sites: one layer": ({"sites": _site(layer=3)}, "`sites`", "sites of the layers 3, 3"),
    "dataset raises": ({"dataset": lambda self, config, **_: config.dat}, "`dataset`", "AttributeError"),
    "dataset: a list": ({"dataset": lambda self, config, **_: [1, 2]}, "`dataset`", "a list without `collate`"),
    "dataset: no files": ({"dataset": _with_dataset(Fileless)}, "`dataset`", "whose `files` is None"),
    "dataset: sources": (
        {"dataset": _with_sources(SourceFiles("a", range(0, 1)))},
        "`dataset`",
        "of 4 files whose `sources` cover 1",
    ),
    "dataset: weights": (
        {"dataset": _with_sources(SourceFiles("a", range(0, 4), float("nan")))},
        "`dataset`",
        "whose source 'a' has the weight nan",
    ),
    "a window raises": ({"dataset": _with_dataset(Unreadable)}, "`__getitem__` of its dataset", "AttributeError"),
    "collate raises": ({"dataset": _with_dataset(Uncollated)}, "`collate` of its dataset", "TypeError"),
    "loss raises": ({"loss": lambda self, model, batch, config: model(batch["inptus"])}, "`loss`", "KeyError"),
    "loss: a tensor": ({"loss": _loss(lambda output: output.loss)}, "`loss`", "a Tensor, not a LossOutput"),
    "loss: of each row": (
        {"loss": _loss(lambda output: LossOutput(output.loss.expand(2), 8))},
        "`loss`",
        "whose loss is torch.float32 [2]",
    ),
    "loss: detached": ({"loss": _loss(lambda output: LossOutput(output.loss.detach(), 8))}, "`loss`", "no gradient"),
    "loss: no tokens": ({"loss": _loss(lambda output: LossOutput(output.loss, 0))}, "`loss`", "whose tokens is 0"),
    "loss: metrics": (
        {"loss": _loss(lambda output: LossOutput(output.loss, 8, {"step": output.loss.detach()}))},
        "`loss`",
        "a metric of the name 'step'",
    ),
    "loss: means": (
        {"loss": _loss(lambda output: replace(output, means=output.loss.expand(2, 2)))},
        "`loss`",
        "whose means are torch.float32 [2, 2], not a tensor [K] of floating point",
    ),
    "loss: more means than weights": (
        {"loss": _loss(lambda output: replace(output, means=output.loss.expand(2) / 2))},
        "`loss`",
        "a loss of 2 means, but `loss_weights` gives 1 sums of weights",
    ),
    "loss: a metric over no mean": (
        {"loss": _loss(lambda output: replace(output, metrics_over={"accuracy": "text"}))},
        "`loss`",
        "whose metrics_over has 'accuracy': 'text', not a metric and a whole number",
    ),
    "loss_weights: a number": (
        {"loss_weights": lambda self, batch, config: 2.0},
        "`loss_weights`",
        "a float, not a tensor [K] of sums of weights",
    ),
    "loss_weights raises": ({"loss_weights": lambda self, batch, config: batch["mask"]}, "`loss_weights`", "KeyError"),
    "is_attention: a match": (
        {"is_attention": lambda self, name: re.search("x", name)},
        "`is_attention`",
        "None, not",
    ),
    "has_eval_data: a path": ({"has_eval_data": lambda self, config: ""}, "`has_eval_data`", "a str, not True"),
    "has_own_eval_data: a number": (
        {"has_own_eval_data": lambda self, options: 1},
        "`has_own_eval_data`",
        "an int, not True",
    ),
    "attaching raises": (
        {"sites": lambda self, model: [_attaching(s) for s in ToyBackbone.sites(self, model)]},
        "its sites",
        "KeyError",
    ),
}


class _Typed(ToyBackbone, Backbone[ToyOptions, ToyData]):
    """A backbone that says what its options are."""

    def has_own_eval_data(self, options: ToyOptions) -> bool:
        return options.dim == 32

    def facts(self, config: RunConfig[ToyOptions, ToyData]) -> BackboneFacts:
        return super().facts({}[config.backbone.name])


@pytest.mark.parametrize(
    ("backbone", "data", "answer"),
    [
        ({"dim": 32}, {}, True),
        ({"dim": 32}, {"train_data": "a"}, False),
        ({"dim": 32}, {"train_data": "a", "eval_data": "b"}, True),
        ({"dim": 64}, {}, False),
        ({"dim": 64}, {"eval_data": "b"}, True),
    ],
)
def test_where_a_run_is_evaluated(backbone: dict[str, Any], data: dict[str, Any], answer: bool) -> None:
    config = run_config_model(_Typed()).model_validate({"backbone": {"name": "toy", **backbone}, "data": data})
    assert _Typed().has_eval_data(config) is answer
    assert ToyBackbone().has_eval_data(config) is ("eval_data" in data)


def test_a_backbone_that_says_its_options_is_guarded_too() -> None:
    config = run_config_model(_Typed()).model_validate({"backbone": {"name": "toy"}})
    with pytest.raises(PluginError, match=r"the plugin toy .* failed in `facts`, .*test_asking\.py:\d+: KeyError"):
        _Typed().facts(config)


def _attaching(site: Any) -> _Attaching:
    return _Attaching(**{name: getattr(site, name) for name in site.__dataclass_fields__})


def _train(tmp_path: Path, attributes: dict[str, Any], **more: Any) -> None:
    backbone = type("Wrong", (ToyBackbone,), {"__module__": __name__, **attributes})()
    train_section = "train: {max_steps: 1, device: cpu}\neval: {max_batches: 1}\n"
    text = f"backbone: {{name: toy}}\n{train_section}run_dir: {tmp_path / 'run'}\n"
    checked = check_config("c.yaml", text=text, backbone=backbone, **more)
    assert checked.config is not None, checked.findings
    train(checked.config, backbone, console=Console(quiet=True))


@pytest.mark.parametrize("wrong", TRAINED)
def test_what_fails_in_a_run_is_told_with_its_line(tmp_path: Path, wrong: str) -> None:
    attributes, what, cause = TRAINED[wrong]
    with pytest.raises(PluginError) as caught:
        _train(tmp_path, attributes, overrides=["train.trainable=ttt+attention"])
    told = str(caught.value)
    assert f"the plugin toy ({__name__}) failed in {what}, " in told
    assert re.search(r"(test_asking|toy)\.py:\d+: ", told)
    assert cause in told
    assert "\n" not in told
    assert caught.value.exit_code == 3


def test_a_window_that_cannot_be_described_hides_no_other_error() -> None:
    backbone = type("Wrong", (ToyBackbone,), {"dataset": _with_dataset(Undescribed)})()
    checked = check_config("c.yaml", text="backbone: {name: toy}", backbone=backbone)
    dataset = backbone.dataset(checked.config, split="train", device="cpu")
    assert dataset.describe(3).startswith("window 3 (the plugin toy")


def test_a_layer_that_is_never_called_is_told_before_backward(tmp_path: Path) -> None:
    def sites(self: ToyBackbone, model: nn.Module) -> Any:
        return [replace(site, subclass=type(site.module)) for site in ToyBackbone.sites(self, model)]

    with pytest.raises(InactiveLayerError, match=r"never reached it; the site that the backbone toy offers there"):
        _train(tmp_path, {"sites": sites})


# --- what passes ---


def _raising(error: BaseException) -> Any:
    def loss(self: Backbone, *_: Any) -> Any:
        raise error

    return type("Raising", (ToyBackbone,), {"loss": loss})()


@pytest.mark.parametrize(
    "error",
    [
        UsageError("write less"),
        KeyboardInterrupt(),
        BrokenPipeError(32, "Broken pipe"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_bug_of_the_plugin_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        _raising(error).loss(None, None, None)
    assert caught.value is error


def test_out_of_memory_is_told_as_that(tmp_path: Path) -> None:
    def loss(self: Backbone, *_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(EnvironmentProblem, match="out of memory: CUDA out of memory"):
        _train(tmp_path, {"loss": loss})


def test_between_its_own_methods_a_plugin_catches_what_it_raises() -> None:
    class Trying(ToyBackbone):
        def tiny_like(self, options: Any) -> Any:
            raise KeyError("small")

        def tiny(self) -> Any:
            try:
                return self.tiny_like(None)
            except KeyError:
                return super().tiny()

    assert Trying().tiny().dim == 16


def test_what_makes_many_samples_is_asked_too() -> None:
    class Making(ToyBackbone, Sampling):
        plan_sample = sample = None  # type: ignore[assignment]

        def prepare_samples(self, *_: Any, **__: Any) -> Any:
            return answers.pop()

    def lost(request: Any) -> Any:
        raise KeyError("out")

    answers: list[Any] = [None, lambda request: "a.mp4", lost, lambda request: [Path("a.mp4")]]
    made = Making().prepare_samples(None, [], None, console=None)  # type: ignore[arg-type]
    assert made(None) == [Path("a.mp4")]  # type: ignore[arg-type]
    for words in ("failed in what `prepare_samples` returned, .*KeyError", "it returned a str, not the files"):
        make = Making().prepare_samples(None, [], None, console=None)  # type: ignore[arg-type]
        with pytest.raises(PluginError, match=words):
            make(None)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="it returned None, not a function of a SampleRequest"):
        Making().prepare_samples(None, [], None, console=None)  # type: ignore[arg-type]


def test_every_method_is_guarded_and_nearly_every_answer_checked() -> None:
    class Own(ToyBackbone):
        def loss(self, *_: Any) -> Any:
            raise KeyError

        stream = staticmethod(lambda *_, **__: 1 / 0)  # type: ignore[assignment]

    methods = {name for base in (Backbone, *CAPABILITIES) for name in methods_of(base)}
    assert set(ANSWERS) | {"check_sample", "check_answer", "precompute", "set_gradient_checkpointing"} == methods
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        Own().stream(None, None, pieces=[])
    assert inspect.signature(ToyBackbone.facts).parameters.keys() == {"self", "config"}
    assert ToyBackbone.facts.__doc__ == inspect.unwrap(ToyBackbone.facts).__doc__


METHODS = [(kind, name) for kind, name in MEMBERS if inspect.isfunction(getattr(kind, name))]


@pytest.mark.parametrize(("kind", "member"), METHODS, ids=[name for _, name in METHODS])
def test_every_method_of_a_capability_is_guarded_however_it_came(kind: type[Capability], member: str) -> None:
    def fails(self: Any, *_: Any, **__: Any) -> Any:
        raise KeyError("lost")

    methods = dict.fromkeys(kind.__abstractmethods__, fails) | {member: fails}
    own = type("Own", (ToyBackbone, kind), methods)
    mixed = type("Mixed", (type("Part", (), methods), ToyBackbone, kind), {})
    of_a_kind = type("Later", (type("Part", (kind,), methods), ToyBackbone), {})
    for cls in (own, mixed, of_a_kind, type("Heir", (own,), {})):
        with pytest.raises(PluginError, match=rf"the plugin toy .* failed in `{member}`, .*KeyError: 'lost'"):
            getattr(cls(), member)()


def _of_scores(nll: torch.Tensor | None, mask: Any = None) -> Any:
    return lambda self, *_: nll if mask is None else Scores(nll, mask)


def _streaming(**methods: Any) -> Any:
    stream = type("Stream", (ToyStream,), methods)
    return {"stream_of": lambda self, model: stream(model)}


ZEROS, TRUE = torch.zeros(2, 1, 3), torch.ones(2, 1, 3, dtype=torch.bool)
MISSCORED = {
    # name: (what the class has, what fails, the reason)
    "a tensor": ({"score": _of_scores(ZEROS)}, "`score`", "it returned a Tensor, not a Scores"),
    "no streams": ({"score": _of_scores(ZEROS[0], TRUE)}, "`score`", r"nll is \[1, 3\], not a tensor \[B, K, T\]"),
    "another mask": (
        {"score": _of_scores(ZEROS, TRUE[:1])},
        "`score`",
        r"nll is \[2, 1, 3\], and whose mask \[1, 1, 3\]",
    ),
    "weights as mask": ({"score": _of_scores(ZEROS, ZEROS)}, "`score`", "whose mask torch.float32, not bool"),
    "no context": ({"score_stream": lambda self, *_, **__: 3}, "`score_stream`", "an int, not a context that gives"),
    "no stream": ({"stream_of": lambda self, model: model}, "`score_stream`", "a ToyModel without `read`"),
    "no end": (_streaming(finish=None), "`score_stream`", "a Stream without `finish`"),
    "a piece that fails": (_streaming(read=lambda *_: 1 / 0), "`read` of its score stream", "ZeroDivisionError"),
    "a piece of nothing": (_streaming(read=lambda *_: None), "`read` of its score stream", "None, not a Scores"),
    "an end of nothing": (
        _streaming(finish=lambda *_: ZEROS),
        "`finish` of its score stream",
        "a Tensor, not a Scores",
    ),
    "weights that stay": (_streaming(learn_anew=lambda *_: {}["w"]), "`learn_anew` of its score stream", "KeyError"),
    "words": ({"example_clips": lambda self, *_, **__: "a b"}, "`example_clips`", "a str, not clips"),
}


@pytest.mark.parametrize("wrong", MISSCORED)
def test_wrong_scores_are_told(wrong: str) -> None:
    methods, method, reason = MISSCORED[wrong]
    backbone = type("Own", (ScoringToy,), methods)()
    model = backbone.build(backbone.tiny(), device="cpu", dtype=torch.float32)
    with pytest.raises(PluginError, match=rf"the plugin toy .* failed in {method}, .*: .*{reason}"):
        _score_and_stream(backbone, model)


def _score_and_stream(backbone: ScoringToy, model: nn.Module) -> None:
    clips = backbone.example_clips(model, batch_size=2, tokens=3, seed=0)
    backbone.score(model, clips)
    with backbone.score_stream(model, batch_size=2) as stream:
        stream.read(clips)
        stream.learn_anew()
        stream.finish()


def test_what_a_caller_raises_between_pieces_is_not_the_plugins() -> None:
    backbone = ScoringToy()
    model = backbone.build(backbone.tiny(), device="cpu", dtype=torch.float32)
    with pytest.raises(KeyError, match="mine"), backbone.score_stream(model, batch_size=2):
        raise KeyError("mine")


def test_a_capability_is_asked_for_and_who_lacks_it_learns_who_has_it(tmp_path: Path) -> None:
    plain, able = toy.TwoWayToy(), type("Able", (toy.MakingToy, ScoringToy, toy.AnsweringToy), {})()
    for kind in CAPABILITIES:
        assert capability(able, kind) is able
        assert has_capability(able, kind)
        assert not has_capability(plain, kind)
        assert not has_capability(None, kind)
    assert set(kinds_of(type(able))) == set(CAPABILITIES)
    assert kinds_of(toy.MakingToy) == [
        Streaming,
        Sampling,
        Precomputing,
        DataReading,
        Indexing,
        WeightImport,
        DiffusionScoring,
        SegmentReset,
        LowRank,
    ]
    with importable(tmp_path), pytest.raises(UsageError) as caught:
        capability(plain, Streaming)
    told = "the backbone twoway has no streaming: it reads sequences whole; of the installed backbones "
    assert str(caught.value) == told + "moshi, transformers have it"
    source = "from toy import MakingToy\nfrom ttt.plugins import hookimpl\n@hookimpl\ndef ttt_backbone():\n    return "
    install(tmp_path, "toy", "making_plugin", source + "MakingToy()\n")
    install(tmp_path, "lost", "lost_plugin", "import nothing_of_that_name\n")  # a broken one has none, and stops nobody
    with importable(tmp_path), pytest.raises(UsageError, match=r"; of the installed backbones toy, videodit have it$"):
        capability(plain, Sampling)
    for make, asked in ((sample, None), (sample_many, [])):
        with pytest.raises(UsageError, match="the backbone twoway has no sampling"):
            make(None, plain, asked)  # type: ignore[operator]


def test_a_capability_of_a_third_partys_own_is_guarded_and_asked_for_alike() -> None:
    class Voting(Capability):
        def vote(self) -> int:
            return 1

    class Voter(ToyBackbone, Voting):
        def vote(self) -> int:
            raise KeyError("urn")

    with pytest.raises(PluginError, match=r"failed in `vote`, .*KeyError: 'urn'"):
        capability(Voter(), Voting).vote()
    with pytest.raises(UsageError, match="the backbone toy has no Voting; no installed backbone has it"):
        capability(ToyBackbone(), Voting)


def test_an_error_is_told_in_one_line_of_letters() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise ValueError

    for error, told in (
        (ValueError("a\nb\x1b[31m\x9b"), "ValueError: a b�[31m�;"),
        (ValueError("x" * 9_000), "xxx…;"),
        (MuteError(), "MuteError;"),
    ):
        with pytest.raises(PluginError) as caught:
            _raising(error).loss(None, None, None)
        assert told in str(caught.value)
        assert caught.value.__cause__ is error
