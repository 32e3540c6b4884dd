"""A run's folder: checkpoints whole or not there, nobody's work overwritten, no other config resumed."""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from toy import ToyBackbone, ToyData, ToyOptions

from ttt.config import TrainConfig, TTTConfig, run_config_model
from ttt.errors import ConfigError, EnvironmentProblem, UsageError
from ttt.files import read_json, write_json, write_tensors
from ttt.train import rundir
from ttt.train.metrics import MetricsFile
from ttt.train.rundir import RunDir, choose, config_differences, read_checkpoint


def config(run_dir=None, **sections):
    return run_config_model(ToyBackbone())(
        backbone=ToyOptions(name="toy"),
        ttt=TTTConfig(**sections.get("ttt", {})),
        data=ToyData(**sections.get("data", {})),
        train=TrainConfig(**sections.get("train", {})),
        run_dir=None if run_dir is None else str(run_dir),
    )


def save(run, step, *, content="x", keep=None):
    return run.save_checkpoint(step, {"note": step}, lambda folder: (folder / "file").write_text(content), keep=keep)


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create(config(run.path))
    return run


def names(run):
    return sorted(folder.name for folder in (run.path / "checkpoints").iterdir())


# --- checkpoints ---


def test_a_checkpoint_says_what_belongs_to_it(run):
    path = save(run, 100)
    assert path == run.path / "checkpoints" / "step_000100"
    checkpoint, passed_over = run.latest()
    assert (checkpoint.path, checkpoint.step, checkpoint.state["note"]) == (path, 100, 100)
    assert checkpoint.state["files"] == {"file": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    assert passed_over == []


def test_the_latest_is_by_step_not_by_name(run):
    save(run, 999_999)
    save(run, 1_000_000)
    save(run, 20)
    assert run.latest()[0].step == 1_000_000


def test_the_oldest_go_and_foreign_folders_stay(run):
    (run.path / "checkpoints" / "step_000001").mkdir()
    (run.path / "checkpoints" / "notes").mkdir()
    for step in (2, 3, 4, 5):
        save(run, step, keep=2)
    assert names(run) == ["notes", "step_000001", "step_000004", "step_000005"]


def test_all_stay_where_keep_is_none(run):
    for step in (2, 3, 4, 5):
        save(run, step)
    assert len(names(run)) == 4


def test_an_incomplete_checkpoint_of_the_same_step_is_replaced(run):
    path = save(run, 3, content="first")
    (path / "file").write_text("cut")
    assert run.latest()[0] is None
    save(run, 3, content="second")
    assert (run.latest()[0].path / "file").read_text() == "second"


DAMAGES = {
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "no such file"),
    "cut state": (lambda folder: os.truncate(folder / "trainer_state.json", 30), "not JSON"),
    "foreign": (lambda folder: (folder / "trainer_state.json").write_text('{"step": 3}'), "not a checkpoint of ttt"),
    "missing file": (lambda folder: (folder / "file").unlink(), "file: missing"),
    "cut file": (lambda folder: (folder / "file").write_text(""), "0 bytes, 1 were written"),
    "renamed": (lambda folder: folder.rename(folder.with_name("step_000009")), "does not describe"),
    "newer": (
        lambda folder: write_json(
            folder / "trainer_state.json", read_json(folder / "trainer_state.json", sealed=True) | {"version": 3}
        ),
        "checkpoint version 3, this ttt reads up to 2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_checkpoint_is_never_taken_and_the_reason_told(run, damage):
    act, reason = DAMAGES[damage]
    save(run, 2)
    act(save(run, 3))
    checkpoint, passed_over = run.latest()
    assert checkpoint.step == 2
    assert len(passed_over) == 1
    assert reason in passed_over[0]


def test_a_damaged_safetensors_file_is_noticed_by_its_header(run):
    path = run.save_checkpoint(
        3, {}, lambda folder: write_tensors(folder / "x.safetensors", {"x": torch.zeros(2)}, {}), keep=None
    )
    size = (path / "x.safetensors").stat().st_size
    (path / "x.safetensors").write_bytes(b"\xff" * size)
    with pytest.raises(EnvironmentProblem, match=r"x\.safetensors: no safetensors file"):
        read_checkpoint(path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failed_write_leaves_what_was_there(run, error):
    save(run, 2)

    def fail(folder):
        (folder / "file").write_text("half")
        raise error

    with pytest.raises(EnvironmentProblem if isinstance(error, OSError) else type(error)) as caught:
        run.save_checkpoint(3, {}, fail, keep=1)
    if isinstance(error, OSError):
        assert "step_000003: no space left on the disk" in str(caught.value)
    assert names(run) == ["step_000002"]


# --- who may write ---


def test_a_new_folder_is_taken_and_the_config_written(tmp_path):
    run = RunDir(tmp_path / "a" / "b")
    run.require_unused()
    assert not (tmp_path / "a").exists()
    run.create(config(run.path, train={"max_steps": 7}))
    assert "max_steps: 7" in (run.path / "config.yaml").read_text()


@pytest.mark.parametrize("content", ["metrics.jsonl", "checkpoints/step_000001/file"])
def test_a_folder_with_a_run_in_it_is_refused(tmp_path, content):
    (tmp_path / content).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / content).write_text("{}")
    with pytest.raises(UsageError, match=r"already holds a run; continue it with `ttt train .*config.yaml --resume`"):
        RunDir(tmp_path).require_unused()


def test_a_run_that_another_process_is_at_keeps_its_config(run):
    """Its folder may be empty yet, in the first minutes of a large model, or full of checkpoints."""
    other = config(run.path, train={"max_steps": 777})
    with contextlib.closing(MetricsFile(run.path / "metrics.jsonl")):
        run.require_unused()
        with pytest.raises(UsageError, match="another process is training"):
            run.create(other)
        save(run, 4)
        with pytest.raises(UsageError, match="another process is training"):
            run.reopen(other, ToyBackbone())
    assert "777" not in (run.path / "config.yaml").read_text()
    run.reopen(other, ToyBackbone())


def test_a_run_that_never_did_a_step_gives_its_folder_up(run):
    (run.path / "metrics.jsonl").touch()
    run.require_unused()


def test_a_file_is_no_run_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        RunDir(tmp_path / "file").require_unused()
    with pytest.raises(EnvironmentProblem):
        RunDir(tmp_path / "file" / "below").create(config())


def test_without_a_run_dir_each_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rundir.time, "strftime", lambda form: "20260102-030405")
    runs = [choose(config(), resume=False) for _ in range(3)]
    for run in runs:
        run.require_unused()
        run.create(config())
    assert [run.path for run in runs] == [
        Path("runs/toy-20260102-030405"),
        Path("runs/toy-20260102-030405-2"),
        Path("runs/toy-20260102-030405-3"),
    ]


def test_resuming_needs_to_know_which_run_and_suggests_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^--resume: which run\? Give its config.yaml, or its run_dir$"):
        choose(config(), resume=True)
    for name in ("toy-1", "toy-2", "other-3"):
        run = RunDir(Path("runs") / name)
        run.create(config(run.path))
        os.utime(run.path / "config.yaml", (1, 1 + len(name) + int(name[-1])))
        save(run, 1)
    RunDir(Path("runs/toy-9")).create(config())  # nothing to resume in it
    with pytest.raises(UsageError, match=r"as `ttt train runs/toy-2/config\.yaml --resume`"):
        choose(config(), resume=True)


def test_the_command_is_quoted_for_the_shell(tmp_path):
    assert RunDir(Path("my runs/a")).resume_command() == "ttt train 'my runs/a/config.yaml' --resume"


# --- resuming ---


def test_a_run_reopens_with_its_own_config(run):
    save(run, 4)
    checkpoint, _ = run.reopen(config(run.path), ToyBackbone())
    assert checkpoint.step == 4


def test_what_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(UsageError, match="holds no run to resume"):
        RunDir(tmp_path / "none").reopen(config(), ToyBackbone())
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_complete_checkpoint_is_not_silently_started_anew(run):
    path = save(run, 4)
    (path / "file").unlink()
    with pytest.raises(UsageError, match=r"holds no complete checkpoint \(.*file: missing\), so there is nothing"):
        run.reopen(config(run.path), ToyBackbone())


def test_another_config_is_refused_with_every_key(run):
    save(run, 4)
    other = config(run.path, ttt={"mini_batch_size": 32}, train={"lr": 0.5, "seed": 3}, data={"window": 7})
    with pytest.raises(ConfigError) as caught:
        run.reopen(other, ToyBackbone())
    message = str(caught.value)
    for part in (
        "data.window: 24 in the run, 7 now",
        "train.lr: 0.0001 in the run, 0.5 now",
        "train.seed: 0 in the run, 3 now",
        "ttt.mini_batch_size: 16 in the run, 32 now",
    ):
        assert part in message
    assert "mini_batch_size: 16" in (run.path / "config.yaml").read_text()


def test_length_place_and_memory_may_change(run):
    save(run, 4)
    other = config(
        run.path,
        ttt={"scan_checkpoint_group_size": 0},
        train={"max_steps": 5, "log_freq": 7, "ckpt_freq": 3, "ckpt_keep": None, "device": "cpu", "evidence_freq": 2},
    )
    run.reopen(other, ToyBackbone())
    run.write_config(other)
    assert "ckpt_freq: 3" in (run.path / "config.yaml").read_text()


def test_keys_that_may_differ_exist():
    keys = {"run_dir"} | {
        f"{section}.{name}"
        for section in ("ttt", "train", "eval")
        for name in type(getattr(config(), section)).model_fields
    }
    assert keys >= rundir.MAY_DIFFER - {"data.verify"}  # of plugins whose data carry checksums


def test_a_moved_run_is_the_same_run(tmp_path, run):
    save(run, 4)
    moved = RunDir(run.path.rename(tmp_path / "moved"))
    moved.reopen(config(moved.path), ToyBackbone())
    moved.write_config(config(moved.path))
    assert str(moved.path) in (moved.path / "config.yaml").read_text()


def test_differences_are_none_between_equals():
    assert config_differences(config(), config("elsewhere")) == []


def test_what_a_killed_process_left_is_removed(run):
    (run.path / ".writing-1-config.yaml").write_text("")
    leftover = run.path / "checkpoints" / ".writing-2-step_000003"
    leftover.mkdir()
    (leftover / "file").write_text("")
    (run.path / "mine").write_text("")
    run.remove_unfinished()
    assert sorted(file.name for file in run.path.iterdir()) == ["checkpoints", "config.yaml", "mine"]
    assert names(run) == []


def test_trainer_state_is_json_that_people_can_read(run):
    content = json.loads((save(run, 4) / "trainer_state.json").read_text())
    assert content.pop("files").keys() == {"file"}
    assert len(content.pop("sha256")) == 64
    assert content == {"format": "ttt-checkpoint", "version": 2, "step": 4, "note": 4}
