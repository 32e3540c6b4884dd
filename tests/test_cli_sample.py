"""`ttt sample`, `ttt precompute`, `ttt import-weights`: what a backbone may offer beside training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_distributions import importable, install
from safetensors.torch import load_file, save_file
from toy import MakingToy, ToyModel, ToyOptions

from ttt.adapter_file import load_adapter
from ttt.train import loop
from ttt.train.passes import seed_pass
from ttt_cli.main import main

PLUGIN = """\
from toy import {toy}
from ttt.hookspecs import hookimpl

@hookimpl
def ttt_backbone():
    return {toy}()
"""
CONFIG = """\
backbone: {name: toy, num_layers: 2, dim: 16, num_heads: 2}
ttt: {mini_batch_size: 4}
data: {window: 12}
train: {max_steps: 2, lr: 0.05, device: cpu, trainable: all}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a config, where the toy that can do everything is installed."""
    install(tmp_path, "toy", "toy_plugin", PLUGIN.format(toy="MakingToy"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(loop, "draw_run", lambda run: [])
    (work / "c.yaml").write_text(CONFIG)
    with importable(tmp_path):
        yield work


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["train", "c.yaml", "--set", "run_dir=run"]) == 0
    capsys.readouterr()
    return folder / "run"


def sampled(*arguments: str, steps: int = 6) -> int:
    return main(["sample", *arguments, "--steps", str(steps)])


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, captured.err


ASKED = ("--seconds", "4", "--prompt", "a cat", "--prompt", "a dog")


# --- sample ---


def test_a_run_is_sampled_with_what_it_learned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's file is that of the plugin's own sampler on a model that the last checkpoint was loaded into."""
    assert sampled("run", *ASKED, "--out", "a.txt", "--negative-prompt", "fog", "--seed", "3") == 0
    out, _ = said(capsys)
    assert "run: with what was learned in run/checkpoints/step_000002" in out
    assert "wrote a.txt, a.log" in out
    request = Path("a.log").read_text()
    assert "prompts=('a cat', 'a dog'), negative_prompts=('fog', 'fog'), seconds=4.0" in request
    assert "steps=6, guidance_scale=6.0, seed=3" in request

    toy = MakingToy()
    model = toy.build(ToyOptions(num_layers=2, dim=16, num_heads=2), device="cpu", dtype=torch.float32)
    load_adapter(run, model, sites=toy.sites(model))
    assert isinstance(model, ToyModel)
    drawn = []
    seed_pass(3, "sample", 0)
    with torch.no_grad():
        for prompt in ("a cat", "a dog"):
            read = [toy._tokens(model, text) for text in (prompt, "fog")]
            for _ in range(6):
                wanted, unwanted = (model(tokens)[:, -1] for tokens in read)
                token = torch.multinomial((unwanted + 6 * (wanted - unwanted)).softmax(-1), 1)
                read = [torch.cat([tokens, token], 1) for tokens in read]
            drawn.append(" ".join(map(str, read[0][0, -6:].tolist())))
    assert Path("a.txt").read_text().splitlines() == drawn


def test_a_config_gives_the_untrained_model_and_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for name, arguments in {
        "untrained": ["c.yaml"],
        "trained": ["run"],
        "adapter": ["c.yaml", "--adapter", "run"],
        "start": ["c.yaml", "--set", "train.init_from=run"],
        "again": ["c.yaml"],
        "seed": ["c.yaml", "--seed", "1"],
    }.items():
        assert sampled(*arguments, *ASKED, "--out", f"{name}.txt", steps=12) == 0
        texts.append(Path(f"{name}.txt").read_text())
        out, _ = said(capsys)
        assert ("no adapter: it samples the untrained model" in out) == (name in ("untrained", "again", "seed"))
        assert ("no adapter: it samples what training would start from, run" in out) == (name == "start")
    untrained, trained, adapter, start, again, seed = texts
    assert untrained == again
    assert trained == adapter == start
    assert len({untrained, trained, seed}) == 3
    assert sampled("run/config.yaml", *ASKED, "--out", "b.txt") == 0
    assert "untrained model (`ttt sample run` samples the run)" in said(capsys)[0]


