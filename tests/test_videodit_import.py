"""`ttt import-config` on TTT-Video's TOML, and the curriculum that ships: published settings, each accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ttt.check import check_config
from ttt.check.importing import import_config as ask
from ttt.check.importing import render_account, write_imported
from ttt.config import Severity
from ttt.errors import UsageError
from ttt.plugins import ImportedConfig
from ttt_cli.main import main
from ttt_videodit.geometry import Segments, segments_in
from ttt_videodit.importing import import_config
from ttt_videodit.plugin import VideoDiTBackbone

SECONDS = (3, 9, 18, 30, 63)
LAYERS = {"mlp": (0.1, 64), "linear": (1.0, 16)}
STEPS = {3: (100, 5000, 500), 9: (100, 5000, 500), 18: (50, 1000, 500), 30: (50, 1000, 25), 63: (25, 250, 25)}
"""Warm-up, steps and steps between checkpoints of the published stages."""
GPUS = {3: (8, 8, 1), 9: (8, 8, 1), 18: (8, 8, 1), 30: (16, 4, 2), 63: (16, 4, 4)}
TEXT = {3: 498, 9: 502, 18: 471, 30: 497, 63: 458}
LATER = "TODO"
ROOM_ON_DISK = {"TTT403", "TTT404"}
"""What is found of the machine that the tests run on, and not of a config."""
"""What the published files have for paths: no TOML until it is filled in."""

Job = Mapping[str, Mapping[str, Any]]


def toml(job: Job) -> str:
    def written(value: Any) -> str:
        return LATER if value == LATER else json.dumps(value)

    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {written(value)}\n" for key, value in keys.items())
        for section, keys in job.items()
    )


def training(seconds: int, layer: str = "mlp") -> dict[str, dict[str, Any]]:
    """The keys and values of the published `configs/train/ttt-LAYER/SECONDSs.toml`."""
    base_lr, mini_batch_size = LAYERS[layer]
    warmup, steps, interval = STEPS[seconds]
    replicate, sharding, tensor = GPUS[seconds]
    job: dict[str, dict[str, Any]] = {
        "job": {"exp_name": f"cogvideo-{layer}-{seconds}s"},
        "model": {
            "name": "cogvideo",
            "size": "5B",
            "ssm_layer": f"ttt_{layer}",
            "ttt_base_lr": base_lr,
            "mini_batch_size": mini_batch_size,
            "video_length": f"{seconds}sec",
        },
        "optimizer": {
            "name": "AdamW",
            "lr": 1e-5,
            "lr_ssm": 1e-4 if seconds == 3 else 1e-5,
            "lr_end": 1e-5,
            "lr_schedule": "linear",
            "lr_ssm_schedule": "cosine",
            "gradient_clipping_norm": 0.1,
        },
        "training": {
            "global_batch_size": 64,
            "grad_accum_steps": 1,
            "warmup_steps": warmup,
            "steps": steps,
            "adapter_method": "sft" if (seconds, layer) == (3, "mlp") else "qkvo",
            "dataset_path": LATER,
            "jsonl_paths": LATER,
        },
        "remat": {"transformer_checkpoint_layer_group_size": 1, "scan_checkpoint_group_size": 16},
        "parallelism": {
            "fsdp_unsharded_dtype": "bfloat16",
            "dp_replicate": replicate,
            "dp_sharding": sharding,
            "tp_sharding": tensor,
        },
        "checkpoint": {"interval": interval},
        "wandb": {"project": "a", "entity": "b", "log_interval": 1},
    }
    if seconds == 3:
        job["checkpoint"]["init_state_dir"] = LATER
    if seconds >= 30:
        job["remat"] |= {
            "transformer_checkpoint_layer_group_size": 2,
            "attention": True,
            "forward_ssm": True,
            "reverse_ssm": True,
            "mlp": True,
        }
    if seconds == 63:
        job["remat"] |= {"seq_modeling_block": True, "shard_transformer_inputs": True}
    return job


def sampling(seconds: int, layer: str = "mlp") -> dict[str, dict[str, Any]]:
    """The keys and values of the published `configs/eval/ttt-LAYER/SECONDSs.toml`, which all say 16 a mini-batch."""
    model = training(seconds, layer)["model"]
    return {
        "job": {"exp_name": f"cogvideo-{layer}-{seconds}s"},
        "model": {**model, "mini_batch_size": 16, "scale_factor": 1.0},
        "eval": {
            "sampling_fps": 16,
            "sampling_num_frames": Segments().frames(segments_in(seconds)),
            "txt_maxlen": TEXT[seconds],
            "image_width": 720,
            "image_height": 480,
            "latent_channels": 16,
            "scale_factor": 0.7,
            "num_denoising_steps": 50,
            "output_dir": "./output",
            "t5_model_dir": LATER,
            "vae_checkpoint_path": LATER,
        },
        "guider": {"scale": 6, "exp": 5, "num_steps": 50},
        "discretization": {"shift_scale": 1.0},
        "denoiser": {"num_idx": 1000, "quantize_c_noise": False},
        "parallelism": {"fsdp_unsharded_dtype": "bfloat16", "dp_replicate": 1, "dp_sharding": 1, "tp_sharding": 1},
        "remat": {"scan_checkpoint_group_size": 1e6},
        "wandb": {"project": "a", "entity": "b", "log_interval": 1},
    }


def imported(text: str, file: str = "old.toml") -> ImportedConfig:
    found = import_config(text, file=file)
    assert found is not None
    return found


def resolved(text: str) -> dict[str, Any]:
    """The new config, every key written out; it lacks data, which the user must name, and nothing else."""
    checked = check_config("new.yaml", text=write_imported(imported(text), origin="old.toml"))
    assert checked.config is not None, checked.findings
    errors = {finding.code for finding in checked.findings if finding.severity is Severity.ERROR}
    assert errors - ROOM_ON_DISK <= {"VDT508"}, checked.findings
    return checked.config.model_dump(mode="json")


def paths(job: Job) -> set[str]:
    return {f"{section}.{key}" for section, keys in job.items() for key in keys}


# --- the published files ---


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", [training, sampling])
def test_every_published_file_imports_and_no_key_is_lost(kind: Any, layer: str, seconds: int) -> None:
    job = kind(seconds, layer)
    found = imported(toml(job))
    assert {key.old for key in found.keys if key.old} == paths(job)
    assert {key.new for key in found.keys if key.new} == set(found.values)
    assert all(key.note for key in found.keys if key.new is None or not key.old)
    assert not [key for key in found.keys if "known here" in key.note]
    assert len([(key.old, key.new) for key in found.keys]) == len({(key.old, key.new) for key in found.keys})
    config = resolved(toml(job))
    assert config["ttt"]["layer_type"] == layer
    assert (config["ttt"]["base_lr"], config["ttt"]["mini_batch_size"]) == LAYERS[layer]
    assert (config["data"]["duration_sec"], config["data"]["text_length"]) == (seconds, TEXT[seconds])
    assert config["train"]["param_dtype"] == "bfloat16"


@pytest.mark.parametrize("seconds", SECONDS)
def test_the_curriculum_that_ships_has_the_published_settings(seconds: int) -> None:
    text = VideoDiTBackbone().presets()[f"{seconds}s"]
    checked = check_config(f"{seconds}s.yaml", text=text)
    assert checked.config is not None, checked.findings
    shipped = checked.config.model_dump(mode="json")
    published = resolved(toml(training(seconds)))
    # What no TOML says: places, and how often evidence is taken.
    own = {"data": ("train_data", "videos"), "train": ("init_from", "evidence_freq"), "run_dir": ()}
    own["data"] += ("height", "width")  # written out
    for section, keys in own.items():
        for config in (shipped, published):
            assert section in config
            if keys:
                for key in keys:
                    del config[section][key]
            else:
                del config[section]
    # what is trained here is sampled by diffusers' schedule, what was trained there by its own
    assert (shipped["backbone"].pop("sampling_schedule"), published["backbone"].pop("sampling_schedule")) == (
        None,
        "ttt-video",
    )
    if seconds > 3:  # one constant rate for all; what it would fall to is nothing
        for config in (shipped, published):
            assert config["train"].pop("lr_schedule") == "constant"
            assert config["train"].pop("backbone_lr_schedule") in ("constant", None)
            config["train"].pop("min_lr_ratio")
    assert shipped == published


def test_each_stage_of_the_curriculum_starts_from_the_one_before() -> None:
    before: str | None = None
    for seconds in SECONDS:
        config = check_config("x.yaml", text=VideoDiTBackbone().presets()[f"{seconds}s"]).config
        assert config is not None
        assert config.train.init_from == before
        before = config.run_dir
        assert before is not None


@pytest.mark.parametrize("seconds", SECONDS)
def test_the_curriculum_lacks_its_data_alone(seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checked = check_config("x.yaml", text=VideoDiTBackbone().presets()[f"{seconds}s"])
    findings, config = checked.findings, checked.config
    troubles = {
        finding.path
        for finding in findings
        if finding.severity is not Severity.NOTE and finding.code not in ROOM_ON_DISK
    }
    places = {"data.train_data", "data.videos"} | ({"train.init_from"} if seconds > 3 else set())
    assert "data.train_data" in troubles
    assert troubles <= places
    assert config is not None
    tokens = VideoDiTBackbone().facts(config).tokens_per_window
    assert tokens is not None
    assert tokens % config.ttt.mini_batch_size == 0, "the lengths of text are those with which no mini-batch is short"


def test_a_stage_with_its_data_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("data")
    folder.mkdir()
    frames, rows = 13, np.zeros((13, 16, 60, 90), np.float16)
    latents = {"mean": rows, "std": rows, "start_mean": rows[:1], "start_std": rows[:1]}
    save_file(latents, folder / "a.safetensors")
    save_file({"text": np.zeros((TEXT[3], 4096), np.float16)}, folder / "text.safetensors")
    line = {
        "video": "a.mp4",
        "start_sec": 0,
        "latents": "a.safetensors",
        **{"frames": frames, "height": 480, "width": 720, "text_length": TEXT[3]},
        "segments": [{"caption": "waves", "text": "text.safetensors"}],
    }
    (folder / "3s.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "held_out.jsonl").write_text(json.dumps(line) + "\n")
    text = VideoDiTBackbone().presets()["3s"]
    overrides = ["data.videos=null", "data.eval_data=data/held_out.jsonl"]
    findings = check_config("x.yaml", text=text, overrides=overrides).findings
    kept = [finding for finding in findings if finding.code not in ROOM_ON_DISK]
    assert {finding.code for finding in kept} == {"TTT202"}  # what the published nesting costs
    assert kept[0].severity is Severity.NOTE


# --- key by key ---

EVERY_KEY = {
    "job": "config_file exp_name dump_folder seed",
    "model": "name size video_length norm_eps scale_factor ssm_layer ttt_base_lr mini_batch_size",
    "training": "adapter_method dataset_path jsonl_paths global_batch_size grad_accum_steps warmup_steps steps gc_freq",
    "optimizer": "name lr lr_end lr_ssm lr_schedule lr_ssm_schedule gradient_clipping_norm",
    "checkpoint": "init_state_dir interval resume resume_step timeout_minutes",
    "parallelism": "fsdp_unsharded_dtype tp_sharding dp_sharding dp_replicate",
    "remat": "transformer_checkpoint_layer_group_size scan_checkpoint_group_size forward_ssm reverse_ssm attention mlp "
    "seq_modeling_block shard_transformer_inputs",
    "comm": "init_timeout_seconds",
    "wandb": "disable project entity log_interval alert",
}
EVERY_KEY_OF_SAMPLING = {
    "eval": "input_file output_dir image_width image_height sampling_fps sampling_num_frames latent_channels "
    "num_denoising_steps scale_factor dtype vae_checkpoint_path vae_scale_factor txt_maxlen t5_model_dir",
    "guider": "scale exp num_steps",
    "denoiser": "num_idx quantize_c_noise",
    "discretization": "shift_scale",
}
"""TTT-Video's `ttt/infra/config_manager.py`, all of it."""


