"""What `ttt new-backbone` writes, as its users meet it: built, installed, listed, checked, trained, held to the laws.

`plugins/example` is what it writes by that name (`test_new_backbone.py`).
"""

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
from ttt_cli.main import main

KINDS = {"my-model": [], "my_lm": ["--hf"]}
"""The options of `ttt new-backbone` by the name that each backbone is given here."""
CAPABILITIES = {"my-model": ["stream"], "my_lm": ["stream", "score", "lora"]}
SHIPPED = {"my-model": {"demo.txt", "presets/demo.yaml"}, "my_lm": {"presets/demo.yaml"}}
"""What is in each package beside code."""
TRAINED_AND_TESTED = f"""
import sys, pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from ttt_cli.main import main
FigureCanvasAgg.print_png = lambda canvas, file: file.write(b"a picture")  # to draw it takes longer than the run
for name in {list(KINDS)!r}:
    short = ["--set", "train.max_steps=3", "--set", "eval.max_batches=2"]
    code = main(["train", "--backbone", name, *short, "--set", f"run_dir={{name}}/run"])
    if code:
        sys.exit(code)
tests = [f"{{name}}/tests" for name in {list(KINDS)!r}]
chosen = ["-k", "TestMyModel or not (mlp or law2)"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", *chosen, *tests]))
"""
"""In one process, because importing torch and transformers is a good part of what it takes.

`test_transformers_laws.py` proves the laws on the base class of the second kind, with an MLP too, and the slowest one.
"""


def package(name: str) -> str:
    return "ttt_" + name.replace("-", "_")


def installed(sources: list[Path], site: Path) -> Path:
    """Install distributions into a folder, from wheels that setuptools builds."""
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--offline", "--no-config", "--no-cache"]
    into = ["--python", sys.executable, "--no-deps", "--no-build-isolation", "--target", str(site)]
    done = subprocess.run([*uv, *into, *map(str, sources)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a distribution of each kind is written, in a folder named after its backbone."""
    root = tmp_path_factory.mktemp("new")
    for name, options in KINDS.items():
        assert main(["new-backbone", name, "--out", str(root / name), *options]) == 0
    return root


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, set[str]]:
    """The files of each package, before setuptools builds beside them."""
    return {name: files(folder / name / package(name)) for name in KINDS}


@pytest.fixture(scope="module")
def site(folder: Path, written: dict[str, set[str]]) -> Path:
    """Where they are installed."""
    return installed([folder / name for name in KINDS], folder / "site")


def ran(command: list[str], site: Path, folder: Path) -> str:
    """What a command prints in a fresh process, for which they are installed."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ttt(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ttt_cli", *arguments]


def files(root: Path) -> set[str]:
    found = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
    return {str(file) for file in found if "__pycache__" not in file.parts}


def test_a_wheel_holds_all_that_is_in_the_package(
    site: Path, written: dict[str, set[str]], folder: Path, tmp_path: Path
) -> None:
    assert {name: files(site / package(name)) for name in KINDS} == written
    made = {f"{package(name)}{ending}" for name in KINDS for ending in ("", "-0.1.0.dist-info")}
    assert {entry.name for entry in site.iterdir()} == {*made, ".lock"}  # uv's

    others = []
    for name in KINDS:
        left = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        other = Path(shutil.copytree(folder / name, tmp_path / name, ignore=left))
        config = (other / "pyproject.toml").read_text(encoding="utf-8")
        (other / "pyproject.toml").write_text(config.partition("[tool.setuptools.package-data]")[0], encoding="utf-8")
        others.append(other)
    bare = installed(others, tmp_path / "site")
    lacking = {name: written[name] - files(bare / package(name)) for name in KINDS}
    assert lacking == SHIPPED  # so they are there by what is declared alone


def test_a_text_that_cannot_be_read_is_told_with_its_name(site: Path, tmp_path: Path) -> None:
    for name, length in (("empty", 0), ("short", 8), ("long", 9)):
        (tmp_path / name).write_bytes(b"a" * length)
    with importable(site):
        windows = importlib.import_module("ttt_my_model.data").TextWindows
        assert len(windows(tmp_path / "long", 8)) == 1
        for name, words in (
            ("nowhere", "cannot be read: No such file"),
            (".", "cannot be read: a folder, not a file"),
            ("empty", "has 0 bytes, and a window takes 9"),
            ("short", "has 8 bytes, and a window takes 9; name a longer text"),
        ):
            with pytest.raises(EnvironmentProblem, match=words):
                windows(tmp_path / name, 8)


def test_it_is_listed_and_its_demo_is_a_config_without_findings(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = {plugin["name"]: plugin for plugin in json.loads(ran(ttt("plugins", "--json"), site, tmp_path))}
    for name in KINDS:
        assert listed[name] == {
            "name": name,
            "distribution": package(name).replace("_", "-"),
            "version": "0.1.0",
            "module": f"{package(name)}.plugin",
            "brings": ["ttt.backbones"],
            "works": True,
            "error": None,
            "capabilities": CAPABILITIES[name],
            "tasks": [],
        }
    with importable(site):
        for name in KINDS:
            assert main(["init", "--backbone", name]) == 0
            capsys.readouterr()
            assert main(["check", f"{name}.yaml"]) == 0
            assert capsys.readouterr().out == f"{name}.yaml: no findings\n"
            assert main(["new-backbone", name]) == 2  # it is taken now


def test_they_train_and_keep_the_laws(site: Path, folder: Path) -> None:
    printed = ran([sys.executable, "-c", TRAINED_AND_TESTED], site, folder)
    assert printed.count("step 3/3") == len(KINDS)
    for name in KINDS:
        assert (folder / name / "run" / "checkpoints" / "step_000003" / "adapter_model.safetensors").is_file()
    passed = len(LAWS) * len(INNER_MODELS) + len(LAWS) - 1 + len(CHECKS) * len(KINDS)
    assert f"{passed} passed" in printed.splitlines()[-1]
