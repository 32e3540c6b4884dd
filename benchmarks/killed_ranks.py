"""`kill -9` of one random process of several at a random moment: the others end by themselves, and nothing is torn.

Each try starts a run in several processes, kills one of them after a random time, and waits for the others. Every
checkpoint that is there must be whole. Then the same command goes on, in the same number of processes, and what it
leaves is compared with a run that nobody disturbed: every byte of every checkpoint's tensors, the metrics and the
summary but for times. See `disturbed.py` for what is run; here it makes 24 steps, and saves after every third.

    python benchmarks/killed_ranks.py                          30 tries with 2 processes
    python benchmarks/killed_ranks.py --processes 4 --shard    parameters split among 4
    python benchmarks/killed_ranks.py --launcher --runs 5      by `ttt train --nproc`: slower, since each imports torch
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import disturbed
from disturbed import CONFIG, RUN

from ttt.parallel.launching import LOST_SECONDS

LIMIT_SECONDS = 60
"""A process that is still there so long after another was killed has not ended by itself."""


def _prepare(folder: Path, processes: int, *, shard: bool) -> Path:
    disturbed.prepare(folder)
    text = (folder / CONFIG).read_text("utf-8")
    layout = f"parallel: {{shard: {processes if shard else 1}}}"
    text = text.replace("max_steps: 5, batch_size: 2", f"{layout}, max_steps: 24, batch_size: {processes}")
    text = text.replace("ckpt_freq: 1", "ckpt_freq: 3").replace("eval_freq: 3", "eval_freq: 6")
    (folder / CONFIG).write_text(text, encoding="utf-8")
    drawn = random.Random(0)
    lines = (" ".join(str(drawn.randrange(16)) for _ in range(8 * windows + 1)) for windows in (5, 2, 3, 4, 3, 2))
    (folder / disturbed.DATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


class Forks:
    """The processes of a run, forked from this one, which has imported everything."""

    def __init__(self, folder: Path, processes: int) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ended_by_launcher = False
        self.pids = [self._fork(folder, rank, processes) for rank in range(processes)]

    def _fork(self, folder: Path, rank: int, processes: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.chdir(folder)
        with open(f"{folder}.out", "ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        sys.argv = ["ttt", "train", CONFIG, "--resume"]
        code = 1
        try:
            from ttt_cli.main import main

            code = main()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> list[int] | None:
        """Their exit codes; None if one has not ended after so long, and then it is killed.

        Like the launcher, this process ends the others `LOST_SECONDS` after one of them has failed.
        """
        codes: dict[int, int] = {}
        until = time.monotonic() + seconds
        lost = float("inf")
        while len(codes) < len(self.pids) and time.monotonic() < until:
            if any(codes.values()):
                lost = min(lost, time.monotonic() + LOST_SECONDS)
            if time.monotonic() > lost:
                self.ended_by_launcher = True
                for pid in set(self.pids) - codes.keys():
                    os.kill(pid, signal.SIGKILL)
            for pid in self.pids:
                if pid not in codes:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    codes |= {pid: os.waitstatus_to_exitcode(status)} if ended else {}
            time.sleep(0.005)
        for pid in set(self.pids) - codes.keys():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return [codes[pid] for pid in self.pids] if len(codes) == len(self.pids) else None


class Launched:
    """The processes of a run, started by `ttt train --nproc`."""

    def __init__(self, folder: Path, processes: int) -> None:
        with open(f"{folder}.out", "ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ttt_cli", "train", CONFIG, "--resume", "--nproc", str(processes)],
                cwd=folder,
                stdout=out,
                stderr=out,
            )
        self._processes = processes
        self.ended_by_launcher = False

    @property
    def pids(self) -> list[int]:
        """Of the processes, once there are all of them."""
        while self._process.poll() is None:
            found = subprocess.run(["pgrep", "-P", str(self._process.pid)], capture_output=True, text=True, check=False)
            if len(found.stdout.split()) >= self._processes:
                return [int(pid) for pid in found.stdout.split()]
            time.sleep(0.05)
        return []

    def wait(self, seconds: float) -> list[int] | None:
        """The launcher's exit code; None if it has not ended after so long."""
        try:
            return [self._process.wait(seconds)]
        except subprocess.TimeoutExpired:
            self._process.kill()
            return None


