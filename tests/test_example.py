"""The example of a plugin, as its users meet it: built, installed, listed, checked, trained, and held to the laws."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_distributions import importable

from ttt.errors import EnvironmentProblem
from ttt.laws import CHECKS, LAWS
from ttt.testing.suite import INNER_MODELS

EXAMPLE = Path(__file__).parent.parent / "plugins" / "example"
TRAINED_AND_TESTED = """
import sys, pytest
from ttt_cli.main import main
code = main(["train", "--backbone", "example", "--set", "train.max_steps=3", "--set", "run_dir=run"])
sys.exit(code or pytest.main(["-q", "-p", "no:cacheprovider", "tests"]))
"""
"""In one process, because importing torch is a good part of what either takes."""


def copied(folder: Path) -> Path:
    """A copy of the example to build from: setuptools writes beside what it builds."""
    return Path(shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")))


def installed(source: Path, site: Path) -> Path:
    """Install a distribution into a folder, from a wheel that setuptools builds."""
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--offline", "--no-config", "--no-cache"]
    into = ["--python", sys.executable, "--no-deps", "--no-build-isolation", "--target", str(site)]
    done = subprocess.run([*uv, *into, str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("example") / "source")


@pytest.fixture(scope="module")
def site(source: Path) -> Path:
    """Where the example is installed."""
    return installed(source, source.parent / "site")


def ran(command: list[str], site: Path, folder: Path) -> str:
    """What a command prints in a fresh process, for which the example is installed."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ttt(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ttt_cli", *arguments]


def files(root: Path) -> set[str]:
    found = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
    return {str(file) for file in found if "__pycache__" not in file.parts}


def test_a_wheel_holds_all_that_is_in_the_package(site: Path, tmp_path: Path) -> None:
    assert files(site / "ttt_example") == files(EXAMPLE / "ttt_example")
    assert {entry.name for entry in site.iterdir()} == {"ttt_example", "ttt_example-0.1.0.dist-info", ".lock"}  # uv's

    other = copied(tmp_path / "source")
    config = (other / "pyproject.toml").read_text(encoding="utf-8")
    (other / "pyproject.toml").write_text(config.partition("[tool.setuptools.package-data]")[0], encoding="utf-8")
    lacking = files(EXAMPLE / "ttt_example") - files(installed(other, tmp_path / "site") / "ttt_example")
    assert lacking == {"demo.txt", "presets/demo.yaml"}  # so they are there by what is declared alone


def test_a_text_that_cannot_be_read_is_told_with_its_name(site: Path, tmp_path: Path) -> None:
    for name, length in (("empty", 0), ("short", 8), ("long", 9)):
        (tmp_path / name).write_bytes(b"a" * length)
    with importable(site):
        windows = importlib.import_module("ttt_example.data").TextWindows
        assert len(windows(tmp_path / "long", 8)) == 1
        for name, words in (
            ("nowhere", "cannot be read: No such file"),
            (".", "cannot be read: a folder, not a file"),
            ("empty", "has 0 bytes, and a window takes 9"),
            ("short", "has 8 bytes, and a window takes 9; name a longer text"),
        ):
            with pytest.raises(EnvironmentProblem, match=words):
                windows(tmp_path / name, 8)


def test_it_is_listed_and_its_demo_is_a_config_without_findings(site: Path, tmp_path: Path) -> None:
    listed = json.loads(ran(ttt("plugins", "--json"), site, tmp_path))
    (example,) = [plugin for plugin in listed if plugin["name"] == "example"]
    assert example == {
        "name": "example",
        "distribution": "ttt-example",
        "version": "0.1.0",
        "module": "ttt_example.plugin",
        "brings": ["ttt.backbones"],
        "works": True,
        "error": None,
        "capabilities": ["stream"],
        "tasks": [],
    }
    ran(ttt("init", "--backbone", "example"), site, tmp_path)
    assert ran(ttt("check", "example.yaml"), site, tmp_path) == "example.yaml: no findings\n"


def test_it_trains_and_keeps_the_laws(site: Path, source: Path) -> None:
    printed = ran([sys.executable, "-c", TRAINED_AND_TESTED], site, source)
    assert "step 3/3" in printed
    assert (source / "run" / "checkpoints" / "step_000003" / "adapter_model.safetensors").is_file()
    assert f"{len(LAWS) * len(INNER_MODELS) + len(CHECKS)} passed" in printed.splitlines()[-1]
