"""`ttt sample`, `ttt precompute`, `ttt import-weights`: what a backbone may offer beside training."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_distributions import importable, install
from safetensors.torch import load_file, save_file
from toy import MakingToy, ToyModel, ToyOptions

from ttt.adapter_file import backbone_identity, load_adapter, save_adapter
from ttt.config import TTTConfig
from ttt.errors import EnvironmentProblem, NonFiniteError
from ttt.inject import apply
from ttt.layer import TTTLayer
from ttt.plugins import SampleRequest
from ttt.train import pictures
from ttt.train.passes import seed_pass
from ttt_cli.main import main

PLUGIN = """\
from toy import {toy}
from ttt.plugins.hookspecs import hookimpl

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
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
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


def test_a_sampler_gets_a_model_for_inference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its projections are held in the type of the tokens, whichever way it is asked."""
    made, seen = MakingToy.sample, []

    def sample(self: MakingToy, model: Any, *arguments: Any, **options: Any) -> Any:
        seen.extend({m.q_proj.weight.dtype for m in model.modules() if isinstance(m, TTTLayer)})
        return made(self, model, *arguments, **options)

    monkeypatch.setattr(MakingToy, "sample", sample)
    narrow = ("--set", "train.param_dtype=bfloat16")
    assert sampled("c.yaml", *ASKED, "--out", "a.txt", *narrow) == 0
    (folder / "p.jsonl").write_text('["a cat", "a dog"]\n["a bird", "a fish"]\n')
    assert sampled("c.yaml", "--prompts", "p.jsonl", "--seconds", "4", "--out", "many", *narrow) == 0
    assert seen == [torch.bfloat16] * 3


def test_a_sampler_is_told_which_program_the_weights_are_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the header of an imported adapter says; a run's own checkpoint was learned here, whatever it started from."""
    toy = MakingToy()
    model = toy.build(ToyOptions(num_layers=2, dim=16, num_heads=2), device="cpu", dtype=torch.float32)
    settings = TTTConfig(preset="lm", mini_batch_size=4)
    injection = apply(model, toy.sites(model), settings, causal=True)
    identity = backbone_identity(toy, ToyOptions(num_layers=2, dim=16, num_heads=2))
    for folder, told in (("imported", "Elsewhere"), ("odd", ["a", "list"])):
        save_adapter(folder, injection, backbone=identity, training={"imported_from": told})
    for name, arguments, expected in (
        ("run", ["run"], None),
        ("imported", ["c.yaml", "--adapter", "imported"], "Elsewhere"),
        ("start", ["c.yaml", "--set", "train.init_from=imported"], "Elsewhere"),
        ("odd", ["c.yaml", "--adapter", "odd"], None),
        ("untrained", ["c.yaml"], None),
    ):
        assert sampled(*arguments, *ASKED, "--out", f"{name}.txt") == 0, said(capsys)[1]
        assert f"imported_from={expected!r}" in Path(f"{name}.log").read_text(), name


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
        (["c.yaml", "--seconds", "nan", "--prompt", "a", "--out", "a.txt"], 2, "--seconds nan: is not a length"),
        (["c.yaml", "--seconds", "-2", "--prompt", "a", "--out", "a.txt"], 2, "--seconds -2: is not a length"),
        (["c.yaml", *ASKED, "--out", "a.txt", "--guidance-scale", "inf"], 2, "--guidance-scale inf"),
        (["c.yaml", *ASKED, "--out", "a.txt", "--seed", "-1"], 2, "--seed"),
        (["c.yaml", *ASKED, "--out", "a.mp4"], 2, "into a .txt"),
        (["c.yaml", *ASKED, "--out", "a.txt", "--guidance-scale", "30"], 2, "guidance of 30 leads nowhere"),
        (["c.yaml", *ASKED, "--out", "there.txt/new/a.txt"], 3, "there.txt is not a folder; name another place"),
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


# --- many samples ---

THREE = ("c.yaml", "--prompts", "p.jsonl", "--seconds", "4", "--seed", "7", "--out", "many")


@pytest.fixture
def three(folder: Path) -> list[str]:
    """A file with prompts for three samples, and the names of what they become."""
    second = '["a bird", {"text": "a fish", "neg_text": "fog"}]'
    (folder / "p.jsonl").write_text(f'["a cat", "a dog"]\n\n{second}\n["a cat"]\n')
    return [f"{number}{end}" for number in ("000", "001", "002") for end in (".json", ".log", ".txt")]


