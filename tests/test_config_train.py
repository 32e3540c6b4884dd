"""The `train` section: other projects' words for what learns, schedules by role."""

from __future__ import annotations

import json

import pytest
from toy_config import ToyBackbone

from ttt.check import check_config, load_config
from ttt.check.json_schema import json_schema
from ttt.config import RunConfig
from ttt.config.dumping import dump_config
from ttt.config.schema import TrainConfig

BACKBONE = ToyBackbone()


def findings(text: str) -> list[tuple[str, str, str, str]]:
    found = check_config("c.yaml", text=text, backbone=BACKBONE).findings
    return [(finding.code, finding.path, finding.message, finding.fix) for finding in found]


@pytest.mark.parametrize(
    ("word", "kept"),
    [("sft", "all"), ("qkvo", "ttt+attention"), ("all", "all"), ("ttt+attention", "ttt+attention"), ("ttt", "ttt")],
)
def test_the_fields_words_for_what_learns_are_kept_as_ours(word: str, kept: str) -> None:
    config = load_config(None, text=f"train: {{trainable: {word}}}", backbone=BACKBONE).config
    assert config.train.trainable == kept
    assert (
        load_config(None, text="run_dir: null", backbone=BACKBONE, overrides=[f"train.trainable={word}"]).config
        == config
    )
    again = load_config(None, text=dump_config(config), backbone=BACKBONE).config
    assert again == config
    assert f"trainable: {kept}" in dump_config(config)


def test_a_misspelt_word_gets_the_one_that_was_meant() -> None:
    for word, meant in (("sfts", "sft"), ("qkov", "qkvo"), ("al", "all"), ("ttt_attention", "ttt+attention")):
        ((code, path, message, fix),) = findings(f"train: {{trainable: {word}}}")
        assert (code, path, fix) == ("TTT103", "train.trainable", f"write `{meant}`")
        assert "one of `ttt`, `ttt+attention`, `ttt+ttt_layer_attention`, `all`, `sft`, `qkvo`" in message


def test_editors_know_every_word() -> None:
    properties = json_schema([BACKBONE])["$defs"]["TrainConfig"]["properties"]
    assert set(properties["trainable"]["enum"]) == {
        "ttt",
        "ttt+attention",
        "ttt+ttt_layer_attention",
        "all",
        "sft",
        "qkvo",
    }
    assert properties["trainable"]["default"] == "ttt"
    assert set(properties["lr_schedule"]["enum"]) == {"cosine", "linear", "constant"}
    assert {"type": "null"} in properties["backbone_lr_schedule"]["anyOf"]
    json.dumps(properties)


def test_a_schedule_of_what_is_frozen_is_refused() -> None:
    ((code, path, message, fix),) = findings("train: {backbone_lr_schedule: linear}")
    assert (code, path) == ("TTT106", "train.backbone_lr_schedule")
    assert "trainable: ttt freezes it" in message
    assert fix.startswith("write backbone_lr_schedule: null")
    assert findings("train: {backbone_lr_schedule: linear, trainable: sft}") == []


def test_how_far_a_gate_can_move_hangs_on_the_schedule() -> None:
    steps = "ttt: {initial_gating_alpha: 0.0}\ntrain: {lr: 1e-5, max_steps: 1000, min_lr_ratio: 0.0"
    assert findings(f"{steps}, lr_schedule: constant}}") == []  # 1000 steps of 1e-5: 0.01
    for schedule in ("cosine", "linear"):
        ((code, _, message, _),) = findings(f"{steps}, lr_schedule: {schedule}}}")
        assert code == "TTT704"
        assert "by 0.005 at most" in message


def test_a_logger_that_is_named_twice_is_refused() -> None:
    ((code, path, message, fix),) = findings("train: {loggers: [tensorboard, wandb, wandb]}")
    assert (code, path, fix) == ("TTT103", "train.loggers", "write wandb once")
    assert message.endswith("wandb is named twice, and would get every line twice")


def test_the_config_as_a_python_object_takes_the_words_too() -> None:
    assert TrainConfig(trainable="sft") == TrainConfig(trainable="all")
    assert RunConfig.model_validate({"backbone": {"name": "x"}, "train": {"trainable": "qkvo"}}).train == TrainConfig(
        trainable="ttt+attention"
    )
