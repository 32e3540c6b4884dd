"""A run that was started with relative paths goes on from any folder, also after it was moved."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from fake_distributions import importable, install
from safetensors.torch import load_file

from ttt.checkpoint_folder import newest_checkpoint
from ttt.config import DataOptions, LocalPath, RunConfig
from ttt.config.paths import _mark_of, moved_along, with_absolute_paths
from ttt.config.section import Section
from ttt.plugins import discover
from ttt.train import pictures
from ttt_cli.main import main

PLUGIN = """\
from toy import MakingToy
from ttt.plugins.hookspecs import hookimpl

@hookimpl
def ttt_backbone():
    return MakingToy()
"""
CONFIG = """\
backbone: {name: toy, num_layers: 2, dim: 16, num_heads: 2}
ttt: {mini_batch_size: 4}
data: {window: 12, train_data: data/train.txt, eval_data: data/eval.txt}
train: {max_steps: 2, lr: 0.05, device: cpu}
"""
MORE = ("--set", "train.max_steps=4")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with data and a finished run of relative paths; and another folder to work in."""
    install(tmp_path, "toy", "toy_plugin", PLUGIN)
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "data").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
    lines = [" ".join(str((7 * row + token * (row + 1)) % 16) for token in range(30)) for row in range(6)]
    Path("data/train.txt").write_text("\n".join(lines[:4]) + "\n")
    Path("data/eval.txt").write_text("\n".join(lines[4:]) + "\n")
    Path("c.yaml").write_text(CONFIG)
    with importable(tmp_path):
        assert main(["train", "c.yaml", "--set", "run_dir=runs/one"]) == 0
        yield tmp_path


def weights(run: Path) -> dict[str, Any]:
    found = newest_checkpoint(run, verify=True).checkpoint
    assert found is not None
    assert found.path.name == "step_000004"
    return {name: tensor.tolist() for name, tensor in load_file(found.path / "adapter_model.safetensors").items()}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out + captured.err


