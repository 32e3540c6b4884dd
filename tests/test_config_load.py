"""From a file to a run: defaults, overrides, every finding at once, what plugins may break, and the way back."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_distributions import TOY, importable, install
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from toy_config import DEMO, ToyBackbone, ToyOptions

from ttt.check import check_config, load_config, render_text
from ttt.config import BackboneOptions, Finding, RunConfig, Severity, TTTConfig, dump_config
from ttt.config.schema import MOST_RATE
from ttt.config.spelling import nearest
from ttt.errors import ConfigEnvironmentError, ConfigError, EnvironmentProblem, NestedCheckpointWarning
from ttt.plugins import discover, run_config_model

TOY_BACKBONE = ToyBackbone()


def _load(text: str, *overrides: str, backbone: Any = TOY_BACKBONE) -> RunConfig:
    return load_config("c.yaml", text=text, backbone=backbone, overrides=overrides).config


def _refused(text: str, *overrides: str, backbone: Any = TOY_BACKBONE) -> tuple[Finding, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config("c.yaml", text=text, backbone=backbone, overrides=overrides)
    assert caught.value.findings
    return caught.value.findings


def _one(text: str, *overrides: str, backbone: Any = TOY_BACKBONE) -> Finding:
    (finding,) = _refused(text, *overrides, backbone=backbone)
    return finding


# --- what a config becomes ---


def test_a_file_becomes_a_config_of_the_plugins_own_types(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("backbone: {name: toy, dim: 64}\ndata: {window_tokens: 32}\n")
    loaded = load_config(file, backbone=TOY_BACKBONE)
    assert loaded.backbone is TOY_BACKBONE
    assert loaded.config.backbone == ToyOptions(name="toy", dim=64)
    assert loaded.config.data.window_tokens == 32  # type: ignore[attr-defined]
    assert loaded.source.file == str(file)
    assert loaded.findings == ()


def test_a_file_that_is_not_there_is_an_environment_problem(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="a path or a text"):
        load_config(None)


def test_the_plugins_defaults_hold_where_no_preset_is_written() -> None:
    assert _load("ttt: {layers: all}").ttt == TTTConfig.model_validate(TOY_BACKBONE.ttt_defaults)
    assert _load("ttt: {qkvo_bias: false}").ttt.qkvo_bias is False
    assert _load("ttt: {preset: lm}").ttt == TTTConfig()
    # a learning rate for the other inner model is no default for this one
    assert _load("ttt: {layer_type: linear}").ttt.base_lr == 1.0
    assert _load("ttt: {layer_type: mlp}").ttt.base_lr == 0.1


@pytest.mark.parametrize("section", ["backbone", "ttt", "data", "train", "eval"])
def test_a_section_whose_keys_are_all_commented_out_is_the_default(section: str) -> None:
    assert _load(f"{section}:\n  # key: value\n") == _load("run_dir: null")


def test_overrides_are_yaml_and_win() -> None:
    config = _load(
        DEMO, "ttt.layers=29,30", "train.lr=1e-5", "backbone.depth=32", "train.betas=[0.8, 0.9]", "run_dir=runs/x"
    )
    assert config.ttt.layers == (29, 30)
    assert config.train.lr == 1e-5
    assert config.train.betas == (0.8, 0.9)
    assert config.run_dir == "runs/x"


def test_an_override_heals_what_the_file_gets_wrong() -> None:
    assert _load("train: {max_steps: many}", "train.max_steps=2").train.max_steps == 2


def test_evaluation_numbers_are_whole_numbers() -> None:
    assert _load("ttt: {scan_checkpoint_group_size: 1e6}").ttt.scan_checkpoint_group_size == 1_000_000


def test_the_run_config_of_a_backbone_is_one_class_and_describes_its_sections() -> None:
    model = run_config_model(TOY_BACKBONE)
    assert model is run_config_model(ToyBackbone())
    assert issubclass(model, RunConfig)
    schema = model.model_json_schema()
    assert schema["properties"]["backbone"]["description"] == "The pretrained model."
    assert schema["$defs"]["ToyOptions"]["properties"]["flavour"]["enum"] == ["sweet", "sour"]
    assert model.model_validate({"backbone": {"name": "toy"}}).data.shuffle is True


def test_loading_warns_by_findings_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_config("c.yaml", text="ttt: {scan_checkpoint_group_size: 1}", backbone=TOY_BACKBONE)
    assert [finding.code for finding in loaded.findings] == ["TTT201"]
    assert str(loaded.findings[0].place) == "c.yaml:1:35"
    with pytest.warns(NestedCheckpointWarning):
        TTTConfig(scan_checkpoint_group_size=1)


# --- what is wrong with it ---

ALL_AT_ONCE = """\
backbone:
  name: toy
  dmi: 32
