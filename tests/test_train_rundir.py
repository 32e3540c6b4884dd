"""A run's folder: checkpoints whole or not there, nobody's work overwritten, no other config resumed."""

import contextlib
import errno
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import forking
import pytest
import torch
from toy import ToyBackbone, ToyData, ToyOptions

from ttt.checkpoint_folder import read_checkpoint
from ttt.config import TrainConfig, TTTConfig
from ttt.dotted import dotted
from ttt.errors import ConfigError, EnvironmentProblem, UnreadableError, UsageError
from ttt.files import is_locked, json_objects, lock, read_json, write_json, write_tensors
from ttt.plugins import run_config_model
from ttt.train import claim, rundir
from ttt.train.metrics import MetricsFile
from ttt.train.rundir import RunDir, choose
from ttt.train.stored_config import MAY_DIFFER, StoredConfig, config_differences


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


def test_a_disk_that_does_not_give_the_newest_is_no_reason_to_take_an_older_one(run, monkeypatch):
    """The steps of the newest are there: going on from an older one would lose them, and prune them in the end."""
    save(run, 1)
    save(run, 2)
    read = json_objects.read_file

    def refuse(path, *, limit):
        if "step_000002" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, limit=limit)

    monkeypatch.setattr(json_objects, "read_file", refuse)
    with pytest.raises(UnreadableError, match=r"step_000002/trainer_state.json: cannot be read: Input/output error"):
        run.latest()


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


def test_a_folder_with_a_checkpoint_in_it_is_refused_whole_or_not(tmp_path):
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"already holds a run; continue it with `ttt train .*config.yaml --resume`"):
        RunDir(tmp_path).require_unused()


def test_a_run_that_ended_before_its_first_checkpoint_gives_its_folder_up(run):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    run.require_unused()
    assert run.reopen(config(run.path, train={"lr": 0.5}), ToyBackbone()) == (None, [])
    assert (run.path / "metrics.jsonl").read_text()  # looked at, not yet taken


FOREIGN = {
    "metrics of something else": ({"metrics.jsonl": "{}"}, "holds a metrics.jsonl but no config.yaml"),
    "config of something else": ({"config.yaml": "model: {dim: 3}\n"}, "config.yaml that is not a config of ttt"),
    "config of nothing": ({"config.yaml": ""}, "config.yaml that is not a config of ttt"),
    "metrics of something else beside a config": (
        {"config.yaml": "backbone: toy\n", "metrics.jsonl": '{"step": 1}\n'},
        "holds a metrics.jsonl that no run of ttt with its config.yaml left",
    ),
    "a finished run without its checkpoints": (
        {"config.yaml": "backbone: toy\n", "metrics.jsonl": '{"step": 1}\n', "summary.json": "{}"},
        "holds the summary.json of a finished run, but none of its checkpoints",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_not_known_to_be_worthless_is_not_taken_over(tmp_path, case):
    files, words = FOREIGN[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    run = RunDir(tmp_path)
    for act in (run.require_unused, lambda: run.create(config()), lambda: run.reopen(config(), ToyBackbone())):
        with pytest.raises(UsageError, match=words):
            act()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == files


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "loss.png", "inner_loss.png"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "a folder"),
        (os.mkfifo, "a FIFO"),
        (lambda place: place.symlink_to("nowhere"), "a link that leads nowhere"),
    ],
)
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_what_lies_where_a_file_goes_is_told_before_training(run, name, make, kind, has_checkpoint):
    if has_checkpoint:
        save(run, 4)
    (run.path / name).unlink(missing_ok=True)
    make(run.path / name)
    with pytest.raises(EnvironmentProblem, match=rf"{name}: is {kind}, and a run writes a file there; move it away"):
        run.reopen(config(run.path), ToyBackbone())
    with pytest.raises((EnvironmentProblem, UsageError), match=r"move it away|already holds"):
        run.require_unused()


def test_a_run_dir_that_is_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "run")
    run = RunDir(tmp_path / "run")
    with run.held(), pytest.raises(UsageError, match=r"run is a FIFO; name a folder"):
        run.require_unused()