def test_a_run_goes_on_from_any_folder_with_its_own_data(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if other data have the same relative path there."""
    shutil.copytree("runs/one", "runs/two")
    assert main(["train", "--resume", "runs/one", *MORE]) == 0
    monkeypatch.chdir(home / "elsewhere")
    Path("data").mkdir()
    for name in ("train", "eval"):
        Path(f"data/{name}.txt").write_text("1 1 1 1 1 1 1 1 1 1 1 1 1 1\n")
    assert main(["train", "--resume", "../project/runs/two", *MORE]) == 0
    assert weights(home / "project/runs/two") == weights(home / "project/runs/one")
    assert main(["sample", "../project/runs/two", "--seconds", "2", "--prompt", "a", "--out", "a.txt"]) == 0


def test_the_stored_config_names_its_data_absolutely_and_the_users_own_still_fits(home: Path) -> None:
    stored = yaml.safe_load(Path("runs/one/config.yaml").read_text())
    assert stored["data"]["train_data"] == str(home / "project/data/train.txt")
    assert stored["run_dir"] == "runs/one"
    state = json.loads(next(Path("runs/one/checkpoints").glob("*/trainer_state.json")).read_text())
    assert state["config"]["data"]["eval_data"] == str(home / "project/data/eval.txt")
    assert main(["train", "c.yaml", "--resume", "--set", "run_dir=runs/one", *MORE]) == 0
    assert not Path("runs/one/config.original.yaml").exists()


def test_the_users_config_in_another_folder_means_other_data(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "project/data", home / "elsewhere/data")
    shutil.copy("c.yaml", home / "elsewhere")
    monkeypatch.chdir(home / "elsewhere")
    assert main(["train", "c.yaml", "--resume", "--set", f"run_dir={home}/project/runs/one", *MORE]) == 2
    assert f'data.train_data: "{home}/project/data/train.txt" in the run' in said(capsys)


@pytest.mark.parametrize("what", ["runs/one", "."])
def test_a_run_that_was_moved_goes_on(home: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, its data where they were; or with all of its project."""
    shutil.copytree("runs/one", "runs/two")
    assert main(["train", "--resume", "runs/two", *MORE]) == 0
    wanted = weights(Path("runs/two"))
    monkeypatch.chdir(home / "elsewhere")
    shutil.move(home / "project" / what, home / "moved")
    run = home / "moved" if what == "runs/one" else home / "moved/runs/one"
    assert main(["train", "--resume", os.path.relpath(run), *MORE]) == 0
    assert weights(run) == wanted


def test_data_that_are_gone_are_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("data")
    monkeypatch.chdir(home / "elsewhere")
    capsys.readouterr()
    assert main(["train", "--resume", "../project/runs/one", *MORE]) == 3
    told = said(capsys)
    assert f"{home}/project/data/train.txt" in told


def test_a_run_of_an_older_version_still_goes_on_from_its_own_folder(home: Path) -> None:
    """It kept paths as they were written."""
    import ttt.train.stored_config as stored_config

    shutil.rmtree("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_config, "with_absolute_paths", lambda config: config)
        assert main(["train", "c.yaml", "--set", "run_dir=runs/one"]) == 0
    assert "train_data: data/train.txt" in Path("runs/one/config.yaml").read_text()
    assert main(["train", "--resume", "runs/one", *MORE]) == 0


# --- which fields ---


class Source(Section):
    """A source of data."""

    path: str
    name: str = "data"


class Options(DataOptions):
    """With everything that can hold a path."""

    train_data: str | tuple[Source, ...] | None = None  # type: ignore[assignment]
    others: tuple[Source, ...] = ()
    files: Annotated[tuple[str, ...], LocalPath()] = ()
    either: Annotated[str | None, LocalPath(not_paths=("data",))] = None


def test_marked_fields_become_absolute_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there, and may be a repository, stays; so does what is no path."""
    here = str(tmp_path / "project")
    (tmp_path / "project/data").mkdir(parents=True)
    (tmp_path / "project/data/train.txt").touch()
    monkeypatch.chdir(here)
    options = Options(
        train_data=(Source(path="data/train.txt"), Source(path="/gone")),
        eval_data="owner/name",
        others=(Source(path="data"),),
        files=("data", "gone"),
        either="data",
    )
    absolute = with_absolute_paths(options)
    assert absolute == Options(
        train_data=(Source(path=f"{here}/data/train.txt"), Source(path="/gone")),
        eval_data="owner/name",
        others=(Source(path="data"),),
        files=(f"{here}/data", "gone"),
        either="data",
    )
    assert with_absolute_paths(absolute) is absolute
    (tmp_path / "elsewhere").mkdir()
    shutil.move("data", tmp_path / "elsewhere" / "data")
    moved = moved_along(absolute, before=here, now=str(tmp_path / "elsewhere"))
    assert moved.files == (str(tmp_path / "elsewhere/data"), "gone")
    assert moved.train_data == (Source(path=str(tmp_path / "elsewhere/data/train.txt")), Source(path="/gone"))


def test_every_path_of_the_plugins_here_is_marked() -> None:
    """A field whose name says that it is a file or a folder, in every section."""
    sections = [info.annotation for info in RunConfig.model_fields.values()]
    for plugin in discover():
        if plugin.backbone is not None and plugin.name != "toy":
            sections += [plugin.backbone.options, plugin.backbone.data_options]
    checked = set()
    for section in sections:
        if isinstance(section, type) and issubclass(section, Section):
            for name in section.model_fields:
                if name.endswith(("_path", "_data", "videos", "init_from")) or name in ("pretrained", "model"):
                    assert _mark_of(section, name) is not None, f"{section.__name__}.{name}"
                    checked.add(name)
    assert {"train_data", "moshi_path", "init_from", "videos"} <= checked