ttt:
  layers: [1, -2]
  mini_batch_sise: 16
  lr: 3
  layer_type: mpl
  causal: yes
data:
  train_data: nowhere.jsonl
  shuffle: "false"
train:
  max_steps: 1.5
  betas: [0.9]
  betas: [0.9, 0.99]
  warmup_steps: 1_000
  seed: null
eval: 5
max_steps: 3
"""


def test_all_findings_of_a_file_come_at_once_in_its_order() -> None:
    findings = _refused(ALL_AT_ONCE, "ttt.rope=spiral", "train.lr=-1")
    found = [(str(finding.place), finding.code, finding.path) for finding in findings]
    assert found == [
        ("c.yaml:3:3", "TTT101", "backbone.dmi"),
        ("c.yaml:5:15", "TTT103", "ttt.layers.1"),
        ("c.yaml:6:3", "TTT101", "ttt.mini_batch_sise"),
        ("c.yaml:7:3", "TTT105", "ttt.lr"),
        ("c.yaml:8:15", "TTT103", "ttt.layer_type"),
        ("c.yaml:9:11", "TTT102", "ttt.causal"),
        ("c.yaml:11:15", "TTT501", "data.train_data"),
        ("c.yaml:12:12", "TTT102", "data.shuffle"),
        ("c.yaml:14:14", "TTT102", "train.max_steps"),
        ("c.yaml:15:10", "TTT102", "train.betas"),
        ("c.yaml:16:3", "TTT002", "train.betas"),
        ("c.yaml:17:17", "TTT102", "train.warmup_steps"),
        ("c.yaml:18:9", "TTT102", "train.seed"),
        ("c.yaml:19:7", "TTT102", "eval"),
        ("c.yaml:20:1", "TTT105", "max_steps"),
        ("--set ttt.rope=spiral", "TTT103", "ttt.rope"),
        ("--set train.lr=-1", "TTT103", "train.lr"),
    ]
    assert {finding.severity for finding in findings} == {Severity.ERROR}


def test_the_error_is_the_rendered_findings_with_their_count() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("c.yaml", text="ttt: {layrs: all}\ntrain: {lr: x}", backbone=TOY_BACKBONE)
    text = str(caught.value)
    assert text == f"{render_text(caught.value.findings)}\nc.yaml: 2 errors"
    assert "    1 | ttt: {layrs: all}\n      |       ^^^^^\n    fix: write `layers`" in text
    assert caught.value.exit_code == 2


WORDS = [
    ("ttt: {layers: 3.5}", "`ttt.layers` must be one of `all`, `middle`, `none` or a list, not 3.5", ""),
    ("ttt: {layers: middel}", "'middel' is no value of `ttt.layers`", 'write "all", "middle", "none"'),
    ("ttt: {layers: [1, 1]}", "`ttt.layers`: a layer is named twice", ""),
    ("ttt: {layers: [1, x]}", "`ttt.layers.1` must be a whole number, not 'x'", "write a whole number"),
    ("ttt: {layer_type: MLP}", "must be one of `linear`, `mlp`, not 'MLP'", "write `mlp`"),
    ("ttt: {base_lr: '0.1'}", "must be a number, not '0.1'", "write `0.1`, without quotes"),
    ("ttt: {mini_batch_size: 1_024}", "must be a whole number, not '1_024'", "write `1024`"),
    ("ttt: {causal: on}", "must be true or false, not 'on'", "write `true`"),
    ("ttt: {causal: 1}", "must be true or false, not 1", "write true or false (default: true)"),
    ("ttt: {num_heads: None}", "must be a whole number, not 'None'", "write `null`"),
    ("ttt: {num_heads: 0}", "must be at least 1, not 0", "write a whole number of at least 1 (default: null)"),
    ("ttt: {base_lr: .inf}", "must be a finite number, not inf", "write a finite number"),
    ("ttt: {base_lr: null}", "must be a number, not null", "write a number"),
    ("ttt: {mlp_hidden_dims: 8}", "must be a list, not 8", "write a list"),
    ("ttt: [1]", "`ttt` must be a section of `key: value`, not a list", "write its keys below it, indented: `preset`"),
    ("train: {lr: 0}", "must be greater than 0, not 0", "write a number greater than 0 (default: 0.0001)"),
    ("train: {betas: [0.9, 1]}", "`train.betas.1` must be less than 1, not 1", "write a number less than 1"),
    ("train: {betas: [0.9]}", "`train.betas` has too few values", "write every value"),
    ("train: {betas: [0.9, 0.9, 0.9]}", "`train.betas` must be a list of at most 2", ""),
    ("train: {max_steps: {a: 1}}", "must be a whole number, not a section", ""),
    ("run_dir: 5", "`run_dir` must be text, not 5", "write text (default: null)"),
    ("data: {shuffle: off}", "must be true or false, not 'off'", "write `false`"),
    ("train: {ttt: {layers: all}}", "`ttt` is no key of `train`: it stands at the top level", "at the left margin"),
    ("ttt: {run_dir: x}", "`run_dir` is no key of `ttt`", "write `run_dir:` at the left margin"),
    ("layers: all", "`layers` stands at the top level, but belongs to `ttt`", "move it to `ttt`"),
    ("ttt: {wieght_decay: 1}", "unknown key `wieght_decay` in `ttt`", "write `weight_decay`, and in `train`"),
    ("eval: {zzz: 1}", "unknown key `zzz` in `eval`", "the keys in `eval` are `eval_freq`, `max_batches`"),
    ("zzz: 1", "unknown key `zzz` at the top level", "`run_dir`"),
    ("Train: {lr: 1}", "unknown key `Train`", "write `train`"),
    ("backbone: {name: toy, flavour: sour}", "flavour: sour has no weights of its own", "write weights: FILE"),
    ("backbone: toy", "`backbone` must be a section", "write `backbone: {name: toy}`"),
    ("backbone: [toy]", "`backbone` must be a section", "write its keys below it"),
    ("backbone: {name: 5}", "`backbone.name` must be text", ""),
    ("backbone: {name: null}", "`backbone.name` is null", "write"),
    ("backbone: {name: sweet}", "the config is for sweet, but toy was asked for", "leave one of the two out"),
]


@pytest.mark.parametrize(("text", "message", "fix"), WORDS)
def test_findings_are_in_plain_words(text: str, message: str, fix: str) -> None:
    first = _refused(text)[0]
    assert message in first.message
    assert fix in first.fix
    assert first.place is not None
    assert first.place.line == 1
    assert "Input" not in first.message


FOLLOW_UPS = [
    # what the user writes          what alone is to be said
    ("ttt: {layer_type: mpl, mlp_layers: 3, mlp_hidden_dims: [8, 8]}", ["ttt.layer_type"]),
    ("ttt: {layer_typ: linear, mlp_layers: 3}", ["ttt.layer_typ"]),
    ("ttt: {mini_batch_size: x, scan_checkpoint_group_size: 1}", ["ttt.mini_batch_size"]),
    ("ttt: {mini_batch_sise: 500, scan_checkpoint_group_size: 1}", ["ttt.mini_batch_sise"]),
    ("{ttt: {persistent_states: true}, data: {shufle: false}}", ["data.shufle"]),
    ("{ttt: {layers: [99]}, backbone: {dpeth: 100}}", ["backbone.dpeth"]),
    ("{train: {warmup_steps: 2000}, max_steps: 5000}", ["max_steps"]),
    ("{train: {warmup_steps: 2000, max_stepz: 5000}}", ["train.max_stepz"]),
    ("{ttt: 5, train: {trainable: ttt}}", ["ttt"]),
    ("{backbone: {nmae: toy}}", ["backbone.nmae"]),
    ("{backbone: {flavour: sour, wieghts: x}}", ["backbone.wieghts"]),
    # two faults of one key are both there
    ("ttt: {mini_batch_sise: 16, mini_batch_size: 0}", ["ttt.mini_batch_sise", "ttt.mini_batch_size"]),
    # what stands between keys is found beside what is wrong with another
    ("ttt: {rope: spiral, mlp_layers: 3, mlp_hidden_dims: [8]}", ["ttt.rope", "ttt.mlp_hidden_dims"]),
    ("{train: {lr: x}, ttt: {layers: [99]}}", ["train.lr", "ttt.layers.0"]),
    ("{data: {zzz: 1}, ttt: {layers: [99]}}", ["data.zzz", "ttt.layers.0"]),
]


@pytest.mark.parametrize(("text", "paths"), FOLLOW_UPS)
def test_nothing_is_said_about_what_only_follows(text: str, paths: list[str]) -> None:
    assert [finding.path for finding in _refused(text)] == paths


def test_a_setting_that_does_not_fit_another_is_placed_at_what_the_user_wrote() -> None:
    # learnable_token_idx comes from the defaults; causal is what the user can see
    finding = _one("ttt: {causal: false, rope: none, mini_batch_size: 1}")
    assert (finding.code, finding.path, str(finding.place)) == ("TTT106", "ttt.causal", "c.yaml:1:15")


# --- suggestions ---


def _misspellings(key: str) -> Iterator[str]:
    """Every word that is one edit away: a letter less, more, another, or two swapped."""
    letters = "e_"
    for i in range(len(key) + 1):
        yield from (key[:i] + letter + key[i:] for letter in letters)
        if i < len(key):
            yield key[:i] + key[i + 1 :]
            yield from (key[:i] + letter + key[i + 1 :] for letter in letters)
        if i + 1 < len(key):
            yield key[:i] + key[i + 1] + key[i] + key[i + 2 :]


def test_nearly_every_misspelling_gets_the_key_that_was_meant() -> None:
    model = run_config_model(TOY_BACKBONE)
    sections = [model, *(info.annotation for info in model.model_fields.values())]
    right = total = 0
    for section in sections:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        keys = list(section.model_fields)
        for key in keys:
            for word in sorted(set(_misspellings(key)) - set(keys) - {""}):
                total += 1
                right += nearest(word, keys) == key
    assert total > 3_000
    assert right / total >= 0.99


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("miniBatchSize", "mini_batch_size"),
        ("mini-batch-size", "mini_batch_size"),
        ("minibatch", "mini_batch_size"),
        ("batch", None),
        ("max", None),
        ("LR", "lr"),
        ("warmup", "warmup_steps"),
        ("xyzzy", None),
        ("", None),
    ],
)
def test_words_further_off(word: str, meant: str | None) -> None:
    keys = ["mini_batch_size", "lr", "warmup_steps", "max_norm", "max_steps"]
    assert nearest(word, keys) == meant
    assert nearest(word, []) is None


# --- the backbone ---


def test_the_config_or_the_caller_names_the_backbone(tmp_path: Path) -> None:
    install(tmp_path, "toy", "toy_plugin", TOY)
    with importable(tmp_path):
        assert load_config(None, text=DEMO).backbone.name == "toy"
        assert load_config(None, text="run_dir: x", backbone="toy").config.backbone.name == "toy"
        assert load_config(None, text=DEMO, backbone="toy").config.ttt.layers == (1, 2)
        assert load_config(None, text="run_dir: x", overrides=["backbone.name=toy"]).backbone.name == "toy"


def test_a_backbone_that_nobody_has(tmp_path: Path) -> None:
    install(tmp_path, "toy", "toy_plugin", TOY)
    with importable(tmp_path):
        nobody, elsewhere = _refused("backbone: {name: tyo}\nttt: {layrs: all}\n", backbone=None)
        assert (nobody.code, str(nobody.place), nobody.fix) == ("TTT801", "c.yaml:1:18", "write `toy`")
        assert elsewhere.code == "TTT101"  # what does not hang on the backbone is found all the same
        assert str(_one("run_dir: x", backbone="tyo").place) == "--backbone tyo"
        missing = _one("run_dir: x", backbone=None)
        assert (missing.code, str(missing.place)) == ("TTT104", "c.yaml:1:1")
        assert "`toy`" in missing.fix


def test_a_broken_plugin_is_a_finding_with_its_cause(tmp_path: Path) -> None:
    install(tmp_path, "toy", "toy_plugin", "import a_package_that_nobody_has\n")
    with importable(tmp_path), pytest.raises(ConfigEnvironmentError) as caught:
        load_config("c.yaml", text=DEMO)
    (finding,) = caught.value.findings
    assert (finding.code, str(finding.place)) == ("TTT802", "c.yaml:3:9")
    assert "ttt-toy 1.2 is broken: ModuleNotFoundError" in finding.message
    assert caught.value.exit_code == 3


def test_an_option_of_another_backbone_is_said_to_be_one(tmp_path: Path) -> None:
    install(
        tmp_path,
        "other",
        "other_plugin",
        "from toy_config import *\n"
        "class Options(BackboneOptions):\n    colour: str = 'red'\n"
        "class Other(ToyBackbone):\n    name = 'other'\n    options = Options\n"
        "@hookimpl\ndef ttt_backbone():\n    return Other()\n",
    )
    with importable(tmp_path):
        finding = _one("backbone: {name: toy, colour: blue}")
    assert (finding.code, str(finding.place)) == ("TTT107", "c.yaml:1:23")
    assert "an option of the backbone other" in finding.message


class _NeedsPath(BackboneOptions):
    weights: str
    """Where the weights lie."""


def test_a_required_key_is_described_where_it_is_missing() -> None:
    class Needs(ToyBackbone):
        options = _NeedsPath

    finding = _one("train: {lr: 1}\nbackbone:\n  name: toy\n", backbone=Needs())
    assert (finding.code, finding.path, str(finding.place)) == ("TTT104", "backbone.weights", "c.yaml:2:1")
    assert finding.fix == "write `weights: …` (Where the weights lie)"


def test_data_that_is_missing_is_the_machines_fault_unless_the_config_is_wrong_too() -> None:
    with pytest.raises(ConfigEnvironmentError) as caught:
        _load("data: {train_data: nowhere.jsonl, eval_data: nowhere.jsonl}")
    assert caught.value.exit_code == 3
    with pytest.raises(ConfigError) as worse:
        _load("data: {train_data: nowhere.jsonl}\ntrain: {lr: x}")
    assert worse.value.exit_code == 2


# --- what a plugin may break ---


def _failing(**attributes: Any) -> ToyBackbone:
    return type("Failing", (ToyBackbone,), {"__module__": __name__, **attributes})()


def _raise(*_: Any) -> Any:
    raise KeyError("dim")


_RAISED = f"{__file__}:{_raise.__code__.co_firstlineno + 1}"


def _notes(config: RunConfig) -> list[Finding]:
    return [Finding(code="TOY1", severity=Severity.NOTE, path="ttt.layers", message="layers are nice")]


def test_a_plugins_rules_are_run_and_placed() -> None:
    loaded = load_config("c.yaml", text="ttt:\n  layers: all\n", backbone=_failing(rules=(_notes,)))
    assert [(finding.code, str(finding.place)) for finding in loaded.findings] == [("TOY1", "c.yaml:2:11")]


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"rules": (_raise,)}, f"its rule _raise, {_RAISED}: KeyError: 'dim'"),
        ({"rules": (lambda config: ["a string"],)}, "it returned str, not Finding"),
        ({"rules": (lambda config: None,)}, "TypeError"),
        ({"facts": _raise}, f"`facts`, {_RAISED}: KeyError: 'dim'"),
        ({"facts": lambda self, config: {"dim": 32}}, "it returned a dict, not a BackboneFacts"),
        ({"options": None}, "Failing.options is None, not a subclass of BackboneOptions"),
        ({"data_options": int}, "Failing.data_options is <class 'int'>, not a subclass of DataOptions"),
        ({"ttt_defaults": 5}, "its options"),
        ({"ttt_defaults": {"layrs": "all"}}, "the plugin's own defaults do not fit: unknown key `ttt.layrs`"),
        ({"ttt_defaults": {"base_lr": "much"}}, "the plugin's own defaults do not fit: `ttt.base_lr` must be a number"),
        ({"ttt_defaults": {"mlp_hidden_dims": [4]}}, "the plugin's own defaults do not fit: mlp_hidden_dims needs"),
    ],
)
def test_a_plugin_that_fails_is_a_finding_about_the_plugin(attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigEnvironmentError) as caught:
        _load("backbone: {name: toy}\nttt: {layers: all}\n", backbone=_failing(**attributes))
    (finding,) = caught.value.findings
    assert finding.code == "TTT803"
    assert words in finding.message


def test_a_validator_that_raises_is_a_finding_about_the_plugin() -> None:
    class Options(ToyOptions):
        @property
        def broken(self) -> int:
            return 1

        def model_post_init(self, context: Any, /) -> None:
            raise RuntimeError("no such thing")

    line = Options.model_post_init.__code__.co_firstlineno + 1
    finding = _one("backbone: {name: toy}", backbone=_failing(options=Options))
    assert (finding.code, finding.message) == (
        "TTT803",
        f"the plugin toy ({__name__}) failed in its options, {__file__}:{line}: RuntimeError: no such thing",
    )


def test_one_failing_rule_hides_no_other() -> None:
    findings = _refused("train: {max_steps: 5, warmup_steps: 6}", backbone=_failing(rules=(_raise, _notes)))
    assert [finding.code for finding in findings] == ["TTT803", "TOY1", "TTT701"]  # the first two rest on no line


# --- the way back ---


@pytest.mark.parametrize(
    "text",
    [
        "run_dir: null",
        DEMO,
        "ttt: {preset: video, mini_batch_size: 1, rope: none}",
        "ttt: {layers: [3, 1], mlp_layers: 3, mlp_hidden_dims: [7, 9]}",
        "{data: {shuffle: false}, ttt: {persistent_states: true, base_lr: 1e-30}}",
        "{train: {lr: 1e22, betas: [0, 0.5], seed: 9223372036854775807}, run_dir: 'yes'}",
    ],
)
def test_a_dumped_config_loads_back_equal(text: str) -> None:
    config = _load(text)
    dumped = dump_config(config)
    assert _load(dumped) == config
    assert load_config(None, text=dumped, backbone=TOY_BACKBONE).config.model_dump() == config.model_dump()


def test_a_dumped_config_is_plain_and_complete() -> None:
    config = _load("ttt: {layers: [1, 2]}\ntrain: {lr: 1e-5}\nrun_dir: runs/é\n")
    dumped = dump_config(config)
    assert "  layers: [1, 2]\n" in dumped
    assert "  lr: 1e-05\n" in dumped
    assert "\nrun_dir: runs/é\n" in dumped
    assert "!" not in dumped
    assert [line.rstrip(":") for line in dumped.splitlines() if line.endswith(":") and line[0] != " "] == [
        "backbone",
        "ttt",
        "lora",
        "data",
        "train",
        "eval",
    ]
    written = yaml.safe_load(dumped)
    assert {key: set(value) for key, value in written.items() if isinstance(value, dict)} == {
        key: set(value) for key, value in config.model_dump().items() if isinstance(value, dict)
    }


_TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    [
        "1e5",
        "1e-5",
        "null",
        "~",
        "true",
        "yes",
        "on",
        "\x85",
        "a\nb ",
        "\u2028x",
        "0x1F",
        "0o7",
        "1:30",
        "2024-01-01",
        ".inf",
        "<<",
        "=",
        "- a",
        "",
    ]
)


@settings(deadline=None)
@given(
    run_dir=st.none() | _TEXT,
    weights=st.none() | _TEXT,
    lr=st.floats(min_value=0, exclude_min=True, max_value=MOST_RATE),
    layers=st.sampled_from(["all", "middle"]) | st.lists(st.integers(0, 3), unique=True, min_size=1).map(tuple),
)
def test_any_config_that_was_built_loads_back_equal(
    run_dir: str | None, weights: str | None, lr: float, layers: Any
) -> None:
    model = run_config_model(TOY_BACKBONE)
    config = model.model_validate(
        {
            "backbone": {"name": "toy", "weights": weights},
            "ttt": {"layers": layers},
            "train": {"lr": lr},
            "run_dir": run_dir,
        }
    )
    with contextlib.suppress(ConfigEnvironmentError):  # a run_dir that no file system takes
        assert load_config(None, text=dump_config(config), backbone=TOY_BACKBONE).config == config


_WORDS = st.sampled_from(
    ["backbone", "ttt", "data", "train", "eval", "run_dir", "name", "toy", "layers", "lr", "betas", "dim", "causal", ""]
)
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | _WORDS | _TEXT
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | _TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_no_mutation_of_a_config_raises_anything_else(data: st.DataObject) -> None:
    tree: Any = copy.deepcopy(yaml.safe_load(DEMO))
    for _ in range(data.draw(st.integers(1, 4))):
        section = data.draw(st.sampled_from([tree, *(value for value in tree.values() if isinstance(value, dict))]))
        model = run_config_model(TOY_BACKBONE)
        keys = [*model.model_fields, *TTTConfig.model_fields, "max_steps", "shuffle", "dim", "flavour"]
        section[data.draw(st.sampled_from(keys) | _TEXT)] = data.draw(_TREES)
    text = yaml.safe_dump(tree)
    overrides = data.draw(st.lists(_TEXT | st.just("ttt.layers=[9]") | st.just("train.lr.x=1"), max_size=2))
    try:
        loaded = load_config("c.yaml", text=text, backbone=TOY_BACKBONE, overrides=overrides)
    except ConfigError as error:
        findings: tuple[Finding, ...] = error.findings
        assert any(finding.severity is Severity.ERROR for finding in findings)
    else:
        findings = loaded.findings
        assert load_config(None, text=dump_config(loaded.config), backbone=TOY_BACKBONE).config == loaded.config
    assert all(finding.place is not None and finding.message for finding in findings)
    render_text(findings, color=True, width=80)


def test_what_is_given_is_not_changed() -> None:
    defaults: Mapping[str, Any] = dict(TOY_BACKBONE.ttt_defaults)
    _load("ttt: {layers: [1], base_lr: 3.0}", "ttt.rope=none")
    assert TOY_BACKBONE.ttt_defaults == defaults


def test_every_shipped_preset_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plugins = [plugin.backbone for plugin in discover() if plugin.backbone is not None]
    assert plugins
    for backbone in plugins:
        assert "demo" in backbone.presets()
        for text in backbone.presets().values():
            checked = check_config(None, text=text)
            assert checked.backbone is backbone
            assert checked.config is not None
            # What it reads, data or another stage's run, is the user's to bring: TTT5xx, and plugins' own likewise.
            about_data = [finding for finding in checked.findings if re.fullmatch("[A-Z]+5[0-9]{2}", finding.code)]
            # So are the memory and the disk of the machine that checks.
            about_machine = {"TTT401", "TTT402", "TTT403", "TTT404"}
            left = [f for f in checked.findings if f not in about_data and f.code not in about_machine]
            assert [finding for finding in left if finding.severity is not Severity.NOTE] == []


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("ttt: {layer_type: [mlp]}", "TTT103"),
        ("ttt: {layer_type: {mlp: 1}}", "TTT103"),
        ("ttt: {layers: [[1], [1]]}", "TTT102"),
    ],
)
def test_values_of_the_wrong_shape_are_not_blamed_on_the_plugin(text: str, code: str) -> None:
    assert {finding.code for finding in _refused(text)} == {code}
    findings = _refused(f"backbone: {{name: nothing}}\n{text}", backbone=None)  # where no plugin is known, too
    assert {finding.code for finding in findings} == {"TTT801", code}
