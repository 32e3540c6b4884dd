"""`ttt import-config` of moshi-finetune's fork with TTT: every key acts here or is explained by a reason of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import import_configs
import pytest
import yaml

from ttt.check import check_config, load_config
from ttt.check.importing import write_imported
from ttt.config.source import parse_source
from ttt.errors import UsageError
from ttt.plugins import ImportedConfig
from ttt_cli.main import main
from ttt_moshi.importing import import_config

FORK = """\
data: {train_data: /far/dialogues.jsonl, eval_data: /far/held_out.jsonl, shuffle: false}
moshi_paths: {hf_repo_id: kyutai/moshiko-pytorch-bf16, mimi_path: null}
full_finetuning: false
lora: {enable: true, rank: 32, scaling: 2.0, ft_embed: false}
first_codebook_weight_multiplier: 100.0
text_padding_weight: 0.5
duration_sec: 300
batch_size: 1
max_steps: 2000
num_microbatches: 2
optim: {lr: 1e-6, weight_decay: 0.1, pct_start: 0.05}
seed: 42
log_freq: 10
eval_freq: 50
do_eval: true
ckpt_freq: 200
num_ckpt_keep: 5
save_adapters: true
param_dtype: bfloat16
overwrite_run_dir: true
run_dir: /far/run
rope_continuous: true
rope_reset_on_new_file: true
resume_from: null
reset_optimizer: false
reset_step: false
wandb: {project: mine, offline: false, key: null, run_name: first}
ttt:
  enable: true
  layers: "29,30,31"
  base_lr: 0.1
  mini_batch_size: 8
  persistent_states: true
  initial_gating_alpha: 0.005
  ttt_layer_context: 50
  non_ttt_layer_context: 100
  weight_lr_multiplier: 10.0
  alpha_lr_multiplier: 500.0
  unfrozen_attention_layers: "29,30,31"
  normalize_ttt_output: true
  target_output_norm: 25.0
  use_rope: true
  rope_theta: 10000.0
  ttt_mlp_layers: 5
  ttt_mlp_expansion_factor: 4.0
  optimize_chunk_size: true
  chunk_size: null
  max_chunk_size: 50
  prefer_efficiency: true
  log_inner_loop_losses: true
  inner_loop_log_interval: 10
  save_inner_loop_plots: true
  inner_loop_plot_dir: ./plots
  override_gating_alpha_on_resume: false
  enable_training_diagnostics: true
  training_diagnostic_frequency: 100
paper_metrics:
  paper_metrics_eval: true
  paper_metrics_freq: 500
  paper_metrics_use_silence: true
  paper_metrics_use_user_stream: false
  sblimp_audio_dir: /far/syntactic/test/
  sblimp_gold_csv: /far/gold.csv
  sblimp_max_pairs: 10
  sblimp_stream_config: moshi_silence
  tstory_audio_dir: /far/tsc
  tstory_max_pairs: 2000
  librilight_audio_dir: /far/light
  librilight_evaluation_mode: single_book
  librilight_book_name: emerald_city
  librilight_speaker_id: '100'
  librilight_max_chapters: 3
  librilight_num_sequences: 1
  librilight_streaming: {enabled: true, memory_check: true}
  results_dir: ./results
  save_results_json: true
  ttt_fig5_enable: true
  ttt_fig5_layers: [29, 30]
  ttt_fig5_max_T: 2048
  ttt_fig5_smooth: 10
"""
"""Each key of the fork's `args.py`, and of the section that its evaluation reads."""


def _imported(text: str) -> ImportedConfig:
    imported = import_config(text, file="old.yaml")
    assert imported is not None
    return imported


def _written(text: str) -> dict[str, Any]:
    source = parse_source(write_imported(_imported(text), origin="old.yaml"), file="new.yaml")
    assert not source.findings
    return dict(source.data)


def _with(changes: dict[str, str]) -> str:
    text = FORK
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def _leaves(data: dict[str, Any], path: str = "") -> set[str]:
    return {
        leaf
        for key, value in data.items()
        for leaf in (_leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}"})
    }


_UNREAD = {"colour", "lora.colour", "wandb.colour", "ttt.colour", "paper_metrics.colour"}