def test_checkpoints_that_are_a_file_are_told_before_training(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(EnvironmentProblem, match="checkpoints: is not a folder"):
        RunDir(tmp_path).require_unused()


@pytest.mark.parametrize("path", ["a/" * 2000 + "b", "a/" * 1500 + "b", "x" * 300, "a\0b", "/".join(["y" * 200] * 19)])
def test_a_path_that_no_folder_can_have_is_told(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for act in (RunDir(Path(path)).require_unused, lambda: RunDir(Path(path)).reopen(config(), ToyBackbone())):
        with pytest.raises(EnvironmentProblem, match="cannot hold the run: ") as caught:
            act()
        assert len(str(caught.value)) < 700
    assert list(tmp_path.iterdir()) == []


def test_a_config_by_hand_is_put_aside_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("# mine\nbackbone: toy\n")
    RunDir(tmp_path).create(config(tmp_path))
    assert (tmp_path / "config.original.yaml").read_text() == "# mine\nbackbone: toy\n"
    RunDir(tmp_path).create(config(tmp_path))  # its own is replaced
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "config.original.yaml", "config.yaml"]
    (tmp_path / "config.yaml").write_text("backbone: {name: toy}  # another\n")
    RunDir(tmp_path).create(config(tmp_path))
    assert "another" in (tmp_path / "config.original-2.yaml").read_text()


@pytest.mark.parametrize("linked", [False, True])
def test_a_config_by_hand_is_in_its_place_until_the_resolved_one_is(tmp_path, monkeypatch, linked):
    """Else a kill in between leaves a folder that the same command cannot start again."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.yaml").write_text("# mine\nbackbone: toy\n")
    config_file = tmp_path / "run" / "config.yaml"
    if linked:
        config_file.symlink_to(tmp_path / "mine.yaml")
    else:
        config_file.write_text((tmp_path / "mine.yaml").read_text())

    def killed(*arguments):
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(StoredConfig, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                RunDir(tmp_path / "run").create(config(tmp_path / "run"))
        assert config_file.read_text() == "# mine\nbackbone: toy\n"
    RunDir(tmp_path / "run").create(config(tmp_path / "run"))
    assert "# mine" not in config_file.read_text()
    assert (tmp_path / "mine.yaml").read_text() == "# mine\nbackbone: toy\n"
    names = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert names == ["checkpoints", "config.original.yaml", "config.yaml"]
    assert (tmp_path / "run" / "config.original.yaml").read_text() == "# mine\nbackbone: toy\n"


def test_of_two_that_start_at_once_one_wins_and_the_other_writes_nothing(tmp_path):
    first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    with first.held(), second.held():  # neither is there yet
        first.require_unused()
        second.require_unused()
        first.create(config(first.path, train={"max_steps": 7}))
        with pytest.raises(UsageError, match="another process is training in this run_dir"):
            second.create(config(second.path, train={"max_steps": 8}))
    assert "max_steps: 7" in (tmp_path / "run" / "config.yaml").read_text()
    with second.held():
        second.create(config(second.path, train={"max_steps": 8}))


def test_who_comes_when_the_first_has_ended_already_finds_its_checkpoint(tmp_path):
    first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    second.require_unused()
    with first.held():
        first.create(config(first.path))
        save(first, 4)
    with second.held(), pytest.raises(UsageError, match="already holds a run"):
        second.create(config(second.path))


def test_a_held_folder_is_not_even_looked_at_by_another(run):
    with run.held(), pytest.raises(UsageError, match="another process is training"), RunDir(run.path).held():
        raise AssertionError
    with RunDir(run.path).held():
        pass


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
    assert "max_steps: 777" not in (run.path / "config.yaml").read_text()
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
    with contextlib.ExitStack() as held:  # all are training
        for run in runs:
            held.enter_context(run.held())
            run.create(config())
            held.enter_context(contextlib.closing(MetricsFile(run / "metrics.jsonl")))
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


def test_comments_in_the_config_of_a_run_that_goes_on_are_put_aside(run):
    text = (run.path / "config.yaml").read_text()
    for content, kept in (
        (text, False),
        (text.replace("max_steps: 6", "max_steps: 7"), False),
        (f"# why\n{text}", True),
    ):
        (run.path / "config.yaml").write_text(content)
        run.stored_config.keep_comments()
        assert (run.path / "config.original.yaml").exists() == kept
    assert (run.path / "config.original.yaml").read_text() == f"# why\n{text}"


def test_what_is_no_run_yet_is_started_by_resuming(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        assert RunDir(tmp_path / name).reopen(config(), ToyBackbone()) == (None, [])
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_folders_above_that_cannot_be_made_do_not_hang_the_numbering(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("nowhere")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        choose(config(), resume=False).create(config())


def test_checkpoints_without_a_config_are_not_started_over(run):
    save(run, 4)
    (run.path / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"holds checkpoints, but no config.yaml .* train.init_from: .*step_000004"):
        run.reopen(config(run.path), ToyBackbone())


def test_a_lost_config_is_that_of_the_checkpoint(run):
    state = {"config": config(run.path).model_dump(mode="json")}
    run.save_checkpoint(4, state, lambda folder: (folder / "file").write_text("x"), keep=None)
    (run.path / "config.yaml").unlink()
    checkpoint, _ = run.reopen(config(run.path), ToyBackbone())
    assert checkpoint.step == 4
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.0001 in the run, 0\.5 now"):
        run.reopen(config(run.path, train={"lr": 0.5}), ToyBackbone())


def test_tidying_removes_what_a_kill_left_and_no_more(run):
    for step in (2, 3, 4, 5):
        save(run, step)
    (run.path / ".writing-1-config.yaml").write_text("")
    (run.path / "checkpoints" / ".writing-2-step_000001").mkdir()
    (run.path / "mine").write_text("")
    run.tidy(2)
    assert names(run) == ["step_000004", "step_000005"]
    assert sorted(file.name for file in run.path.iterdir()) == ["checkpoints", "config.yaml", "mine"]


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
    run.stored_config.write(other)
    assert "ckpt_freq: 3" in (run.path / "config.yaml").read_text()


def test_keys_that_may_differ_exist():
    keys = dotted(config().model_dump()).keys()
    assert keys >= MAY_DIFFER - {"data.verify", "data.codes"}  # of plugins


def test_a_moved_run_is_the_same_run(tmp_path, run):
    save(run, 4)
    moved = RunDir(run.path.rename(tmp_path / "moved"))
    moved.reopen(config(moved.path), ToyBackbone())
    moved.stored_config.write(config(moved.path))
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


def test_a_key_that_the_run_did_not_know_counts_with_its_default(tmp_path):
    """A run of before LoRA goes on as it was, and not with LoRA; the section `ttt` has defaults of its backbone."""
    settings = config()
    stored = StoredConfig(tmp_path)
    record = stored.record(settings)
    del record["adapter"], record["lora"], record["train"]["seed"], record["ttt"]["ln_eps"]
    before = SimpleNamespace(state={"config": record})
    stored.require_same(before, settings, ToyBackbone())
    lora = settings.model_copy(update={"adapter": "lora"})
    with pytest.raises(ConfigError, match=r'adapter: "ttt" in the run, "lora" now'):
        stored.require_same(before, lora, ToyBackbone())
    seeded = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 3})})
    with pytest.raises(ConfigError, match=r"train\.seed: 0 in the run, 3 now"):
        stored.require_same(before, seeded, ToyBackbone())


# --- whose lock it is ---


def _holds_and_forks(run: Path) -> None:
    """Hold a run as training does, beside a process that was forked meanwhile and lives longer."""
    with claim.Hold() as hold, open(run / "metrics.jsonl", "a") as metrics:
        hold.take(run)
        lock(metrics, run / "metrics.jsonl")
        metrics.write("of the parent, not yet written")
        child = os.fork()
        if child == 0:
            metrics.flush()  # it may, and nothing comes of it
            print("forked", flush=True)
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
        time.sleep(60)


def test_a_lock_ends_with_the_process_that_took_it_even_if_one_that_it_forked_lives_on(tmp_path: Path) -> None:
    """A killed run is queued again at once, and what it forked, such as a plugin's workers, may be a moment behind."""
    run = tmp_path / "run"
    run.mkdir()
    with forking.start(_holds_and_forks, run) as process:
        told = {process.stdout.readline().strip() for _ in range(2)}
        child = int(next(iter(told - {"forked"})))
        try:
            assert is_locked(run)
            assert is_locked(run / "metrics.jsonl"), "what was forked ended its parent's lock"
            process.kill()
            process.wait(60)
            assert not is_locked(run)
            assert not is_locked(run / "metrics.jsonl")
            os.kill(child, 0)  # it is there still
            assert (run / "metrics.jsonl").read_text() == ""
        finally:
            os.kill(child, signal.SIGKILL)