def contents() -> dict[str, bytes]:
    return {name: Path("many", name).read_bytes() for name in sorted(os.listdir("many"))}


def test_each_of_many_samples_is_what_it_is_alone(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled(*THREE) == 0
    out, _ = said(capsys)
    assert "p.jsonl:4: one prompt for all 2 segments" in out
    for number in range(3):
        file = f"many/00{number}"
        assert f"sample {number + 1} of 3: {file}.txt, seed {7 + number}\nwrote {file}.txt, {file}.log\n" in out
    assert sorted(os.listdir("many")) == three
    record = json.loads(Path("many/001.json").read_text())
    assert record["made_from"]["prompts"] == ["a bird", "a fish"]
    assert record["made_from"]["negative_prompts"] == ["", "fog"]
    assert record["made_from"]["seed"] == 8
    Path("p.json").write_text('["a bird", {"text": "a fish", "neg_text": "fog"}]')
    assert sampled("c.yaml", "--prompts", "p.json", "--seconds", "4", "--seed", "8", "--out", "alone.txt") == 0
    assert Path("alone.txt").read_bytes() == Path("many/001.txt").read_bytes() != Path("many/000.txt").read_bytes()
    assert sampled("c.yaml", *ASKED, "--seed", "7", "--out", "new/folder/") == 0
    assert Path("new/folder/000.txt").read_bytes() == Path("many/000.txt").read_bytes()


def test_the_same_command_makes_what_is_missing(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled(*THREE) == 0
    before = contents()
    Path("many/.writing-01234567-002").mkdir()  # as a killed one leaves it
    Path("many/.writing-mine").touch()
    for gone in (("001.txt",), ("000.txt", "000.json", "000.log"), ("002.log",)):
        for name in gone:
            Path("many", name).unlink()
        times = {name: Path("many", name).stat().st_mtime_ns for name in before if Path("many", name).exists()}
        said(capsys)
        assert sampled(*THREE) == 0
        assert "many: 2 of 3 samples are there already" in said(capsys)[0]
        Path("many/.writing-mine").unlink(missing_ok=True)
        assert contents().keys() == before.keys()
        assert all(contents()[name] == before[name] for name in before if name.endswith(".txt"))
        kept = [name for name in times if name[:3] != gone[0][:3]]
        assert len(kept) == 6
        assert all(Path("many", name).stat().st_mtime_ns == times[name] for name in kept)
    assert sampled(*THREE) == 0
    assert "many: 3 of 3 samples are there already" in said(capsys)[0]


def test_what_was_made_otherwise_is_named(run: Path, three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled(*THREE) == 0
    before = contents()
    way_out = "name another --out, or make what differs anew with --overwrite"
    for more, words in (
        (["--seed", "8"], "many/000.txt: was made from something else (seed: 7 then, 8 now)"),
        (["--guidance-scale", "2"], "(guidance_scale: 6.0 then, 2.0 now)"),
        (["--adapter", "run"], "(adapter: none then, run/checkpoints/step_000002/adapter_model.safetensors now"),
        (["--set", "ttt.base_lr=0.5"], "(ttt.base_lr: 1.0 then, 0.5 now)"),
        (["--set", "train.seed=1"], "(train.seed: 0 then, 1 now)"),
        (["--negative-prompt", "x"], "--negative-prompt and the neg_text in p.jsonl:3 both say"),
    ):
        assert sampled(*THREE, *more) == 2
        _, err = said(capsys)
        assert words in err
        assert way_out in err or "both say" in err
    Path("p.jsonl").write_text(Path("p.jsonl").read_text().replace("a bird", "a word"))
    assert sampled(*THREE) == 2
    _, err = said(capsys)
    assert err.startswith("error: many/001.txt: was made from something else (prompts: [")
    assert contents() == before
    assert sampled(*THREE, "--overwrite") == 0
    assert {name for name in before if contents()[name] != before[name]} - {"001.txt"} == {"001.json", "001.log"}


def test_what_a_record_does_not_cover_is_left_alone(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("many").mkdir()
    Path("many/001.txt").write_text("mine")
    assert sampled(*THREE) == 2
    assert "many/001.txt: is there, and no 001.json says what it was made from; name another --out" in said(capsys)[1]
    assert os.listdir("many") == ["001.txt"]
    assert sampled(*THREE, "--overwrite") == 0
    before = contents()
    Path("many/002.txt").write_text("changed")
    assert sampled(*THREE) == 2
    assert "many/002.txt: is not the file that was written there; name another --out" in said(capsys)[1]
    assert sampled(*THREE, "--no-verify") == 0
    assert sampled(*THREE, "--overwrite") == 0
    record = Path("many/000.json")
    record.write_text(record.read_text().replace("a dog", "a hog"))
    assert sampled(*THREE) == 3
    assert "many/000.json: damaged: its checksum is not that of its content" in said(capsys)[1]
    assert sampled(*THREE, "--overwrite") == 0
    changed = {name for name in before if contents()[name] != before[name]}
    assert changed == {"000.log", "002.log", "000.json", "002.json"}


def test_one_that_is_no_numbers_does_not_keep_the_others_from_being_made(
    three: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = MakingToy.sample

    def failing(self: MakingToy, model: ToyModel, request: SampleRequest, *rest: Any, **more: Any) -> Any:
        files = usual(self, model, request, *rest, **more)
        if request.seed == 8:
            raise raised[-1]
        return files

    monkeypatch.setattr(MakingToy, "sample", failing)
    raised: list[BaseException] = [NonFiniteError("no numbers")]
    assert sampled(*THREE) == 4
    out, err = said(capsys)
    assert "many/001.txt: no numbers; the others are made all the same" in out
    assert err == "error: many/001.txt: no numbers\n"
    assert sorted(os.listdir("many")) == three[:3] + three[6:]
    for error, code, words in (
        (KeyboardInterrupt(), 130, "interrupted; samples that are made stay: the same command makes the others\n"),
        (EnvironmentProblem("disk full"), 3, "error: disk full\n"),
        (OSError(errno.ENOSPC, "No space left", "many/x"), 3, "many/x: cannot be used: No space left"),
    ):
        raised.append(error)
        shutil.rmtree("many")
        assert sampled(*THREE) == code
        assert words in said(capsys)[1]
        assert sorted(os.listdir("many")) == three[:3]
    monkeypatch.setattr(MakingToy, "sample", usual)
    assert sampled(*THREE) == 0
    assert sorted(os.listdir("many")) == three


def test_two_processes_do_not_share_a_folder(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fcntl = pytest.importorskip("fcntl")
    Path("many").mkdir()
    handle = os.open("many", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert sampled(*THREE) == 2
    finally:
        os.close(handle)
    assert "many: another process is sampling into it; wait for it, or name another --out" in said(capsys)[1]
    assert os.listdir("many") == []


def test_many_samples_are_looked_at_before_a_model_is_built(
    three: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt.train.setup.build", None)
    Path("q.json").write_text('[["a", "b"], ["c", {"text": "d", "requires_scene_transition": 1}]]')
    Path("file").touch()
    for arguments, code, words in (
        (
            [*THREE[:3], "--seconds", "6", "--out", "m"],
            2,
            "p.jsonl:1: 6 s are 3 segments, but there are 2 prompts",
        ),
        ([*THREE, "--prompts", "q.json"], 2, "q.json: sample 2: segment 2: `requires_scene_transition` must be true"),
        (
            [*THREE[:-1], "m.txt"],
            2,
            "--out m.txt: names one file, but there are prompts for 3 samples; name a folder",
        ),
        ([*THREE[:-1], "file"], 2, "--out file: is not a folder, but there are prompts for 3 samples"),
        ([*THREE[:-1], "file/new"], 3, "file is not a folder; name another place"),
        ([*THREE[:-1], ""], 2, "--out: is empty"),
        ([*THREE, "--seed", str((1 << 63) - 2)], 2, "the last of 3 samples has no seed left; write a smaller one"),
        ([*THREE, "--guidance-scale", "30"], 2, "guidance of 30 leads nowhere"),
        ([*THREE, "--adapter", "nowhere"], 3, "nowhere: no such file"),
    ):
        assert sampled(*arguments) == code, words
        assert words in " ".join(said(capsys)[1].split())
    monkeypatch.setattr(MakingToy, "sample_suffix", "")
    assert sampled(*THREE) == 2
    assert "there are prompts for 3 samples, and the backbone toy makes one sample at a time" in said(capsys)[1]
    assert not Path("many").exists()
    assert not Path("m").exists()


def test_nothing_that_is_asked_for_is_dropped_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.json").write_text(
        json.dumps([{"text": each, "requires_scene_transition": True, "neg_text": "x"} for each in ("a", "b")])
    )
    files = ("--prompts", "p.json", "--seconds", "4", "--out", "a.txt", "--guidance-scale", "1")
    assert sampled("c.yaml", *files) == 0
    out, _ = said(capsys)
    assert "requires_scene_transition: toy makes no transitions; they are left to the texts\n" in out
    assert "requires_scene_transition of a first segment means nothing: no scene is before it\n" in out
    assert "--guidance-scale 1 is without guidance: negative prompts are not read\n" in out
    assert "new_scenes=(False, True)" in Path("a.log").read_text()


# --- the others ---


def test_precompute_makes_the_data_that_training_reads(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["c.yaml", "--set", "data.train_data=made.txt"]
    assert main(["check", *arguments]) == 1  # it is not there yet
    out = capsys.readouterr().out
    assert "TTT501" in out
    assert "make it with `ttt precompute`" in out
    Path("m.yaml").write_text("backbone: {name: moshi}\ndata: {train_data: made.jsonl}\n")
    assert main(["check", "m.yaml"]) == 1
    out = capsys.readouterr().out
    assert "TTT501" in out
    assert "ttt precompute" not in out  # which makes codes for Moshi, not these
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


def test_a_backbone_without_them_says_so_and_who_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs").touch()
    Path("p.jsonl").write_text('["a"]\n["b"]\n')
    Path("m.yaml").write_text("backbone: {name: moshi}\n")
    many = ("--seconds", "4", "--prompts", "p.jsonl", "--out", "many/")
    for arguments, words in (
        (["sample", "m.yaml", *ASKED, "--out", "a.mp4"], "sampling: it cannot make anything from prompts"),
        (["sample", "m.yaml", *many], "sampling: it cannot make anything from prompts"),
        (
            ["import-weights", "theirs", "--backbone", "moshi", "--out", "ours"],
            "import of weights: it knows no other program's checkpoints",
        ),
    ):
        assert main(arguments) == 2
        out, err = said(capsys)
        told = f"the backbone moshi has no {words}; of the installed backbones toy, videodit have it"
        assert told in " ".join(err.split())
        assert out == ""
    assert not Path("ours").exists()


# --- answers ---


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """The toy that answers recordings, in place of the one that samples."""
    (tmp_path / "toy_plugin.py").write_text(PLUGIN.format(toy="AnsweringToy"))
    Path("in.txt").write_text("1 2 3 4 5 6 7 8 9 10 11 12")
    return folder


def test_a_backbone_that_answers_is_asked_for_a_recording(answering: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A seed says the same again, closed gates are the model without TTT, and a failed answer leaves what was there."""
    base = ("sample", "c.yaml", "--audio", "in.txt", "--set", "ttt.initial_gating_alpha=3")
    assert main([*base, "--out", "a.txt"]) == 0
    assert "wrote a.txt" in said(capsys)[0]
    assert main([*base, "--out", "b.txt"]) == 0
    assert main([*base, "--out", "closed.txt", "--gates", "closed"]) == 0
    assert main([*base, "--out", "plain.txt", "--set", "ttt.layers=none"]) == 0
    texts = [Path(f"{name}.txt").read_text() for name in ("a", "b", "closed", "plain")]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert len(texts[0].splitlines()) == 12
    capsys.readouterr()
    assert main([*base, "--out", "a.txt"]) == 2
    assert "a.txt: is already there" in said(capsys)[1]
    assert main([*base, "--out", "a.txt", "--overwrite", "--stereo"]) != 0
    assert Path("a.txt").read_text() == texts[0]
    assert main([*base, "--out", "new/a.txt", "--stereo"]) != 0
    assert not list(answering.rglob(".writing-*"))
    assert not list(answering.rglob("new/*"))


def test_what_is_missing_is_asked_for_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    """First what it is made of, then where it goes, then how long it is."""
    told = []
    for more in ((), ("--prompt", "a"), ("--prompt", "a", "--out", "a.txt")):
        assert main(["sample", "c.yaml", *more]) == 2
        told.append(said(capsys)[1])
    assert [text.count("error:") for text in told] == [1, 1, 1]
    assert "write what it shows: --prompt TEXT" in told[0]
    assert "write where the sample goes: --out" in told[1]
    assert "write how long the sample is: --seconds" in told[2]
    assert main(["sample", "c.yaml", "--audio", "in.txt", "--out", "a.txt"]) == 2
    assert "the backbone toy has no answering" in (error := said(capsys)[1])
    assert "it samples from prompts: write --prompt TEXT" in error
    assert main(["sample", "--help"]) == 0
    helped = " ".join(said(capsys)[0].split())
    assert "From prompts" in helped
    assert "From a recording" in helped
