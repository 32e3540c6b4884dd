"""A signal before a program has anything to lose ends it there and then, wherever its code is just then."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import forking
import pytest
from rich.console import Console
from toy import ToyBackbone, ToyData, ToyOptions

import ttt_cli
from ttt import interrupt
from ttt.config import RunConfig, TrainConfig, TTTConfig
from ttt.interrupt import INTERRUPTED, NOT_BEGUN, Interrupt
from ttt.train import pictures, train
from ttt.train.rundir import RunDir

SWALLOWING = """
import signal
try:
    signal.raise_signal({number})
except BaseException:
    pass
"""
"""A module in whose import a signal comes, and that takes any exception for a missing optional package."""


def in_an_import(folder: Path, number: int) -> None:
    (folder / "swallowing.py").write_text(SWALLOWING.format(number=number))
    sys.path.insert(0, str(folder))
    importlib.import_module("swallowing")


class _Finalised:
    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def in_a_finaliser(folder: Path, number: int) -> None:
    _Finalised(number)
    gc.collect()


def in_a_net(folder: Path, number: int) -> None:
    try:
        signal.raise_signal(number)
    except BaseException:
        time.sleep(60)  # what would have gone on


def between(folder: Path, number: int) -> None:
    signal.raise_signal(number)


PLACES = {place.__name__: place for place in (in_an_import, in_a_finaliser, in_a_net, between)}


def program(folder: Path, place: str, number: int, at_once: bool) -> None:
    """A program that a signal reaches at a place, and that goes on if it does not end there."""
    interrupt._LOST_AFTER_SECONDS = 0.2
    try:
        with Interrupt(at_once=at_once, own_process=True):
            PLACES[place](folder, number)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)  # as `main` does
    print("went on")


@pytest.mark.parametrize("at_once", [True, False], ids=["a command", "train"])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_ends_a_program_wherever_it_is(place: str, at_once: bool, tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = forking.start(program, tmp_path, place, number, at_once)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (INTERRUPTED, ""), err
        assert err == ("" if at_once else f"\n{NOT_BEGUN}\n")


def config(run_dir: Path) -> RunConfig:
    return RunConfig(
        backbone=ToyOptions(name="toy", num_layers=1, dim=16, num_heads=2),
        ttt=TTTConfig(mini_batch_size=4),
        data=ToyData(window=12),
        train=TrainConfig(max_steps=6, device="cpu"),
        run_dir=str(run_dir),
    )


class Reached(ToyBackbone):
    """A signal comes while the model is built, in a place that swallows exceptions."""

    def build(self, options: Any, **more: Any) -> Any:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        return super().build(options, **more)


def training(run: Path) -> NoReturn:
    with Interrupt(own_process=True):
        train(config(run), Reached(), console=Console(file=io.StringIO()))
    os._exit(0)


def test_a_run_that_has_not_begun_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    process = forking.start(training, tmp_path / "run")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (INTERRUPTED, "", f"\n{NOT_BEGUN}\n")
    assert os.listdir(tmp_path) == []


def test_a_run_that_has_begun_makes_and_saves_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = RunDir.create

    def interrupted(self: RunDir, settings: RunConfig) -> None:
        create(self, settings)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunDir, "create", interrupted)
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
    result = train(config(tmp_path / "run"), ToyBackbone(), console=Console(file=io.StringIO()))
    assert (result.interrupted, result.steps) == (True, 1)
    assert result.checkpoint is not None


@pytest.mark.parametrize(
    ("program", "ends"),
    [
        ("/usr/bin/ttt", True),
        ("-m", True),
        ("C:\\Scripts\\ttt.exe", True),
        ("pytest", False),
        ("/x/ttt/notebook.py", False),
    ],
)
def test_from_its_first_import_on_ctrl_c_ends_the_program(
    program: str, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", [program])
    try:
        importlib.reload(ttt_cli)
        assert (signal.getsignal(signal.SIGINT) == signal.SIG_DFL) is ends
    finally:
        signal.signal(signal.SIGINT, before)