def test_damage_is_told_by_every_command_that_reads_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "run"]) == 0
    assert "its content is that" in said(capsys)[0]
    stored = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(stored.replace("seed: 0", "seed: 1", 1))
    changed = "warning: run/config.yaml was changed since the run wrote it (backbone.seed: 0 then, 1 now)"
    assert main(["info", "run"]) == 0
    assert "warning: run/config.yaml is not as the run wrote it" in said(capsys)[1]
    sampled("run", *ASKED, "--out", "a.txt")
    assert changed in said(capsys)[1]
    (run / "config.yaml").write_text(stored)
    file = run / "checkpoints" / "step_000002" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x77")
    assert main(["info", "run"]) == 3
    assert said(capsys)[1].endswith(
        "error: run/checkpoints/step_000002/optimizer.safetensors: damaged: its checksum is not that of its content; "
        "restore it from a copy, or write it anew\n"
    )
    assert main(["info", "run", "--no-verify"]) == 0
    assert ", not compared" in said(capsys)[0]
    assert main(["train", "run", "--resume"]) == 2
    assert "optimizer.safetensors: damaged" in said(capsys)[1]
    model = file.with_name("adapter_model.safetensors")
    content = model.read_bytes()
    model.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    for arguments in (["run"], ["c.yaml", "--adapter", "run"], ["c.yaml", "--set", "train.init_from=run"]):
        assert sampled(*arguments, *ASKED, "--out", "b.txt") in (2, 3)
        assert "adapter_model.safetensors: damaged" in said(capsys)[1]
    assert sampled("c.yaml", "--adapter", "run", *ASKED, "--out", "b.txt", "--no-verify") == 0


def test_one_prompt_serves_every_segment_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled("c.yaml", "--seconds", "6", "--prompt", "a cat", "--out", "a.txt") == 0
    assert "one prompt for all 3 segments" in said(capsys)[0]
    assert "prompts=('a cat', 'a cat', 'a cat'), negative_prompts=()" in Path("a.log").read_text()


