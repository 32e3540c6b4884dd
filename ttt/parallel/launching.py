"""Starting the processes of a run on this machine, watching them, and ending the others if one fails.

PyTorch's own process contexts start and end them (`torch.distributed.elastic.multiprocessing`, which is what torchrun's
agent uses). A signal to the launcher goes on to each. If a process fails, the others get SIGTERM, and after
`LOST_SECONDS` SIGKILL.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttt.interrupt import SIGNALS

LAUNCHER = "TTT_LAUNCHER"
"""The process id of the launcher, in the environment of what it started."""
LOST_SECONDS = 30
"""How long the others have to end by themselves once one process has failed."""


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended."""

    exit_code: int
    """That of the process that failed first; 0 if none did."""
    rank: int = 0
    """Which it was."""
    killed_by: str | None = None
    """The name of the signal that ended it, if none was sent on purpose."""
    signalled: bool = False
    """Whether a signal was passed on to the processes."""
    told: str = ""
    """What it told on its standard error, if that was not shown."""


def launcher_is_gone() -> bool:
    """Whether this process was started by a launcher that has ended, so that nobody watches it any more."""
    started_by = os.environ.get(LAUNCHER)
    return started_by is not None and started_by != str(os.getppid())


def launch(words: Sequence[str], count: int) -> Ended:
    """Run `ttt` with these words in several processes on this machine, to the end of all of them.

    The first has this process's output. What the others print is shown if they fail by something unforeseen.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what ended is told in one sentence
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM"  # until ours are put in, just below
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # held to the end: others meet in it
    logs = tempfile.mkdtemp(prefix="ttt-processes-")
    try:
        others = dict.fromkeys(range(1, count), Std.ALL)
        context = start_processes(
            "ttt",
            sys.executable,
            dict.fromkeys(range(count), ("-m", "ttt_cli", *words)),
            {rank: _environment(rank, count, store.port) for rank in range(count)},
            DefaultLogsSpecs(log_dir=logs, redirects=others),
        )
        passed_on = _pass_on_signals(context)
        result = context.wait(period=0.1)
        assert result is not None
        return _ended(result, passed_on)
    finally:
        shutil.rmtree(logs, ignore_errors=True)


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What a process is told, as torchrun's documentation has it ("Environment Variables")."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or "1",
    }


def _pass_on_signals(context: Any) -> list[int]:
    """Pass what asks this process to stop on to the others; returns the list of what was passed on.

    They take it as SIGINT: SIGTERM tells them that another process has failed.
    """
    passed_on: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        passed_on.append(number)
        for pid in context.pids().values():
            try:
                os.kill(pid, signal.SIGINT)
            except ProcessLookupError:
                continue

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)
    return passed_on


def _ended(result: Any, passed_on: Sequence[int]) -> Ended:
    if not result.failures:
        return Ended(0, signalled=bool(passed_on))
    first = next(iter(result.failures.values()))  # in the order in which they were found
    rank, code = first.local_rank, first.exitcode
    killed = signal.Signals(-code).name if code < 0 else None
    return Ended(128 - code if killed else code, rank, killed, bool(passed_on), _told(result.stderrs.get(rank, "")))


def _told(file: str) -> str:
    """From the sentence about its error, or the traceback, to the end of a process's standard error."""
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            text = lines.read()
    except OSError:
        return ""
    begins = [text.find(f"\n{word}") + 1 for word in ("error:", "Traceback", "[rank") if f"\n{word}" in f"\n{text}"]
    return text[min(begins) :] if begins else ""
