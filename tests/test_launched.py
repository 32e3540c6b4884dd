"""`ttt train` as one of several processes: one speaks, all end alike, and whoever fails alone is named."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
import several
import torch
from fake_distributions import importable, install

from ttt.checkpoint_folder import newest_checkpoint
from ttt.errors import EnvironmentProblem
from ttt.parallel.launching import launch
from ttt.train import pictures, step

PLUGIN = """
from ttt.plugins import hookimpl
from toy import ToyBackbone
@hookimpl
def ttt_backbone():
    return ToyBackbone()
"""
CONFIG = """
backbone: {name: toy, num_layers: 2, dim: 16, num_heads: 2}
data: {window: 12}
train: {max_steps: 6, batch_size: 2, ckpt_freq: 2, cpu_threads: 1, device: cpu}
eval: {max_batches: 1}
run_dir: run
"""


def at_pass(number: int, act: Callable[[], Any]) -> None:
    """Do something before the forward pass of this number (from 1) gets its batch."""
    before, count = step.to_device, [0]

    def disturbed(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            act()
        return before(*arguments)

    step.to_device = disturbed


def unreadable() -> None:
    raise EnvironmentProblem("x.wav: cannot be read")


def faulty() -> None:
    raise ZeroDivisionError("a bug")


SCENARIOS: dict[str, tuple[list[str], Callable[[int], None]]] = {
    "fine": ([], lambda rank: None),
    "uneven": (["--set", "train.batch_size=3"], lambda rank: None),
    "poisoned": (["--set", "data.poisoned=[0,1,2,3,4,5,6,7,8,9,10,11]"], lambda rank: None),
    "unreadable": ([], lambda rank: at_pass(4, unreadable) if rank == 1 else None),
    "faulty": ([], lambda rank: at_pass(4, faulty) if rank == 1 else None),
    "killed": ([], lambda rank: at_pass(4, lambda: os.kill(os.getpid(), signal.SIGKILL)) if rank == 1 else None),
    "first killed": ([], lambda rank: at_pass(4, lambda: os.kill(os.getpid(), signal.SIGKILL)) if rank == 0 else None),
    "stopped": ([], lambda rank: at_pass(3, lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank == 1 else None),
}
"""More words of the command line, and what a rank does before it."""


def _rank(rank: int, scenario: str) -> int:
    from ttt_cli.main import main

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    pictures.draw_run = lambda run: []
    words, act = SCENARIOS[scenario]
    step.weighs_rows = lambda backbone: False  # so that every batch comes by `to_device`
    act(rank)
    sys.argv = ["ttt", "train", "c.yaml", *words]
    code = main()
    Path(f"code{rank}").write_text(str(code))
    return 0


def _all(folder: str) -> int:
    with importable(Path(folder)):
        for scenario in SCENARIOS:
            place = Path(folder, scenario)
            place.mkdir()
            os.chdir(place)
            Path("c.yaml").write_text(CONFIG)
            several.together(2, _rank, scenario)
    return 0


class Ended:
    """How a scenario ended."""

    def __init__(self, place: Path) -> None:
        def text(name: str) -> str:
            file = place / name
            said = file.read_text(encoding="utf-8") if file.exists() else ""
            return "\n".join(line for line in said.split("\n") if "find_unused_parameters" not in line)

        self.run = place / "run"
        self.codes = [text("code0"), text("code1")]
        self.out, self.err = [text("out0"), text("out1")], [text("err0"), text("err1")]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    folder = tmp_path_factory.mktemp("launched")
    install(folder, "toy", "toy_plugin", PLUGIN)
    with forking.start(_all, str(folder)) as process:
        assert process.wait(300) == 0, process.stderr.read()
    return lambda scenario: Ended(folder / scenario)


def test_the_first_speaks_and_writes_for_all(ended: Callable[[str], Ended]) -> None:
    fine = ended("fine")
    assert fine.codes == ["0", "0"]
    assert fine.err == ["", ""]
    assert fine.out[0].count("step 6/6") == 1
    assert fine.out[1] == ""
    assert len((fine.run / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("scenario", "code", "said"),
    [
        ("uneven", "2", "the 3 rows of a forward pass cannot be divided evenly among 2 processes (replicate 2)"),
        ("poisoned", "4", "error: step 1: the loss is nan on"),
    ],
)
def test_what_all_meet_is_said_once_and_as_by_one(
    scenario: str, code: str, said: str, ended: Callable[[str], Ended]
) -> None:
    found = ended(scenario)
    assert found.codes == [code, code]
    assert found.err[0].count(said) == 1
    assert "rank" not in found.err[0].replace("ranks", "")
    assert found.err[1] == found.out[1] == ""


def test_who_fails_alone_is_named_and_the_others_are_silent(ended: Callable[[str], Ended]) -> None:
    found = ended("unreadable")
    assert found.codes == ["3", "3"]
    assert found.err == ["", "error: rank 1: x.wav: cannot be read\n"]
    failure = json.loads((found.run / "failure.json").read_text())
    assert failure["error"].startswith("another process of the run is gone, so it ended after step 3")


def test_a_bug_in_one_process_keeps_its_traceback_and_only_that(ended: Callable[[str], Ended]) -> None:
    found = ended("faulty")
    assert found.codes[0] == "1"
    assert found.err[0] == ""
    assert found.err[1].count("Traceback") == 1
    assert "ZeroDivisionError: a bug" in found.err[1]


@pytest.mark.parametrize(("scenario", "killed"), [("killed", 1), ("first killed", 0)])
def test_who_is_killed_is_named_by_who_is_left(scenario: str, killed: int, ended: Callable[[str], Ended]) -> None:
    found, left = ended(scenario), 1 - killed
    assert found.codes[left] == "3"
    assert found.err[left] == (
        f"error: rank {killed} is gone without a word, so the run has ended; the last checkpoint is whole: --resume "
        f"goes on from it\n"
    )
    newest = newest_checkpoint(found.run, verify=True)
    assert newest.checkpoint is not None
    assert (newest.checkpoint.step, newest.passed_over) == (2, ())


def test_a_signal_to_one_stops_all_after_the_same_step(ended: Callable[[str], Ended]) -> None:
    found = ended("stopped")
    assert found.codes == ["130", "130"]
    assert found.out[0].count("interrupted after step 3 of 6, saved") == 1
    assert "--resume" in found.out[0]
    assert found.out[1] == "".join(found.err)
    newest = newest_checkpoint(found.run, verify=True)
    assert newest.checkpoint is not None
    assert newest.checkpoint.step == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PyTorch leaves the logs open
def test_the_launcher_ends_as_its_processes_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM")
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals() if number < 32}
    try:
        ended = launch(["info", "no-such-run"], 2)
    finally:
        for number, handler in handlers.items():
            if handler is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, handler)
    assert (ended.exit_code, ended.killed_by, ended.signalled) == (3, None, False)