@pytest.mark.parametrize("sections", [EVERY_KEY, {**EVERY_KEY, **EVERY_KEY_OF_SAMPLING}])
@pytest.mark.parametrize("value", [1, "text", True, 2.5, [1], LATER])
def test_every_key_of_the_program_is_known_whatever_its_value(sections: dict[str, str], value: Any) -> None:
    job = {section: dict.fromkeys(keys.split(), value) for section, keys in sections.items()}
    found = imported(toml(job))
    assert {key.old for key in found.keys if key.old} == paths(job)
    assert not [key for key in found.keys if "known here" in key.note]
    check_config("new.yaml", text=write_imported(found, origin="old.toml"))  # wrong values are its to find


@pytest.mark.parametrize(
    ("layer", "written", "expected"),
    [("mlp", 16, 64), ("mlp", 64, 64), ("linear", 16, 16), ("linear", 64, 64), ("mlp", 1, 64)],
)
def test_the_mini_batch_is_the_one_that_the_layer_computes_with(layer: str, written: int, expected: int) -> None:
    """The kernel of ttt_mlp has 64 tokens built in, whatever a file says; that of ttt_linear has not."""
    job = sampling(9, layer)
    job["model"]["mini_batch_size"] = written
    assert resolved(toml(job))["ttt"]["mini_batch_size"] == expected
    note = next(key.note for key in imported(toml(job)).keys if key.old == "model.mini_batch_size")
    assert (f"--set ttt.mini_batch_size={written} " in note) == (written != expected)
    del job["model"]["mini_batch_size"]
    assert resolved(toml(job))["ttt"]["mini_batch_size"] == 64  # its default, whichever the layer