def test_no_key_is_lost_and_each_reason_is_its_own() -> None:
    text = _with({"ttt:\n": "colour: 1\nttt:\n  colour: 2\n", "ft_embed": "colour: 3, ft_embed"})
    text = text.replace("run_name", "colour: 4, run_name").replace("results_dir", "colour: 5\n  results_dir")
    imported = _imported(text)
    old = [key.old for key in imported.keys if key.old]
    assert set(old) == _leaves(yaml.safe_load(text))
    assert len(old) == len(set(old)), sorted(each for each in old if old.count(each) > 1)
    reasons = {key.old: key.note for key in imported.keys if key.new is None}
    assert all(reasons.values())
    unknown = {name for name, why in reasons.items() if "known here" in why or "which refuses it" in why}
    assert unknown == _UNREAD


def test_the_result_is_what_the_fork_trained() -> None:
    written = _written(FORK)
    backbone, train, ttt = written["backbone"], written["train"], written["ttt"]
    assert (backbone["ttt_layer_context"], backbone["non_ttt_layer_context"]) == (50, 100)
    assert written["adapter"] == "ttt+lora"
    assert written["lora"] == {"rank": 32, "scaling": 2.0}
    assert (ttt["layers"], ttt["mlp_layers"], ttt["mini_batch_size"], ttt["rope"]) == ("29,30,31", 5, 8, "mini_batch")
    assert (train["weight_lr_multiplier"], train["alpha_lr_multiplier"]) == (10.0, 500.0)
    assert (train["trainable"], train["lr"], train["warmup_steps"]) == ("ttt+ttt_layer_attention", 1e-6, 100)
    tasks = [task["name"] for task in written["eval"]["tasks"]]
    assert tasks == ["sblimp", "tstory", "librilight", "inner_loss"]
    assert written["eval"]["eval_freq"] == 500
    assert written["eval"]["tasks"][3] == {"name": "inner_loss", "data": "/far/light", "limit": 16, "positions": 2048}


def test_no_error_comes_from_the_import() -> None:
    found = check_config("new.yaml", text=write_imported(_imported(FORK), origin="old.yaml")).findings
    errors = [(finding.code, finding.path) for finding in found if finding.severity.value == "error"]
    assert {path.split(".")[0] for _, path in errors} <= {"data", "eval"}, errors  # what lies at /far
    assert not [code for code, _ in errors if code.startswith("TTT1")]


def test_a_section_of_the_evaluation_is_read_as_flat_keys_are() -> None:
    whole = yaml.safe_load(FORK)
    flat = {**{key: value for key, value in whole.items() if key != "paper_metrics"}, **whole["paper_metrics"]}
    assert _written(yaml.safe_dump(flat))["eval"] == _written(FORK)["eval"]
    without = {**whole, "paper_metrics": {"tstory_audio_dir": "s"}}  # paper_metrics_eval is false if it is left out
    assert "tasks" not in _written(yaml.safe_dump(without)).get("eval", {})
    both = _imported(FORK + "sstory_audio_dir: s\n")
    assert [key.note for key in both.keys if key.old == "sstory_audio_dir"] == [
        "paper_metrics has a section, which is what was read"
    ]


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("layers", ("ttt", "layers", "middle")),
        ("base_lr", ("ttt", "base_lr", 1.0)),
        ("persistent_states", ("ttt", "persistent_states", True)),
        ("weight_lr_multiplier", ("train", "weight_lr_multiplier", 10.0)),
        ("alpha_lr_multiplier", ("train", "alpha_lr_multiplier", 100.0)),
        ("use_rope", ("ttt", "rope", "none")),
    ],
)
def test_what_the_section_leaves_out_is_what_the_fork_trained_with(key: str, default: tuple[str, str, Any]) -> None:
    whole = yaml.safe_load(FORK)
    del whole["ttt"][key]
    section, name, value = default
    assert _written(yaml.safe_dump(whole))[section][name] == value


ON, OFF = "ttt:\n  enable: true", "ttt:\n  enable: false"
NO_LORA = {"lora: {enable: true": "lora: {enable: false"}