def test_prompts_from_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.json").write_text(json.dumps([[{"text": "a cat", "neg_text": "fog"}, {"text": "a dog"}]]))
    assert sampled("c.yaml", "--seconds", "4", "--prompts", "p.json", "--out", "a.txt") == 0
    assert "prompts=('a cat', 'a dog'), negative_prompts=('fog', '')" in Path("a.log").read_text()
    said(capsys)
    assert sampled("c.yaml", "--seconds", "6", "--prompts", "p.json", "--out", "b.txt") == 2
    assert "p.json: 6 s are 3 segments, but there are 2 prompts: segment 3 has none" in said(capsys)[1]
    assert not Path("b.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["c.yaml", "--seconds", "4", "--out", "a.txt"],
            2,
            "write what it shows: --prompt TEXT, or --prompts FILE.json",
        ),
        (["c.yaml", *ASKED, "--prompts", "p.json", "--out", "a.txt"], 2, "leave one out"),
        (
            ["c.yaml", "--seconds", "2", "--prompts", "p.json", "--out", "a.txt"],
            3,
            "p.json: the prompts cannot be read",
        ),
        (["c.yaml", "--seconds", "2", "--prompt", "", "--out", "a.txt"], 2, "segment 1 is empty"),
        (["c.yaml", "--seconds", "3", "--prompt", "a", "--out", "a.txt"], 2, "the toy samples segments of 2 s"),
        (["c.yaml", "--seconds", "nan", "--prompt", "a", "--out", "a.txt"], 2, "--seconds nan: is no length"),
        (["c.yaml", "--seconds", "-2", "--prompt", "a", "--out", "a.txt"], 2, "--seconds -2: is no length"),
        (["c.yaml", *ASKED, "--out", "a.txt", "--guidance-scale", "inf"], 2, "--guidance-scale inf"),
        (["c.yaml", *ASKED, "--out", "a.txt", "--seed", "-1"], 2, "--seed"),
        (["c.yaml", *ASKED, "--out", "a.mp4"], 2, "into a .txt"),
        (["c.yaml", *ASKED, "--out", "a.txt", "--guidance-scale", "30"], 2, "guidance of 30 leads nowhere"),
        (["c.yaml", *ASKED, "--out", "there.txt/new/a.txt"], 3, "there.txt is no folder; name another place"),
        (["c.yaml", *ASKED, "--out", "there.txt"], 2, "there.txt: is already there; name another --out, or replace it"),
        (["c.yaml", *ASKED, "--out", "beside.txt"], 2, "beside.log: is already there"),
        (["c.yaml", *ASKED, "--out", "folder.txt", "--overwrite"], 2, "folder.txt: a folder"),
        (["c.yaml", *ASKED, "--out", "a.txt", "--adapter", "nowhere"], 3, "nowhere: no such file"),
        (["nowhere.yaml", *ASKED, "--out", "a.txt"], 3, "nowhere.yaml: no such file"),
        (["folder.txt", *ASKED, "--out", "a.txt"], 2, "holds no run (no config.yaml)"),
        (["c.yaml", *ASKED, "--out", "a.txt", "--set", "ttt.layrs=all"], 2, "TTT101"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told_before_a_model_is_built(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt.train.setup.build", None)
    for name in ("there.txt", "beside.log"):
        Path(name).write_text("mine")
    Path("folder.txt").mkdir()
    assert sampled(*arguments) == code
    _, err = said(capsys)
    assert words in " ".join(err.split())
    assert Path("there.txt").read_text() == Path("beside.log").read_text() == "mine"
    assert not Path("a.txt").exists()


def test_files_are_replaced_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("mine")
    assert sampled("c.yaml", *ASKED, "--out", "a.txt", "--overwrite") == 0
    assert Path("a.txt").read_text() != "mine"
    said(capsys)


def test_an_adapter_of_something_else_is_refused_by_name(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for override, words in {
        "ttt.layers=[1]": "ttt.layers: [0, 1] in the file, [1] here",
        "ttt.mini_batch_size=8": "ttt.mini_batch_size: 4 in the file, 8 here",
        "backbone.dim=32": "backbone.dim: 16 in the file, 32 here",
    }.items():
        assert sampled("c.yaml", *ASKED, "--out", "a.txt", "--adapter", "run", "--set", override) == 2
        assert words in said(capsys)[1]
    assert not Path("a.txt").exists()


@pytest.mark.parametrize("named", [["--adapter", "run"], ["--set", "train.init_from=run"]])
@pytest.mark.parametrize("key", ["mini_batch_size", "base_lr"])
def test_a_sample_is_made_with_what_its_adapter_was_trained_with(
    key: str, named: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run may change where it starts, and says so, is no less another model: a sample of that is refused."""
    theirs, ours = {"mini_batch_size": ("4", "8"), "base_lr": ("1.0", "0.5")}[key]
    asked = ["c.yaml", *ASKED, "--out", "a.txt", *named]
    assert sampled(*asked, "--set", f"ttt.{key}={ours}") == 2
    err = said(capsys)[1]
    assert f"ttt.{key}: {theirs} in the file, {ours} here" in err
    assert f"give the config the file's: --set ttt.{key}={theirs}" in err
    assert not Path("a.txt").exists()
    assert sampled(*asked, "--set", f"ttt.{key}={theirs}") == 0
    said(capsys)


def test_a_run_is_sampled_where_its_data_are_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(stored.replace("train_data: null", "train_data: elsewhere.txt"))
    shutil.move(run, "moved")
    assert sampled("moved", *ASKED, "--out", "a.txt") == 0
    assert main(["check", "moved/config.yaml"]) == 1
    said(capsys)


def test_a_run_without_a_checkpoint_has_nothing_to_sample(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next((run / "checkpoints").iterdir()).joinpath("adapter_model.safetensors").unlink()
    assert sampled("run", *ASKED, "--out", "a.txt") == 2
    _, err = said(capsys)
    assert "run: has no complete checkpoint" in err
    assert "name run/config.yaml to sample the model before training" in err


# --- the others ---


def test_precompute_makes_the_data_that_training_reads(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["c.yaml", "--set", "data.train_data=made.txt"]
    assert main(["check", *arguments]) == 1  # it is not there yet
    assert "TTT501" in capsys.readouterr().out
    assert main(["precompute", *arguments]) == 0
    assert said(capsys)[0] == "4 streams\n"
    assert main(["train", *arguments, "--set", "run_dir=run"]) == 0
    said(capsys)
    assert main(["precompute", "c.yaml"]) == 2
    assert "data.train_data: says where the data go" in said(capsys)[1]
    assert main(["precompute", *arguments, "--set", "ttt.layrs=all"]) == 2


def test_weights_of_another_program_are_imported_and_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"net.a": torch.ones(2)}, "theirs.safetensors")
    assert main(["import-weights", "theirs.safetensors", "--backbone", "toy", "--out", "ours"]) == 0
    out, _ = said(capsys)
    assert out == "reading theirs.safetensors\nnet.a -> a\nwrote ours/model.safetensors\n"
    assert load_file("ours/model.safetensors").keys() == {"a"}
    assert main(["import-weights", "theirs.safetensors", "--backbone", "toy", "--out", "ours"]) == 2
    assert "ours: is already there" in said(capsys)[1]
    assert main(["import-weights", "nowhere", "--backbone", "toy", "--out", "new"]) == 3
    assert "nowhere: no such file" in said(capsys)[1]
    save_file({"a": torch.ones(2)}, "strange.safetensors")
    assert main(["import-weights", "strange.safetensors", "--backbone", "toy", "--out", "new"]) == 2
    assert "tensor a: not of the toy" in said(capsys)[1]
    assert not Path("new").exists()


def test_a_backbone_without_them_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs").touch()
    for arguments, words in (
        (["sample", "m.yaml", *ASKED, "--out", "a.mp4"], "the backbone moshi has no sampling"),
        (["precompute", "m.yaml"], "the backbone moshi has no precomputation"),
        (["import-weights", "theirs", "--backbone", "moshi", "--out", "ours"], "the backbone moshi has no import of"),
    ):
        Path("m.yaml").write_text("backbone: {name: moshi}\n")
        assert main(arguments) == 2
        assert words in said(capsys)[1]
    assert not Path("ours").exists()