@pytest.mark.parametrize("kind", [training, sampling])
def test_imported_configs_drop_no_text_and_say_why(kind: Any) -> None:
    found = imported(toml(kind(3)))
    assert found.values["backbone.text_dropout"] == 0
    (note,) = [key.note for key in found.keys if key.new == "backbone.text_dropout"]
    assert "never reached" in note
    assert "guidance leads away from empty texts" in note


def test_a_key_of_nobody_is_told() -> None:
    found = imported(toml(training(3)) + "[model.more]\ncolour = 'red'\n[extra]\nx = 1979-05-27\n")
    unknown = [key.old for key in found.keys if "known here" in key.note]
    assert unknown == ["model.more.colour", "extra.x"]


def test_what_a_file_leaves_out_is_what_the_program_trained_with() -> None:
    config = resolved("[model]\nname = 'cogvideo'\n")
    assert (config["backbone"]["preset"], config["backbone"]["text_dropout"]) == ("5b", 0)
    ttt, train = config["ttt"], config["train"]
    assert (ttt["layer_type"], ttt["base_lr"], ttt["mini_batch_size"]) == ("mlp", 0.1, 64)
    assert (ttt["layers"], ttt["rope"], ttt["causal"]) == ("all", "backbone", False)
    assert (train["max_steps"], train["warmup_steps"], train["seed"], train["max_norm"]) == (5000, 50, 42, 0.1)
    assert (train["lr"], train["backbone_lr_multiplier"], train["min_lr_ratio"]) == (1e-4, 1.0, 0.0)
    assert (train["lr_schedule"], train["backbone_lr_schedule"]) == ("linear", "linear")
    assert (train["batch_size"], train["num_microbatches"], train["weight_decay"]) == (1, 8, 1e-4)
    assert config["run_dir"] is None
    assert resolved("[model]\nssm_layer = 'ttt_linear'\n")["ttt"]["base_lr"] == 0.1  # not this project's 1.0


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (  # TTT falls, the rest stays
            {"lr": 1e-5, "lr_ssm": 1e-4, "lr_end": 1e-5, "lr_ssm_schedule": "cosine"},
            (1e-4, 0.1, "cosine", "constant", 0.1),
        ),
        (  # the rest falls, TTT stays
            {"lr": 1e-4, "lr_ssm": 1e-5, "lr_end": 1e-5, "lr_schedule": "cosine"},
            (1e-5, 10.0, "constant", "cosine", 0.1),
        ),
        ({"lr": 3e-5, "lr_ssm": 3e-5, "lr_end": 0.0}, (3e-5, 1.0, "linear", "linear", 0.0)),
        ({"lr": 2e-5, "lr_ssm": 2e-4, "lr_end": 1e-5}, (2e-4, 0.1, "linear", "linear", 0.05)),
    ],
)
def test_rates_by_role(optimizer: dict[str, Any], expected: tuple[Any, ...]) -> None:
    job = {**training(3), "optimizer": optimizer}
    train = resolved(toml(job))["train"]
    keys = ("lr", "backbone_lr_multiplier", "lr_schedule", "backbone_lr_schedule", "min_lr_ratio")
    assert tuple(train[key] for key in keys) == pytest.approx(expected)