@pytest.mark.parametrize(
    ("changes", "adapter", "layers", "trainable"),
    [
        ({}, "ttt+lora", "29,30,31", "ttt+ttt_layer_attention"),
        (NO_LORA, "ttt", "29,30,31", "ttt+ttt_layer_attention"),
        ({ON: OFF}, "lora", "29,30,31", "ttt"),
        ({ON: OFF, 'layers: "29,30,31"\n  base': "layers: none\n  base"}, "lora", [29, 30, 31], "ttt"),
        ({**NO_LORA, "full_finetuning: false": "full_finetuning: yes"}, "ttt", "29,30,31", "all"),
        ({**NO_LORA, ON: OFF, "full_finetuning: false": "full_finetuning: yes"}, "ttt", "none", "all"),
        ({"full_finetuning: false": "full_finetuning: yes"}, None, "29,30,31", "all"),
        ({**NO_LORA, ON: OFF}, "ttt", "none", "ttt"),
        ({'unfrozen_attention_layers: "29,30,31"': "unfrozen_attention_layers: all"}, "ttt+lora", "29,30,31",
         "ttt+attention"),
        ({'unfrozen_attention_layers: "29,30,31"': "unfrozen_attention_layers: none"}, "ttt+lora", "29,30,31", "ttt"),
        ({'unfrozen_attention_layers: "29,30,31"': "unfrozen_attention_layers: '28'"}, "ttt+lora", "29,30,31", "ttt"),
    ],
)  # fmt: skip
def test_what_learns(changes: dict[str, str], adapter: str | None, layers: Any, trainable: str) -> None:
    written = _written(_with(changes))
    assert (written.get("adapter"), written["ttt"]["layers"], written["train"]["trainable"]) == (
        adapter,
        layers,
        trainable,
    )
    assert ("lora" in written) == (adapter in ("lora", "ttt+lora"))


def test_attention_of_other_layers_is_told() -> None:
    text = _with({'unfrozen_attention_layers: "29,30,31"': "unfrozen_attention_layers: '28,29'"})
    (told,) = [key.note for key in _imported(text).keys if key.old == "ttt.unfrozen_attention_layers"]
    assert "attention of layers 28, 29 learned, which are not the layers with TTT" in told


