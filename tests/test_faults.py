"""Runs that are killed, signalled or refused by the disk, at places of choice: the drivers of `benchmarks/`, small.

At full size: `python benchmarks/kills.py`, `injected_errors.py`, `signals.py`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import disturbed
import forking
import injected_errors
import kills
import pytest
import signals
import torch
import tracing
import undrawn
from disturbed import Ended
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ttt import plugins
from ttt.errors import EnvironmentProblem
from ttt.files import read_tensors, write_tensors

UNTRACEABLE = tracing.obstacle()
traced = pytest.mark.skipif(UNTRACEABLE is not None, reason=str(UNTRACEABLE))

KILLS = [(1, "while it runs", 0), (3, "twice", 0)]
ERRORS = [
    *zip(["writing"] * 2, (31, 75), (errno.EDQUOT, errno.ENOSPC), strict=True),
    ("reading", 5, errno.EIO),
]
SIGNALS = [
    (int(signal.SIGINT), "imports", 0, 0),
    (int(signal.SIGTERM), "pictures", 0, 0),
    (int(signal.SIGHUP), "evaluation", 0, 0),
    (int(signal.SIGUSR1), "checkpoint", 0, 0),
]


def _drive() -> None:
    """Make the tries and print what came of them. Their pictures are written, but not drawn."""
    plugins.forget()
    FigureCanvasAgg.print_png = undrawn.print_png  # in this process alone, and in those that it forks
    with disturbed.tries(1, small=True) as make:
        for name, one, tasks in (
            ("kills", kills.one, KILLS),
            ("errors", injected_errors.one, ERRORS),
            ("signals", signals.one, SIGNALS),
        ):
            print(json.dumps([name, [vars(outcome) for outcome in make(one, tasks)]]), flush=True)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[dict[str, Any]]]:
    with forking.start(_drive) as driver:
        out, err = driver.communicate(600)
        assert driver.returncode == 0, err
    return dict(json.loads(line) for line in out.splitlines())


def _failed(outcomes: list[dict[str, Any]]) -> list[str]:
    return [
        f"{outcome['kind']}, {outcome['place']}: {problem}" for outcome in outcomes for problem in outcome["problems"]
    ]


def test_the_drivers_see_what_is_wrong() -> None:
    """Each way in which a try can go wrong, and the one in which it does not."""
    fine = Ended(3, "", "error: run/metrics.jsonl: no space left on the disk\n")
    assert injected_errors._spoken(fine, "write run/metrics.jsonl: ENOSPC") == []
    for ended, place in (
        (replace(fine, err=f"Traceback (most recent call last)\n{fine.err}"), "write run/metrics.jsonl: ENOSPC"),
        (replace(fine, err=fine.err * 2), "write run/metrics.jsonl: ENOSPC"),
        (replace(fine, err=""), "write run/metrics.jsonl: ENOSPC"),
        (replace(fine, code=1), "write run/metrics.jsonl: ENOSPC"),
        (fine, "write run/tensorboard/events: ENOSPC"),
        (replace(fine, code=0, err=""), "write run/loss.png: ENOSPC"),
    ):
        assert injected_errors._spoken(ended, place), (ended, place)

    stopped = Ended(130, "resume with: ttt train run/config.yaml --resume", "")
    assert signals._problems(stopped, "step", signals.CHECKPOINT) == []
    for ended, left in (
        (replace(stopped, code=-signal.SIGHUP), signals.CHECKPOINT),
        (replace(stopped, out=""), signals.CHECKPOINT),
        (stopped, signals.NOTHING),
    ):
        assert signals._problems(ended, "step", left), (ended, left)

    whole = {"metrics.jsonl": [{"step": 1}], "loss.png": True}
    assert disturbed.differences(whole, dict(whole)) == []
    assert disturbed.differences(whole, {"metrics.jsonl": [], ".writing-x": True}) == [
        ".writing-x is left over",
        "loss.png is missing",
        "metrics.jsonl differs",
    ]


@traced
def test_a_run_killed_anywhere_goes_on_by_the_same_command(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    assert len(outcomes["kills"]) == len(KILLS)
    assert _failed(outcomes["kills"]) == []
    assert all(outcome["place"] for outcome in outcomes["kills"]), "a try killed nothing"


@traced
def test_an_error_of_the_disk_is_one_sentence_and_no_checkpoint_is_lost(
    outcomes: dict[str, list[dict[str, Any]]],
) -> None:
    assert _failed(outcomes["errors"]) == []
    assert all(outcome["result"] != "no such call" for outcome in outcomes["errors"])
    assert sum(outcome["result"] == "exit 3" for outcome in outcomes["errors"]) >= 2, "most errors end a run"


@traced
def test_every_signal_saves_what_there_is_and_ends_with_130(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    assert _failed(outcomes["signals"]) == []
    assert [outcome["result"].split(",")[0] for outcome in outcomes["signals"]] == ["exit 130"] * len(SIGNALS)


@traced
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_call_can_be_made_to_fail_and_a_process_be_killed_at_one(tmp_path: Path) -> None:
    """The tracer itself: what the tests above stand on."""
    target, seen = tmp_path / "file", []

    def fails(call: tracing.Call) -> int | None:
        seen.append((call.name, call.path, call.changes))
        return 28 if call.path == str(target) else None

    def start() -> None:
        try:
            target.write_text("x")
        except OSError as error:
            os._exit(error.errno or 0)
        os._exit(0)

    assert tracing.Tracer(fails, names=tracing.CHANGING).run(start) == 28
    assert ("openat", str(target), True) in seen
    assert not target.exists()

    def kills(call: tracing.Call) -> None:
        if call.name == "mkdir":
            tracer.kill()

    tracer = tracing.Tracer(kills)
    assert tracer.run(lambda: os.mkdir(tmp_path / "folder")) == -signal.SIGKILL
    assert not (tmp_path / "folder").exists()


@traced
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_tensors_that_cannot_be_opened_are_one_sentence(tmp_path: Path) -> None:
    """PyTorch says it as a RuntimeError."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(3)}, {})
    opened = []

    def fails(call: tracing.Call) -> int | None:
        if call.path == str(path):
            opened.append(call.name)
        return errno.EIO if call.path == str(path) and len(opened) > refused_from else None

    def start() -> None:
        try:
            read_tensors(path)
        except EnvironmentProblem as problem:
            os._exit(3 if str(problem).startswith(f"{path}: cannot be read: ") else 4)
        os._exit(0)

    for refused_from in range(3):
        opened.clear()
        assert tracing.Tracer(fails, names=["open", "openat"]).run(start) == 3
        assert len(opened) == refused_from + 1


@traced
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["while it imports", "while it reads"])
def test_a_command_with_nothing_to_lose_ends_at_once(
    moment: str, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    waits, _ = os.pipe()
    sent = []

    def sends(call: tracing.Call) -> None:
        reads = call.name == "read" and call.arguments[0] == 0
        if not sent and (reads if moment == "while it reads" else "ttt/config/findings" in (call.path or "")):
            sent.append(call.name)
            tracer.send(number)
        elif reads and not sent:
            tracer.send(signal.SIGKILL)  # it would wait for ever

    def start() -> None:
        os.dup2(waits, 0)
        os.execv(sys.executable, [sys.executable, "-m", "ttt_cli", "check", "-"])

    tracer = tracing.Tracer(sends, names=tracing.READING)
    assert tracer.run(start) == 130
    assert sent
    assert capfd.readouterr() == ("", "")
