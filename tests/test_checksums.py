"""Files that are read again tell every changed byte: by their checksums, and by nothing else that could."""

import io
import json
import random

import pytest
import torch
from byte_flips import flips, make_shipped, make_state, report, run_subjects
from rich.console import Console
from safetensors.torch import load_file, save_file
from toy import ToyBackbone, ToyData, ToyOptions

from ttt import checksums
from ttt.adapter_file import MODEL, read_info
from ttt.config import RunConfig, TrainConfig, TTTConfig
from ttt.errors import ConfigError, DamagedFileWarning, EnvironmentProblem
from ttt.files import read_header, read_json, read_tensors, verify_tensors, write_json, write_tensors
from ttt.train import pictures, train
from ttt.train.checkpoint import CARRIED, OPTIMIZER
from ttt.train.claim import SUMMARY
from ttt.train.metrics import MetricsFile
from ttt.train.rundir import RunDir
from ttt.train.stored_config import CONFIG

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.ones(5, dtype=torch.bfloat16),
    "d": torch.zeros(0, 4),
    "e": torch.tensor([True, False]),
}


def flip(file, at, mask=1):
    content = bytearray(file.read_bytes())
    content[at] ^= mask
    file.write_bytes(content)


def damage_tensors(file):
    flip(file, -3)


# --- safetensors ---


def test_tensors_come_back_and_their_checksum_is_of_content_not_of_layout(tmp_path):
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_tensors(file, TENSORS, {"format": "x"})
    assert verify_tensors(file) == read_header(file).checksum
    read = read_tensors(file)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    # the same with a longer header, which moves every tensor
    header = file.read_bytes()
    length = int.from_bytes(header[:8], "little")
    other.write_bytes((length + 8).to_bytes(8, "little") + header[8 : 8 + length] + b" " * 8 + header[8 + length :])
    assert verify_tensors(other) == verify_tensors(file)
    save_file({**TENSORS, "c": TENSORS["c"] + 1}, other, metadata=read_header(file).metadata)
    with pytest.raises(EnvironmentProblem, match=r"b\.safetensors: damaged: its checksum is not that of its content"):
        read_tensors(other)
    assert read_tensors(other, verify=False)["c"][0] == 2


@pytest.mark.parametrize("place", ["metadata", "name", "shape", "bytes", "key", "digest"])
def test_whatever_changes_is_told(tmp_path, place):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"first": torch.zeros(2, 3), "second": torch.zeros(3, 2)}, {"format": "one"})
    content = file.read_bytes()
    changed = {
        "metadata": lambda: content.replace(b'"one"', b'"two"'),
        "name": lambda: content.replace(b'"first"', b'"thirs"'),
        "shape": lambda: content.replace(b"[2,3]", b"[6,1]"),
        "bytes": lambda: content[:-1] + b"\1",
        "key": lambda: content.replace(b'"sha256"', b'"sha25v"'),
        "digest": lambda: content.replace(b'"sha256":"', b'"sha256":"f')[: len(content)],
    }[place]()
    assert changed != content
    file.write_bytes(changed)
    with pytest.raises(EnvironmentProblem, match=r"a\.safetensors"):
        verify_tensors(file)


