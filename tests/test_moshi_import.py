"""`ttt import-config`: each key of a moshi-finetune config goes somewhere or is told why not; the result checks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import ttt_moshi
from ttt.check import check_config, load_config
from ttt.check.importing import import_config as ask
from ttt.check.importing import render_account, write_imported
from ttt.errors import ConfigError, UsageError
from ttt.plugins import ImportedConfig
from ttt_cli.main import main
from ttt_moshi.importing import import_config

PLAIN = """\
data:
  train_data: ''
  eval_data: ''
  shuffle: true
moshi_paths:
  hf_repo_id: "kyutai/moshiko-pytorch-bf16"
full_finetuning: false
lora: {enable: true, rank: 128, scaling: 2., ft_embed: false}
first_codebook_weight_multiplier: 100.
text_padding_weight: .5
duration_sec: 100
batch_size: 16
max_steps: 2000
gradient_checkpointing: yes
optim:
  lr: 2e-6
  weight_decay: 0.1
  pct_start: 0.05
seed: 0
log_freq: 1
eval_freq: 100
do_eval: false
do_ckpt: true
ckpt_freq: 100
save_adapters: true
run_dir: ""
wandb: {key: a-secret, project: speech}
"""
WITH_TTT = """\
data: {train_data: train.jsonl}
moshi_paths: {config_path: null}
full_finetuning: true
num_microbatches: 2
do_eval: true
eval_freq: 10
ttt:
  enable: true
  layers: "29,30,31"
  base_lr: 0.5
  mini_batch_size: 8
  persistent_states: true
  initial_gating_alpha: 0.2
  ttt_mlp_layers: 3
  ttt_mlp_expansion_factor: 2.0
  ttt_mlp_hidden_dims: null
  weight_lr_multiplier: 2.0
  alpha_lr_multiplier: 5.0
  use_rope: false
  rope_theta: 5000.0
  colour: red