def test_an_end_that_cannot_be_written_is_told() -> None:
    job = {**training(3), "optimizer": {"lr": 2e-5, "lr_ssm": 2e-4, "lr_end": 1e-5}}
    notes = {key.new: key.note for key in imported(toml(job)).keys}
    assert "there down to 0.5" in notes["train.backbone_lr_schedule"]


@pytest.mark.parametrize(
    ("batch", "parts", "gpus", "expected"),
    [
        (64, 1, (8, 8), (1, 64)),
        (64, 1, (8, 1), (8, 8)),
        (64, 4, (8, 1), (2, 32)),
        (8, 1, (8, 8), (1, 8)),  # more GPUs than videos
        (6, 1, (4, 1), (1, 6)),  # no whole number for each
    ],
)
def test_the_global_batch_is_kept(batch: int, parts: int, gpus: tuple[int, int], expected: tuple[int, int]) -> None:
    job = training(3)
    job["training"] |= {"global_batch_size": batch, "grad_accum_steps": parts}
    job["parallelism"] |= {"dp_sharding": gpus[0], "dp_replicate": gpus[1]}
    train = resolved(toml(job))["train"]
    assert (train["batch_size"], train["num_microbatches"]) == expected
    assert train["batch_size"] * train["num_microbatches"] == batch