def test_a_frozen_baseline_says_how_it_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(_with({**NO_LORA, ON: OFF}))
    assert main(["import-config", str(old), "--out", str(tmp_path / "new.yaml")]) == 1
    out = capsys.readouterr().out
    assert "nothing learned there at all: measure the backbone as it is with `ttt eval` on this config" in out
    assert "error TTT702" in out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({**NO_LORA, "weight_lr_multiplier: 10.0": "weight_lr_multiplier: 1.0"}, True),
        (NO_LORA, False),  # ten times 1e-6 over 2,000 steps is enough
        ({ON: OFF, "weight_lr_multiplier: 10.0": "weight_lr_multiplier: 1.0"}, False),  # LoRA's own rate
    ],
)
def test_a_rate_for_lora_given_to_new_layers_is_told(
    changes: dict[str, str], told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(_with(changes))
    main(["import-config", str(old), "--out", str(tmp_path / "new.yaml")])
    out = capsys.readouterr().out
    assert ("warning TTT707" in out) == told
    assert "new TTT layers want 1e-4 or more" in " ".join(out.split())


def test_a_checkpoint_to_resume_from_is_another_programs() -> None:
    text = _with(
        {"resume_from: null": "resume_from: /far/checkpoint/consolidated", "reset_step: false": "reset_step: on"}
    )
    imported = _imported(text)
    assert imported.values["train.init_from"] is None
    notes = {key.old: key.note for key in imported.keys}
    assert "in a format of its own" in notes["resume_from"]
    assert notes["reset_step"].startswith("true: with train.init_from")
    assert notes["reset_optimizer"].startswith("false: optimiser and step went on there")
    unread = {key.old: key.note for key in _imported(FORK).keys}
    assert (
        unread["reset_step"] == unread["ttt.override_gating_alpha_on_resume"] == "without resume_from it was not read"
    )
    assert "train.init_from" not in _imported(FORK).values


# --- data ---


@pytest.mark.parametrize(
    ("train", "evaluated", "expected"),
    [
        ("a.jsonl", "b.jsonl", {"train_data": "a.jsonl", "eval_data": "b.jsonl"}),
        ("a.jsonl:0.5", "''", {"train_data": "a.jsonl", "eval_data": None}),
        (
            "'a.jsonl:3, folder/:1,'",
            "'b.jsonl:2,c.jsonl'",
            {
                "train_data": [{"path": "a.jsonl", "weight": 3.0}, {"path": "folder/", "weight": 1.0}],
                "eval_data": [{"path": "b.jsonl"}, {"path": "c.jsonl"}],
            },
        ),
        ("/x/LibriLight/a.jsonl", "''", {"train_data": "/x/LibriLight/a.jsonl", "eval_data": None, "format": "audio"}),
        (
            "/x/librilight/a.jsonl",
            "b.jsonl",
            {"train_data": [{"path": "/x/librilight/a.jsonl", "format": "audio"}], "eval_data": "b.jsonl"},
        ),
        ("'C:\\data\\a.jsonl'", "''", {"train_data": "C:\\data\\a.jsonl", "eval_data": None}),
        ("5", "''", {"train_data": 5, "eval_data": None}),
    ],
)
def test_sources_of_data(train: str, evaluated: str, expected: dict[str, Any]) -> None:
    written = _written(f"lora:\ndata: {{train_data: {train}, eval_data: {evaluated}}}\n")["data"]
    assert {key: value for key, value in written.items() if key not in ("shuffle", "duration_sec")} == expected


def test_a_path_that_a_shell_would_expand_is_told() -> None:
    for path, sign in (("$HOME/a.jsonl", "$"), ("~/a.jsonl", "~")):
        imported = _imported(f"lora:\ndata: {{train_data: '{path}'}}\n")
        assert imported.values["data.train_data"] == path
        (note,) = [key.note for key in imported.keys if key.old == "data.train_data"]
        assert note == f"{sign} is expanded neither there nor here: write the path out"


@pytest.mark.parametrize(
    ("shuffle", "section", "expected"),
    [
        ("true", "enable: true", "files"),
        ("yes", "enable: true, persistent_states: on", "files"),
        ("true", "enable: true, persistent_states: false", True),
        ("true", "enable: false, persistent_states: true", True),
        ("false", "enable: true", False),
    ],
)
def test_shuffled_with_carried_state_is_files_in_random_order(shuffle: str, section: str, expected: Any) -> None:
    written = _written(f"lora: {{enable: true}}\ndata: {{shuffle: {shuffle}}}\nttt: {{layers: all, {section}}}\n")
    assert written["data"]["shuffle"] == expected


# --- what old YAML writes otherwise ---


def test_numbers_and_booleans_of_old_yaml() -> None:
    text = """\
lora: {enable: "true", rank: "64", scaling: "2."}
optim: {lr: "1e-4", weight_decay: '.1', pct_start: "0.1"}
max_steps: 10_000
seed: "7"
do_eval: On
eval_freq: '500'
gradient_checkpointing: "False"
data: {train_data: &where a.jsonl, eval_data: *where}
ttt: {enable: YES, base_lr: "0.5", mini_batch_size: "8", layers: all}
"""
    written = _written(text)
    train = written["train"]
    assert (train["lr"], train["weight_decay"], train["max_steps"], train["warmup_steps"]) == (1e-4, 0.1, 10_000, 1000)
    assert (train["seed"], train["gradient_checkpointing"], written["eval"]["eval_freq"]) == (7, False, 500)
    assert written["lora"] == {"rank": 64, "scaling": 2.0}
    assert (written["ttt"]["base_lr"], written["ttt"]["mini_batch_size"]) == (0.5, 8)
    assert written["data"]["eval_data"] == "a.jsonl"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora:\n\tenable: true\n", "a tab; YAML is indented with spaces only"),
        ("lora: {}\nlora: {}\n", "`lora` is written twice"),
        ("lora: {}\n---\nlora: {}\n", "a second document begins here"),
        ("base: &b {enable: true}\nlora:\n  <<: *b\n", "`<<` merges mappings in old YAML only"),
        ("- lora: {}\n", "but this is a list"),
    ],
)
def test_what_is_no_single_config_is_told_with_its_place(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(text)
    assert main(["import-config", str(old)]) == 2
    assert words in capsys.readouterr().err


def test_the_config_that_a_checkpoint_of_the_fork_keeps_is_read_too() -> None:
    """`training_config.json`: every key of `args.py`, as JSON."""
    assert _written(json.dumps(yaml.safe_load(FORK), indent=4)) == _written(FORK)


# --- files that are parts of a config ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttt: {enable: true, layers: '1'}\n", "has the section `ttt`, and says neither what is trained nor"),
        ("ttt: {enable: true}\nmodel: {name: moshi}\n", "(beside `model`, which no config has)"),
        ("paper_metrics: {use_silence_codes: true}\n", "has the section `paper_metrics`"),
        ("first: {ttt: {enable: true}, lora: {rank: 4}}\nsecond: {ttt: {enable: false}}\ntips: {a: b}\n",
         "is a list of 2 examples of the section `ttt`"),
        ("quick: {enable: true, mini_batch_size: 50}\n", "is an example of the section `ttt`"),
    ],
)  # fmt: skip
def test_a_part_of_a_config_is_named_as_one(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "part.yaml"
    old.write_text(text)
    assert main(["import-config", str(old), "--out", str(tmp_path / "new.yaml")]) == 2
    err = capsys.readouterr().err
    assert words in " ".join(err.split())
    assert "copy" in err
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("text", ["ttt: {layers: all}\n", "model: {enable: true}\n", "a: {b: {enable: true}}\n"])
def test_what_is_nobodys_part_is_left_to_others(text: str) -> None:
    assert import_config(text, file="old.yaml") is None
    with pytest.raises(UsageError):
        import_config("ttt: {enable: true}\n", file="old.yaml")


# --- a folder of configs ---


def test_a_folder_of_configs_is_a_table_with_every_key_accounted_for(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "whole.yaml").write_text(FORK)
    (tmp_path / "frozen.yaml").write_text(_with({**NO_LORA, ON: OFF}))
    (tmp_path / "odd.yaml").write_text("lora: {enable: true}\ncolour: red\n")
    (tmp_path / "part.yaml").write_text("ttt: {enable: true}\n")
    (tmp_path / "twice.yaml").write_text("lora: {}\nlora: {}\n")
    rows = {file.name: import_configs.read(file, tmp_path) for file in sorted(tmp_path.rglob("*.yaml"))}
    whole = rows["whole.yaml"]
    assert (whole.mapped + whole.explained, whole.unknown) == (len(_leaves(yaml.safe_load(FORK))), [])
    assert (rows["frozen.yaml"].told, rows["odd.yaml"].unknown) == ("1 TTT702", ["colour"])
    assert rows["part.yaml"].told.startswith("is a part of a config")
    assert rows["twice.yaml"].told.startswith("not read: `lora` is written twice")
    page = "\n".join(import_configs.table(list(rows.values())))
    assert f"| sub/whole.yaml | {whole.mapped + whole.explained} | {whole.mapped} | {whole.explained} | 0 |  |" in page
    assert "| **3 of 5** |" in page
    assert [row.file for row in import_configs.chosen(list(rows.values()), 10)] == ["sub/whole.yaml"]


def test_a_config_on_the_demo_is_one_that_can_be_run(tmp_path: Path) -> None:
    text = _with({"/far/dialogues.jsonl": "/far/librilight.jsonl"})
    (tmp_path / "whole.yaml").write_text(text)
    row = import_configs.read(tmp_path / "whole.yaml", tmp_path)
    new, overrides = import_configs.on_the_demo(row, steps=3, run_dir=tmp_path / "run")
    config = load_config("new.yaml", text=new, overrides=overrides).config
    assert (config.train.max_steps, config.ttt.layers, config.adapter) == (3, (1, 2, 3), "ttt+lora")
    assert config.data.train_data[0].format == "audio"
    assert import_configs.demo_layers("28,31") == [0, 3]
    assert import_configs.demo_layers("middle") == "middle"