"""
EVALUATED = """\
moshi_paths: {config_path: null}
max_steps: 1000
do_eval: true
eval_freq: 100
paper_metrics_eval: true
paper_metrics_freq: 500
paper_metrics_use_silence: true
paper_metrics_use_user_stream: false
paper_metrics_cache: /tmp
sblimp_audio_dir: set/syntactic/test
sblimp_gold_csv: mine.csv
sblimp_max_pairs: 1000
swuggy_audio_dir: set
swuggy_gold_csv: null
swuggy_max_pairs: 0
tstory_audio_dir: tsc
tstory_max_pairs: 2.0
sstory_audio_dir: ''
sstory_max_pairs: 10
librilight_evaluation_mode: single_book
librilight_audio_dir: light
librilight_book_id: '42'
librilight_speaker_id: 7
librilight_max_chapters: 3
librilight_max_sequences: null
librilight_concatenated: true
librilight_more: {deep: 1, list: [2]}
ttt_fig5_enable: yes
ttt_fig5_layers: [29, 30]
ttt_fig5_max_T: 2048
ttt_fig5_smooth: 10
ttt_fig5_colour: red
"""
"""The evaluation of a fork with TTT, every key that is known and some that are not."""


def _imported(text: str) -> ImportedConfig:
    imported = import_config(text, file="old.yaml")
    assert imported is not None
    return imported


def _config(text: str) -> dict[str, Any]:
    """The new config, resolved."""
    checked = check_config("new.yaml", text=write_imported(_imported(text), origin="old.yaml"))
    assert checked.config is not None, checked.findings
    return checked.config.model_dump(mode="json")


def _leaves(data: dict[str, Any], path: str = "") -> set[str]:
    return {
        leaf
        for key, value in data.items()
        for leaf in (_leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}"})
    }


@pytest.mark.parametrize("text", [PLAIN, WITH_TTT, EVALUATED])
def test_no_key_is_lost(text: str) -> None:
    imported = _imported(text)
    assert {key.old for key in imported.keys if key.old} == _leaves(yaml.safe_load(text))
    assert {key.new for key in imported.keys if key.new} == set(imported.values)
    assert all(key.note for key in imported.keys if key.new is None or not key.old)


def test_a_config_without_ttt_gets_this_projects_layers() -> None:
    config = _config(PLAIN)
    assert config["backbone"]["hf_repo"] == "kyutai/moshiko-pytorch-bf16"
    assert config["backbone"]["preset"] == "7b"
    assert (config["adapter"], config["lora"]["rank"], config["lora"]["scaling"]) == ("lora", 128, 2.0)
    assert config["ttt"]["layers"] == [29, 30, 31]  # for rank: match
    data = {key: config["data"][key] for key in ("train_data", "eval_data", "shuffle", "duration_sec", "format")}
    expected = {"train_data": None, "eval_data": None, "shuffle": True, "duration_sec": 100.0}
    assert data == {**expected, "format": "transcribed"}
    train = config["train"]
    assert (train["lr"], train["warmup_steps"], train["max_steps"]) == (2e-6, 100, 2000)
    assert (train["trainable"], train["gradient_checkpointing"], train["param_dtype"]) == ("ttt", True, "bfloat16")
    assert (train["ckpt_freq"], config["eval"]["eval_freq"], config["run_dir"]) == (100, 0, None)


def test_a_section_of_ttt_is_carried_over() -> None:
    config = _config(WITH_TTT + "scan: 1\n")
    ttt, train = config["ttt"], config["train"]
    assert ttt["layers"] == [29, 30, 31]
    assert (ttt["layer_type"], ttt["mlp_layers"], ttt["mlp_expansion_factor"]) == ("mlp", 3, 2.0)
    assert (ttt["base_lr"], ttt["mini_batch_size"], ttt["initial_gating_alpha"]) == (0.5, 8, 0.2)
    assert (ttt["persistent_states"], ttt["rope"], ttt["rope_theta"]) == (True, "none", 5000.0)
    assert (train["weight_lr_multiplier"], train["alpha_lr_multiplier"]) == (2.0, 5.0)
    assert (train["trainable"], train["num_microbatches"]) == ("all", 2)
    assert config["eval"]["eval_freq"] == 10
    unknown = [key.old for key in _imported(WITH_TTT + "scan: 1\n").keys if "known here" in key.note]
    assert unknown == ["ttt.colour", "scan"]


def test_what_a_file_leaves_out_is_what_moshi_finetune_trained_with() -> None:
    config = _config("moshi_paths: {hf_repo_id: null}\n")
    assert config["backbone"]["first_codebook_weight_multiplier"] == 1.0
    assert (config["data"]["duration_sec"], config["data"]["shuffle"]) == (10.0, False)
    train = config["train"]
    assert (train["max_steps"], train["warmup_steps"], train["param_dtype"]) == (100, 5, "bfloat16")
    assert train["gradient_checkpointing"] is True


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("enable: false, layers: all", {"layers": "none"}),
        ("enable: off", {"layers": "none"}),
        ("layers: [1, 2], use_rope: yes", {"layers": [1, 2], "rope": "mini_batch"}),
        ("ttt_mlp_layers: 1, ttt_mlp_expansion_factor: 4.0", {"layer_type": "linear"}),
        ("ttt_mlp_hidden_dims: [64], ttt_mlp_expansion_factor: 2.0", {"mlp_hidden_dims": [64], "layer_type": "mlp"}),
        ("ttt_mlp_hidden_dims: [], ttt_mlp_expansion_factor: 2.0", {"mlp_expansion_factor": 2.0}),
        ("scan_checkpoint_group_size: 0", {"scan_checkpoint_group_size": 0}),
    ],
)
def test_corners_of_the_section(section: str, expected: dict[str, Any]) -> None:
    ttt = _config(f"lora: {{enable: false}}\nfull_finetuning: true\nttt: {{{section}}}\n")["ttt"]
    assert {key: ttt[key] for key in expected} == expected


@pytest.mark.parametrize(
    "text", ["max_steps: many\n", "optim: 5\n", "ttt: 3\n", "data:\n", "do_ckpt: off\nckpt_freq: 5\n"]
)
def test_odd_values_are_the_checks_to_refuse(text: str) -> None:
    imported = _imported(f"lora:\n{text}")
    assert {key.old for key in imported.keys if key.old} >= _leaves(yaml.safe_load(text))
    check_config("new.yaml", text=write_imported(imported, origin="old.yaml"))


@pytest.mark.parametrize("text", ["[model]\nname = 'cogvideo'\n", "ttt: {layers: all}\n", "", "- 1\n", "lora: ["])
def test_files_of_others_are_left_to_others(text: str) -> None:
    assert import_config(text, file="old") is None


def test_the_account_wraps_at_a_terminal_and_keeps_secrets() -> None:
    account = render_account(_imported(PLAIN), width=80)
    assert max(map(len, account.splitlines())) <= 80
    assert "wandb.key" in account
    assert "a-secret" not in account + write_imported(_imported(PLAIN), origin="old.yaml")


# --- what the forks measure ---

TASKS = [
    {"name": "sblimp", "data": "set/syntactic/test", "gold": "mine.csv", "split": "test", "limit": 1000},
    {"name": "swuggy", "data": "set"},
    {"name": "tstory", "data": "tsc", "limit": 2},
    {"name": "librilight", "data": "light", "limit": 1},
    {"name": "inner_loss", "data": "light", "limit": 16, "positions": 2048},
]


def _written(text: str) -> dict[str, Any]:
    """The new config as it is written."""
    written: dict[str, Any] = yaml.safe_load(write_imported(_imported(text), origin="old.yaml"))
    return written


def test_what_a_fork_measures_is_a_list_of_tasks() -> None:
    expected = {"eval_freq": 500, "max_batches": 40, "tasks": TASKS, "score": {"user_stream": "silence"}}
    assert _written(EVALUATED)["eval"] == expected
    text = write_imported(_imported(EVALUATED), origin="old.yaml")
    assert "\n    - name: swuggy                   # a task here\n      data: set " in text
    account = render_account(_imported(EVALUATED))
    assert "\n  sblimp_max_pairs → eval.tasks.0.limit: 1000    there it counted files" in account
    for words in ("33 minutes", "passed over tasks that were missing or zero", "counted mini-batches as positions"):
        assert words in account
    unknown = {key.old for key in _imported(EVALUATED).keys if "not known here" in key.note}
    assert unknown == {"paper_metrics_cache", "librilight_more.deep", "librilight_more.list", "ttt_fig5_colour"}


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        (EVALUATED.replace("paper_metrics_eval: true", "paper_metrics_eval: off"), None),
        (EVALUATED.replace("ttt_fig5_enable: yes", "ttt_fig5_enable: no"), TASKS[:4]),
        (EVALUATED.replace("librilight_audio_dir: light\n", ""), TASKS[:3]),
        (f"{EVALUATED}librilight_enable: false\n", [*TASKS[:3], TASKS[4]]),
        ("paper_metrics_eval: true\nsstory_audio_dir: s\n", [{"name": "sstory", "data": "s"}]),
        ("lora:\nsstory_audio_dir: s\nsstory_max_pairs: 3\n", [{"name": "sstory", "data": "s", "limit": 3}]),
        ("lora:\nsstory_max_pairs: 3\nttt_fig5_layers: all\nlibrilight_book_id: 3\n", None),
        ("lora:\nswuggy_audio_dir: s\nswuggy_max_pairs: -1\n", [{"name": "swuggy", "data": "s"}]),
    ],
)  # fmt: skip
def test_only_what_was_measured_is_a_task(text: str, tasks: list[dict[str, Any]] | None) -> None:
    assert _written(text).get("eval", {}).get("tasks") == tasks
    imported = _imported(text)
    assert {key.old for key in imported.keys if key.old} == _leaves(yaml.safe_load(text))
    assert not [key for key in imported.keys if key.new is None and "known here" in key.note and key.old in KNOWN]


KNOWN = {key for key in _leaves(yaml.safe_load(EVALUATED)) if key.count("_") > 1} - {
    *("paper_metrics_cache", "ttt_fig5_colour")
}


@pytest.mark.parametrize(
    ("text", "freq"),
    [
        ("do_eval: true\neval_freq: 100\npaper_metrics_freq: 500\ntstory_audio_dir: s\n", 500),
        ("do_eval: false\neval_freq: 100\npaper_metrics_freq: 500\ntstory_audio_dir: s\n", 500),
        ("do_eval: true\neval_freq: 100\npaper_metrics_freq: 500\n", 100),  # without a task it was not read
        ("do_eval: true\neval_freq: 100\npaper_metrics_eval: false\npaper_metrics_freq: 9\ntstory_audio_dir: s\n", 100),
        ("eval_freq: 100\ntstory_audio_dir: s\n", 0),
    ],
)  # fmt: skip
def test_how_often_is_one_number(text: str, freq: int) -> None:
    assert _written(f"lora:\n{text}")["eval"]["eval_freq"] == freq


@pytest.mark.parametrize(("silence", "heard"), [("true", "silence"), ("no", "zeros"), ("many", None)])
def test_what_moshi_hears_of_the_user(silence: str, heard: str | None) -> None:
    written = _written(f"lora:\npaper_metrics_use_silence: {silence}\n")
    assert written.get("eval", {}).get("score", {}).get("user_stream") == heard


@pytest.mark.parametrize(
    "text",
    [
        "sblimp_audio_dir: 3\n",
        "sblimp_audio_dir: [a]\nsblimp_max_pairs: many\n",
        "librilight_audio_dir: {a: 1}\n",
        "tstory_audio_dir: s\ntstory_max_pairs: 1.5\n",
        "sstory_audio_dir: s\nsstory: {max: 3}\n",
        "ttt_fig5_enable: true\n",
        "ttt_fig5_enable: true\nlibrilight_audio_dir: x\nttt_fig5_max_T: null\n",
    ],
)
def test_odd_values_of_the_evaluation_stop_no_import(text: str) -> None:
    imported = _imported(f"lora:\n{text}")
    assert {key.old for key in imported.keys if key.old} >= _leaves(yaml.safe_load(text))
    check_config("new.yaml", text=write_imported(imported, origin="old.yaml"))


def test_an_imported_evaluation_loads_where_its_folders_are() -> None:
    for name in ("tsc/1_a", "tsc/2_b"):
        for member in ("correct", "incorrect"):
            Path(name).parent.mkdir(exist_ok=True)
            Path(f"{name}_{member}.wav").touch()
    Path("light/reader/book").mkdir(parents=True)
    Path("light/reader/book/chapter_1.flac").touch()
    lexical = Path("set/lexical/dev")
    lexical.mkdir(parents=True)
    (lexical / "gold.csv").write_text(
        "filename,id,voice,frequency,word,phones,length,correct\na,1,v,3,w,p,1,1\nb,1,v,3,w,p,1,0\n"
    )
    (lexical / "a.wav").write_bytes(b"sound")
    (lexical / "b.wav").touch()
    text = "\n".join(line for line in EVALUATED.splitlines() if not line.startswith("sblimp"))
    checked = check_config("new.yaml", text=write_imported(_imported(text), origin="old.yaml"))
    assert [(finding.code, finding.path) for finding in checked.findings if finding.path.startswith("eval")] == [
        ("TTT514", "eval.tasks.3.limit")  # 16 sequences, and here is one
    ]
    assert checked.config is not None
    assert [task.name for task in checked.config.eval.tasks] == ["swuggy", "tstory", "librilight", "inner_loss"]


# --- the command ---


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"path": "a.wav", "duration": 100}\n')
    Path("a.wav").write_bytes(b"sound")
    Path("a.json").write_text('{"alignments": []}')
    Path("old.yaml").write_text(PLAIN.replace("train_data: ''", "train_data: train.jsonl"))


def test_a_file_is_written_checked_and_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-config", "old.yaml", "--out", "new.yaml"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("old.yaml (moshi-finetune)  →  new.yaml\n")
    assert re.search(r"^  optim\.lr → train\.lr: 2e-06    LoRA's; new TTT layers want 1e-4", out, re.MULTILINE)
    assert re.search(r"^new\.yaml: ", out.splitlines()[-1])
    assert load_config("new.yaml").config.train.lr == 2e-6
    assert Path("new.yaml").read_text().startswith("# yaml-language-server: $schema=")
    assert main(["import-config", "old.yaml", "--out", "new.yaml"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["import-config", "old.yaml", "--out", "new.yaml", "--force"]) == 0


def test_without_a_file_the_config_alone_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-config", "old.yaml"]) == 0
    out, err = capsys.readouterr()
    assert load_config("c.yaml", text=out).config.train.lr == 2e-6
    assert "no counterpart:" in err


def test_a_result_with_errors_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.yaml").write_text(WITH_TTT.replace("mini_batch_size: 8", "mini_batch_size: 0"))
    assert main(["import-config", "old.yaml", "--out", "new.yaml"]) == 1
    assert "error TTT103  `ttt.mini_batch_size`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "code", "words"),
    [
        (
            "video.toml",
            "[model]\nname = 'another'\n[remat]\n",
            2,
            "no installed plugin reads this file (asked: ",
        ),
        ("mine.yaml", "backbone: {name: moshi}\n", 2, "`ttt check mine.yaml`"),
        ("twice.yaml", "seed: 1\nseed: 2\nlora:\n", 2, "error TTT002"),
        ("broken.yaml", "lora: [", 2, "error TTT001"),
        ("nowhere.yaml", None, 3, "no such file"),
        ("large.yaml", "#" * (1 << 21), 2, "larger than 1 MiB"),
        ("latin.yaml", b"lora: \xe9", 2, "not text in UTF-8"),
    ],
)
def test_files_that_cannot_be_imported(
    name: str, text: str | bytes | None, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["import-config", name, "--out", "new.yaml"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert not Path("new.yaml").exists()


def test_what_is_no_config_of_another_program_is_told() -> None:
    with pytest.raises(ConfigError):
        ask("lora: [", file="old.yaml")
    with pytest.raises(UsageError):
        ask("backbone: {name: moshi}", file="old.yaml")
    assert ask("x: 1", file="old.yaml") is None


# --- numbers that are none ---


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("max_steps: .inf", "f.yaml:2:12: `max_steps` is inf, no finite number; write a number up to 1e+15 there"),
        ("max_steps: 1e400", "f.yaml:2:12: `max_steps` is inf"),
        ("optim: {pct_start: .nan}", "f.yaml:2:20: `optim.pct_start` is nan"),
        ("num_ckpt_keep: -.inf", "f.yaml:2:16: `num_ckpt_keep` is -inf"),
        ("max_steps: 1e300", "f.yaml:2:12: `max_steps` is far too large"),
        ("ttt: {layers: [1, .inf]}", "f.yaml:2:19: `ttt.layers.1` is inf"),
    ],
)
def test_a_number_that_is_none_is_told_with_its_place(line: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask(f"moshi_paths: {{}}\n{line}\n", file="f.yaml")
    assert str(caught.value).startswith(told)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "line", ["max_steps: true", "max_steps: '12'", "optim: {pct_start: [1]}", "ttt: [1]", "optim: 3"]
)
def test_what_is_no_number_is_left_to_the_check_of_the_new_config(line: str) -> None:
    answer = ask(f"moshi_paths: {{}}\n{line}\n", file="f.yaml")
    assert answer is not None
    assert not isinstance(answer.values.get("train.warmup_steps"), bool)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (None, "does not exist"),
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"dim": 8, "num_heads": 2}', "it has no num_layers"),
        ('{"dim": 1e400, "num_heads": 2, "num_layers": 2}', "its dim is inf"),
        ('{"dim": "8", "num_heads": 2, "num_layers": 2}', "its dim is '8'"),
        ('{"dim": 8, "num_heads": true, "num_layers": 2}', "its num_heads is True"),
        ('{"dim": 8, "num_heads": 2, "num_layers": 99999999999999}', "its num_layers is 99999999999999"),
        ('{"dim": %s, "num_heads": 2, "num_layers": 2}' % ("9" * 5000), "not JSON"),
    ],
)
def test_a_config_path_that_is_none_is_the_users_to_mend(tmp_path: Path, written: str | None, told: str) -> None:
    file = tmp_path / "model.json"
    if written is not None:
        file.write_text(written, encoding="utf-8")
    config = f"backbone: {{name: moshi, preset: 7b, config_path: {file}}}\n"
    (finding,) = [
        found for found in check_config("c.yaml", text=config).findings if found.code not in ("TTT502", "MSH505")
    ]
    assert (finding.code, finding.path) == ("TTT501" if written is None else "TTT605", "backbone.config_path")
    assert told in finding.message
    assert finding.fix.endswith("model's config.json")
    assert "plugin" not in finding.message + finding.fix


def test_an_imported_evaluation_is_measured_on_the_demos_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(str(ttt_moshi.__file__)).parent / "demo" / "tasks"
    text = EVALUATED.replace("ttt_fig5_max_T: 2048", "ttt_fig5_max_T: 30").replace("max_steps: 1000", "max_steps: 1")
    for old, new in {
        "sblimp_audio_dir: set/syntactic/test": f"sblimp_audio_dir: {own}/sblimp/syntactic/dev",
        "sblimp_gold_csv: mine.csv": f"sblimp_gold_csv: {own}/sblimp/syntactic/dev/gold.csv",
        "swuggy_audio_dir: set": f"swuggy_audio_dir: {own}/swuggy",
        "tstory_audio_dir: tsc": f"tstory_audio_dir: {own}/tstory",
        "sstory_audio_dir: ''": f"sstory_audio_dir: {own}/sstory",
        "librilight_audio_dir: light": f"librilight_audio_dir: {own}/librilight",
    }.items():
        assert old in text
        text = text.replace(old, new)
    Path("old.yaml").write_text(text + "data: {train_data: train.jsonl}\n")
    assert main(["import-config", "old.yaml", "--out", "new.yaml"]) == 0
    demo = [
        "data.train_data=null",
        "backbone.preset=demo",
        "backbone.num_layers=2",
        "backbone.dim=32",
        "backbone.num_heads=2",
        "ttt.layers=[1]",
    ]
    small = [word for setting in (*demo, "train.param_dtype=float32") for word in ("--set", setting)]
    assert main(["check", "new.yaml", *small]) == 0
    assert main(["eval", "new.yaml", *small, "--limit", "2", "--arms", "ttt,closed", "--out", "out"]) == 0
    found = json.loads(Path("out/results.json").read_text())
    names = ["sblimp", "swuggy", "tstory", "sstory", "librilight", "inner_loss"]
    assert list(found["results"]) == names
    assert all(0 <= found["results"][name]["acc,none"] <= 1 for name in names[:4])
    assert found["groups"]["average"]["acc,none"] == pytest.approx(
        sum(found["results"][name]["acc,none"] for name in names[:4]) / 4
    )
    for name in ("librilight.png", "inner_loss.png", "summary.md"):
        assert (Path("out") / name).stat().st_size > 1000
    assert "Traceback" not in capsys.readouterr().err