def test_corners() -> None:
    job = training(9)
    job["model"] |= {"ssm_layer": "none", "size": "debug"}
    job["job"] |= {"dump_folder": "/data/exp/", "seed": 7}
    job["parallelism"]["fsdp_unsharded_dtype"] = "float16"
    config = resolved(toml(job))
    assert (config["ttt"]["layers"], config["backbone"]["preset"], config["backbone"]["dim"]) == ("none", "demo", 512)
    assert (config["run_dir"], config["train"]["seed"]) == ("/data/exp/cogvideo-mlp-9s", 7)
    assert config["train"]["param_dtype"] == "bfloat16"
    assert config["data"]["text_length"] is None  # that of the small model


# --- files ---


def test_files_of_others_are_left_to_others() -> None:
    for text in ("[model]\nname = 'another'\n", "model = 3\n", "", "backbone: {name: moshi}\n", "lora: [", "[remat]\n"):
        assert import_config(text, file="old") is None
    assert import_config("[tool.ruff]\nline-length = 120\n", file="pyproject.toml") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nname = cogvideo\n", r"^old\.toml:2:8: not TOML: Invalid value$"),
        ("[model]\nname = 'a'\nname = 'b'\n", r"^old\.toml:3:\d+: not TOML: Cannot overwrite a value$"),
        ("[model", r"^old\.toml(:1:7)?: not TOML: Expected ']'"),
        ("x = " + "[" * 20_000, r"^old\.toml(:\S+)?: not TOML: "),
    ],
)
def test_a_broken_file_is_told_with_its_place(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ask(text, file="old.toml")
    assert import_config(text, file="old.cfg") is None


def test_placeholders_stand_for_nothing() -> None:
    text = toml(training(3)).replace(f"jsonl_paths = {LATER}", f"jsonl_paths = {LATER}   # fill in")
    assert imported(text).values["data.train_data"] is None
    quoted = toml(training(3)).replace(f"= {LATER}", f"= '{LATER}'")
    assert resolved(quoted) == resolved(text)
    named = text.replace("cogvideo-mlp-3s", "TODO list")
    assert imported(named).values["run_dir"] == "runs/TODO list"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("63s.toml").write_text(toml(training(63)))
    assert main(["import-config", "63s.toml", "--out", "63s.yaml"]) == 1  # its data must be made and named
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count(" error ") == out.count("error VDT508") == 1
    assert out.startswith("63s.toml (TTT-Video)  →  63s.yaml\n")
    assert re.search(r"^  remat\.forward_ssm → backbone\.remat_forward_ttt: true$", out, re.MULTILINE)
    assert re.search(r"^  parallelism\.tp_sharding +a run uses one device$", out, re.MULTILINE)
    written = Path("63s.yaml").read_text()
    assert re.search(r"^  remat_seq_modeling_block: true", written, re.MULTILINE)
    assert "num_microbatches: 64 " in written

    Path("broken.toml").write_text("[model]\nname = cogvideo\n")
    assert main(["import-config", "broken.toml", "--out", "broken.yaml"]) == 2
    assert "broken.toml:2:8: not TOML" in capsys.readouterr().err
    assert not Path("broken.yaml").exists()


def test_the_account_wraps_at_a_terminal() -> None:
    account = render_account(imported(toml(sampling(63))), width=80)
    assert max(map(len, account.splitlines())) <= 80
    assert "eval.num_denoising_steps" in account
    assert "`ttt sample --steps`" in account


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("[training]\nsteps = inf", "f.toml:4:1: `training.steps` is inf, no finite number; write a number up to"),
        ("[optimizer]\n  lr = nan", "f.toml:4:3: `optimizer.lr` is nan"),
        ("[training]\nsteps = 99999999999999999999", "f.toml:4:1: `training.steps` is far too large"),
    ],
)
def test_a_number_that_is_none_is_told_with_its_place(lines: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask(f'[model]\nssm_layer = "ttt_mlp"\n{lines}\n', file="f.toml")
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    "lines",
    [
        '[optimizer]\nlr = "fast"\nlr_ssm = true',
        "[training]\nglobal_batch_size = true",
        "[optimizer]\nlr = 1e-320\n[parallelism]\ndp_sharding = 1e14",
        f'[training]\nsteps = 1\n[eval]\ntxt_maxlen = "{"9" * 5000}"',
    ],
)
def test_odd_numbers_end_in_no_traceback(lines: str) -> None:
    model = f'[model]\nssm_layer = "ttt_mlp"\nvideo_length = "{"9" * 5000}sec"\n'
    assert ask(f"{model}{lines}\n", file="f.toml") is not None