def _one(number: int, options: argparse.Namespace, place: Path, expected: dict[str, Any], whole_run: float) -> Any:
    """One try; returns its problems, how far the run was, how long the others took to end, and whether by force."""
    start = Launched if options.launcher else Forks
    drawn = random.Random(f"{options.seed} {number}")
    folder = _prepare(place / f"try-{number}" / "work", options.processes, shard=options.shard)
    run = start(folder, options.processes)
    pids = run.pids
    time.sleep(drawn.uniform(0, whole_run))
    with contextlib.suppress(ProcessLookupError):
        os.kill(drawn.choice(pids), signal.SIGKILL)
    killed = time.monotonic()
    codes = run.wait(LIMIT_SECONDS)
    took = time.monotonic() - killed
    problems = [] if codes is not None else [f"a process was still there {LIMIT_SECONDS} s later"]
    problems += [f"torn: {told}" for told in [disturbed.newest_checkpoint(folder)] if told]
    steps = len(list((folder / RUN / "checkpoints").glob("step_*"))) if (folder / RUN).is_dir() else 0
    again = start(folder, options.processes).wait(10 * LIMIT_SECONDS)
    said = Path(f"{folder}.out").read_text("utf-8", "replace")
    problems += [] if again is not None and not any(again) else [f"going on ended with {again}:\n{said[-2000:]}"]
    problems += [] if "Traceback" not in said else [f"a traceback:\n{said[-3000:]}"]
    problems += disturbed.differences(expected, disturbed.whole(folder)) if not problems else []
    return problems, steps, took, run.ended_by_launcher


def main() -> None:
    """Make the tries, and tell what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="how many tries [30]")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first try [0]")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of a run [2]")
    parser.add_argument("--shard", action="store_true", help="split the parameters among them")
    parser.add_argument("--launcher", action="store_true", help="start them by `ttt train --nproc`")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="killed-ranks-") as made:
        place = Path(made)
        (place / "plugins").mkdir()
        paths = disturbed.make_plugins(place / "plugins")
        os.environ |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1", "MPLBACKEND": "agg"}
        sys.path[:0] = paths.split(os.pathsep)
        _import_everything()
        start = Launched if options.launcher else Forks
        reference = _prepare(place / "reference" / "work", options.processes, shard=options.shard)
        begun = time.monotonic()
        codes = start(reference, options.processes).wait(600)
        whole_run = time.monotonic() - begun
        if codes is None or any(codes):
            raise SystemExit(f"the undisturbed run ended with {codes}:\n{Path(f'{reference}.out').read_text('utf-8')}")
        expected, took, saved, bad = disturbed.whole(reference), [], Counter[str](), 0
        by_launcher = 0
        print(f"an undisturbed run takes {whole_run:.1f} s", flush=True)
        for number in range(options.first, options.runs):
            problems, steps, seconds, helped = _one(number, options, place, expected, whole_run)
            took.append(seconds)
            saved["a checkpoint was there" if steps else "none was there yet"] += 1
            bad += bool(problems)
            by_launcher += helped
            for problem in problems:
                print(f"try {number}: {problem}", flush=True)
        print(
            f"{options.runs} tries, {bad} with problems; {dict(saved)}; the others ended after "
            f"{statistics.median(took):.1f} s (median), {max(took):.1f} s at most, {by_launcher} times by force: the "
            f"one that was killed had not met them yet"
        )
        raise SystemExit(bool(bad))


def _import_everything() -> None:
    """So that a fork of this process need not; no backward pass, whose threads a fork would not have."""
    import importlib

    for module in (
        "torch._dynamo", "torch.utils.tensorboard", "torch.distributed.fsdp", "torch.distributed.checkpoint",
        "matplotlib.backends.backend_agg", "ttt.train.start", "ttt_cli.app", "ttt_cli.train", "ttt_cli.ranks",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
