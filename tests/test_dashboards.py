"""`train.loggers`: W&B and Trackio get every line, a resumed run goes on under its name, and no run ends by them."""

import shutil
import sys
import types

import pytest
from test_train_loop import config, run
from toy import ToyBackbone

from ttt.check import check_config
from ttt.errors import EnvironmentProblem
from ttt.train import pictures
from ttt.train.dashboard_id import dashboard_id
from ttt.train.loggers import Loggers
from ttt.train.metrics import read_metrics

STEPS = 4


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_NAME", "WANDB_ENTITY", "TRACKIO_SPACE_ID", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])


def settings(folder, *loggers, **train):
    return config(folder, train={"max_steps": STEPS, "ckpt_freq": 2, "ckpt_keep": None, "loggers": loggers, **train})


def cut_back(folder):
    """Make a run as if its process had been killed after step 3, before its second checkpoint."""
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]))


def expected(folder):
    """Every number of a run's lines, by step."""
    found = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}
        for site, evidence in line.get("layers", {}).items():
            numbers |= {f"{site}/{name}": value for name, value in evidence.items() if value is not None}
        found[line["step"]] = numbers
    return found


# --- W&B ---


def records(file):
    """The records of a file of W&B: a log of LevelDB's format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""


def history(file):
    """The lines of a file, by step."""
    import json

    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            yield items.pop("_step"), {name: value for name, value in items.items() if not name.startswith("_")}


def name_of(file):
    (run_record,) = {
        (record.run.run_id, record.run.project, record.run.display_name)
        for record in records(file)
        if record.WhichOneof("record_type") == "run"
    }
    return run_record


def test_wandb_gets_every_line_and_a_resumed_run_goes_on_in_its_run(tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "runs" / "mine"
    run(settings(folder, "wandb"))
    (first,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    lines = dict(history(first))
    assert lines.keys() == set(range(1, STEPS + 1))
    for step, numbers in expected(folder).items():
        assert lines[step] == pytest.approx(numbers, nan_ok=True)
    name = (folder / "wandb_run.txt").read_text().strip()
    assert name_of(first) == (name, "ttt", "mine")
    cut_back(folder)
    _, told = run(settings(folder, "wandb"), resume=True)
    assert "warning" not in told
    (second,) = set((folder / "wandb").glob("offline-run-*/*.wandb")) - {first}
    assert name_of(second) == (name, "ttt", "mine")
    assert dict(history(second)).keys() == {3, 4}
    assert not (folder / "tensorboard").exists()


# --- Trackio ---


def test_trackio_gets_every_line_and_a_resumed_run_goes_on_in_its_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio", reason="Trackio wants pillow below 13, so that it is not among what tests install")
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "mine"
    monkeypatch.setenv("TRACKIO_PROJECT", f"test-{tmp_path.name}")
    _, told = run(settings(folder, "trackio"))
    cut_back(folder)
    _, again = run(settings(folder, "trackio"), resume=True)
    assert "warning" not in told + again
    name = f"mine-{(folder / 'trackio_run.txt').read_text().strip()}"
    lines = SQLiteStorage.get_logs(f"test-{tmp_path.name}", name)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]  # those that came again are there once
    for line in lines:
        numbers = expected(folder)[line["step"]]
        assert {key: line[key] for key in numbers if key not in ("tokens_per_second", "peak_memory_bytes")} == {
            key: pytest.approx(value)
            for key, value in numbers.items()
            if key not in ("tokens_per_second", "peak_memory_bytes")
        }
    assert capsys.readouterr().out == ""


# --- both ---


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_not_there_is_told_before_anything_begins(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        EnvironmentProblem, match=f"^train.loggers names {name}, and there is no package .* leave it out$"
    ):
        run(settings(tmp_path / "run", name))
    assert not (tmp_path / "run").exists()
    text = f"backbone: {{name: toy}}\ntrain: {{loggers: [{name}]}}"
    (found,) = [
        each for each in check_config("c.yaml", text=text, backbone=ToyBackbone()).findings if "607" in each.code
    ]
    assert f"pip install {name}" in found.fix


class Failing:
    """What stands for a run of W&B or Trackio whose service is gone."""

    step = 0

    def log(self, numbers, step):
        raise ConnectionError("no route to host")

    def finish(self):
        raise ConnectionError("no route to host")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("where", ["init", "log"])
def test_what_fails_in_it_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch, name, where):
    def init(**settings):
        if where == "init":
            raise ConnectionError("no route to host")
        return Failing()

    package = types.ModuleType(name)
    package.init, package.finish, package.Settings = init, Failing().finish, dict
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, name, package)
    result, told = run(settings(tmp_path / "run", name))
    assert result.steps == STEPS
    assert told.count("no route to host") == 1
    assert f"nothing more goes to {'W&B' if name == 'wandb' else 'Trackio'} (" in " ".join(told.split())


def test_nothing_is_asked_of_a_dashboard_that_is_not_named(tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    loggers = Loggers(settings(tmp_path), tmp_path, first_step=1, warn=pytest.fail)
    loggers.log({"step": 1, "loss": 1.0})
    loggers.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_that_is_named_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(EnvironmentProblem, match="names tensorboard"):
        run(settings(tmp_path / "run", "tensorboard"))


def test_under_which_name_a_run_is_known(tmp_path):
    first = dashboard_id(tmp_path, "wandb", first_step=1)
    assert dashboard_id(tmp_path, "wandb", first_step=5) == first
    assert dashboard_id(tmp_path, "trackio", first_step=5) != first
    assert dashboard_id(tmp_path, "wandb", first_step=1) != first  # a run that starts there again is another
    assert dashboard_id(tmp_path, "wandb", first_step=3, wanted="of-a-sweep") == "of-a-sweep"
    assert dashboard_id(tmp_path, "wandb", first_step=5) == "of-a-sweep"
    for content in (b"\xff\xfe", b"a name/with \x1b[31m", b""):
        (tmp_path / "wandb_run.txt").write_bytes(content)
        assert dashboard_id(tmp_path, "wandb", first_step=5).isalnum()