def test_tensors_are_hashed_in_pieces_and_in_threads_to_the_same(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    tensors = {name: torch.randn(1000) for name in "abc"}
    monkeypatch.setattr(checksums, "PIECE", 1024)
    write_tensors(file, tensors, {})
    alone = verify_tensors(file)
    monkeypatch.setattr(checksums, "_WORTH_THREADS", 0)
    assert verify_tensors(file) == alone
    assert len(checksums.digests_in_file(file, [(0, 4000)])[0]) == 4
    flip(file, -1000)
    with pytest.raises(EnvironmentProblem, match="damaged"):
        verify_tensors(file)


def test_files_of_others_have_none_and_load(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert verify_tensors(tmp_path / "x.safetensors") is None
    assert read_tensors(tmp_path / "x.safetensors")["x"].sum() == 2


HEADERS = {
    "a gap": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    '"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
    "an overlap": '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
    '"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
    "one name twice": '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
    '"a":{"dtype":"I8","shape":[3],"data_offsets":[0,3]}}',
    "no whole number": '{"a":{"dtype":"U8","shape":[3.0],"data_offsets":[0,3]}}',
    "a negative extent": '{"a":{"dtype":"U8","shape":[-1,-3],"data_offsets":[0,3]}}',
    "a product that never ends": '{"a":{"dtype":"U8","data_offsets":[0,3],"shape":['
    + ",".join(["9" * 4000] * 400)
    + "]}}",
    "many extents": '{"a":{"dtype":"U8","shape":[' + ",".join(["9"] * 100_000) + '],"data_offsets":[0,3]}}',
    "a deep nest": "[" * 100_000,
    "metadata of numbers": '{"__metadata__":{"a":1},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
}  # fmt: skip


@pytest.mark.parametrize("problem", HEADERS)
def test_a_header_that_lies_is_refused_before_anything_is_made_of_it(tmp_path, problem):
    header = HEADERS[problem].encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(EnvironmentProblem, match="its header does not parse"):
        read_header(tmp_path / "x.safetensors")


def test_a_header_of_a_hundred_megabytes_is_not_read_where_none_is_that_long(tmp_path):
    with open(tmp_path / MODEL, "wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(90_000_008)
    with pytest.raises(EnvironmentProblem, match=r"its header takes 85\.8 MiB, and no file of its kind needs more"):
        read_info(tmp_path)


# --- JSON ---


def test_a_json_object_tells_every_change_of_meaning(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1, "b": {"c": [1.5, None, True]}, "d": "ä"})
    whole = file.read_bytes()
    content = read_json(file, sealed=True)
    told = 0
    draw = random.Random(0)
    for at in range(len(whole)):
        file.write_bytes(whole)
        flip(file, at, draw.randrange(1, 256))
        try:
            assert read_json(file, sealed=True) == content
        except EnvironmentProblem as problem:
            assert str(file) in str(problem)  # noqa: PT017 - either way is right
            told += 1
    assert told > 0.8 * len(whole)
    file.write_text('{"a": 1}')
    assert read_json(file, sealed=True) == {"a": 1}


# --- a run ---


def config(folder, **train):
    return RunConfig(
        backbone=ToyOptions(name="toy", num_layers=2, dim=16, num_heads=2),
        ttt=TTTConfig(mini_batch_size=4, persistent_states=True),
        data=ToyData(window=12, shuffle=False),
        train=TrainConfig(**{"max_steps": 3, "trainable": "all", "device": "cpu", "ckpt_freq": 1, **train}),
        run_dir=str(folder),
    )


def run(settings, *, resume=False, **more):
    text = io.StringIO()
    return train(settings, ToyBackbone(), resume=resume, console=Console(file=text, width=200), **more), text.getvalue()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of three steps with all its checkpoints; copy it before it is changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_run", lambda run: [])
        folder = tmp_path_factory.mktemp("ended") / "run"
        run(config(folder))
    return folder


@pytest.fixture
def copied(ended, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
    return shutil.copytree(ended, tmp_path / "run")


def step(folder, number):
    return folder / "checkpoints" / f"step_{number:06d}"


@pytest.mark.parametrize("name", [MODEL, "backbone_model.safetensors", OPTIMIZER, CARRIED])
def test_a_damaged_checkpoint_is_told_and_an_older_one_resumed(ended, copied, name):
    damage_tensors(step(copied, 3) / name)
    result, text = run(config(copied, ckpt_keep=1), resume=True)
    assert f"passed over a checkpoint that is not whole: {step(copied, 3) / name}: damaged" in text
    assert "resumed after step 2 of 3" in text
    before, after = load_file(step(ended, 3) / name), load_file(result.checkpoint / name)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_unless_it_is_told_not_to_look(copied):
    damage_tensors(step(copied, 3) / OPTIMIZER)
    _, text = run(config(copied), resume=True, verify=False)
    assert "done already" in text


def test_a_damaged_checkpoint_does_not_count_among_those_that_stay(copied):
    damage_tensors(step(copied, 3) / OPTIMIZER)
    directory = RunDir(copied)
    assert directory.latest(verify=True)[0].step == 2
    write = directory.save_checkpoint(2, {}, lambda folder: (folder / "file").write_text("x"), keep=1)
    assert write.exists()
    assert RunDir(copied).latest(verify=True)[0].step == 2


def test_what_starts_from_a_run_is_told_which_checkpoint_it_gets(copied):
    damage_tensors(step(copied, 3) / MODEL)
    with pytest.warns(DamagedFileWarning, match=r"step_000003.*damaged.*step_000002 is taken instead"):
        assert read_info(copied, verify=True).path.parent == step(copied, 2)
    assert read_info(copied).path.parent == step(copied, 3)  # what is not read is not looked at
    (step(copied, 3) / MODEL).unlink()
    with pytest.warns(DamagedFileWarning, match=r"step_000003.*missing; .*step_000002 is taken instead"):
        read_info(copied)


def test_info_of_a_run_ends_with_3_where_its_newest_checkpoint_is_passed_over(copied, capsys):
    from ttt_cli.main import main

    assert main(["info", str(copied)]) == 0
    state = step(copied, 3) / "trainer_state.json"
    state.write_text(state.read_text().replace('"step": 3', '"step": 2'))
    capsys.readouterr()
    assert main(["info", str(copied)]) == 3
    err = capsys.readouterr().err
    assert f"error: {state}: damaged: its checksum is not that of its content" in err
    assert main(["info", str(copied), "--no-verify"]) == 0
    assert f"{step(copied, 2)} is taken instead" in capsys.readouterr().err


def test_a_config_changed_behind_the_runs_back_is_told_by_key(copied):
    text = (copied / CONFIG).read_text()
    (copied / CONFIG).write_text(text.replace("max_steps: 3", "max_steps: 4"))
    _, told = run(config(copied, max_steps=4), resume=True)
    assert f"{copied / CONFIG} was changed since the run wrote it (train.max_steps: 3 then, 4 now)" in told
    _, told = run(config(copied, max_steps=5), resume=True)  # an override is no change of the file
    assert "was changed" not in told
    content, _, _ = text.rpartition("# sha256")  # as runs wrote it before there were checksums
    (copied / CONFIG).write_text(content)
    _, told = run(config(copied, max_steps=6), resume=True)
    assert "was changed" not in told
    (copied / CONFIG).write_text(text.replace("lr: 0.0001", "lr: 0.0003"))
    with pytest.raises(
        ConfigError, match=r"train\.lr: 0\.0001 in the run, 0\.0003 now.*config\.yaml was changed since"
    ):
        run(config(copied, lr=3e-4, max_steps=5), resume=True)


def test_a_damaged_summary_is_told_and_written_anew(copied):
    before = read_json(copied / SUMMARY, sealed=True)
    (copied / SUMMARY).write_text((copied / SUMMARY).read_text().replace('"steps": 3', '"steps": 2'))
    with pytest.warns(DamagedFileWarning, match=r"summary\.json: damaged.*the run sums itself up anew"):
        run(config(copied), resume=True)
    assert read_json(copied / SUMMARY, sealed=True)["eval_loss"] == before["eval_loss"]


def test_lines_are_on_the_disk_before_the_checkpoint_that_follows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
    calls = []
    sync, save = MetricsFile.sync, RunDir.save_checkpoint
    monkeypatch.setattr(MetricsFile, "sync", lambda self: (calls.append("lines"), sync(self))[1])
    monkeypatch.setattr(
        RunDir, "save_checkpoint", lambda self, *a, **k: (calls.append("checkpoint"), save(self, *a, **k))[1]
    )
    run(config(tmp_path / "run", max_steps=2))
    assert calls == ["lines", "checkpoint"] * 2


def test_a_run_from_before_there_were_checksums_is_resumed(copied):
    """Version 1: sizes in `trainer_state.json`, nothing in the headers."""
    for folder in (copied / "checkpoints").iterdir():
        for file in folder.glob("*.safetensors"):
            metadata = read_header(file).metadata
            del metadata["sha256"]
            metadata = {key: value.replace('"version": 3', '"version": 1') for key, value in metadata.items()}
            save_file(load_file(file), file, metadata=metadata)
        (folder / "adapter_config.json").unlink()
        state = read_json(folder / "trainer_state.json", sealed=True)
        state["files"] = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
        del state["config"]
        (folder / "trainer_state.json").write_text(json.dumps(state | {"version": 1}))
    (copied / SUMMARY).write_text(json.dumps(read_json(copied / SUMMARY, sealed=True)))
    lines = [checksums.parse_line(line) for line in (copied / "metrics.jsonl").read_bytes().splitlines()]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = read_info(copied, verify=True)
    assert (info.version, info.checksum) == (1, None)
    result, _ = run(config(copied, max_steps=4), resume=True)
    assert result.steps == 4
    assert read_info(copied, verify=True).checksum is not None


# --- the driver ---


def test_forty_flips_over_every_file_of_a_run_are_told_or_harmless(copied, tmp_path, capsys):
    subjects = [*run_subjects(copied, ToyBackbone()), *make_state(tmp_path)]
    assert len(subjects) == 10
    outcomes = list(flips(subjects, 40, seed=1))
    assert report(iter(outcomes)) == 0, capsys.readouterr().err
    assert sum(outcome == "caught" for _, outcome, _ in outcomes) >= 30


def test_flips_in_what_the_demos_ship(tmp_path, capsys):
    assert report(flips(make_shipped(tmp_path), 22, seed=2)) == 0, capsys.readouterr().err


def test_the_driver_finds_files_that_lie(copied, monkeypatch):
    """Without the comparison, changed tensors are silent: it is what catches them."""
    subjects = [each for each in run_subjects(copied, ToyBackbone()) if each.kind == OPTIMIZER]
    monkeypatch.setattr("ttt.checkpoint_folder.verify_tensors", lambda file: read_header(file).checksum)
    assert any(outcome == "SILENT" for _, outcome, _ in flips(subjects, 12, seed=3))
