"""Ctrl-C, or another signal, at any time between the start of a command and its first step: what is left and told.

The process should end at once, by the signal or with 130, without a traceback, and leave nothing. A command without
steps is interrupted between its start and its end; one that was done before the signal came counts as done.

    python benchmarks/interrupts.py                            100 tries of `ttt train`
    python benchmarks/interrupts.py --commands all --runs 20   20 of each command
    python benchmarks/interrupts.py --signal SIGTERM --seed 7
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = "run/metrics.jsonl"
TINY = [word for key in ("train.device=cpu", "backbone.dim=32", "backbone.num_heads=2") for word in ("--set", key)]
COMMANDS = {
    "train": ["train", "--backbone", "moshi", "--set", "run_dir=run", "--set", "train.max_steps=1000", *TINY],
    "resume": ["train", "trained", "--resume", "--set", "train.max_steps=1000"],
    "eval": ["eval", "trained", "--tasks", "recall,inner_loss", "--limit", "2"],
    "info": ["info", "trained"],
    "runs": ["runs", ".", "--out", "runs.html"],
    "check": ["check", "config.yaml"],
    "probe": ["check", "config.yaml", "--probe"],
    "doctor": ["doctor"],
    "plugins": ["plugins"],
    "diff": ["diff", "config.yaml", "config.yaml"],
    "schema": ["schema"],
    "init": ["init", "--backbone", "moshi", "--out", "new.yaml"],
    "new-backbone": ["new-backbone", "mine"],
    "import-config": ["import-config", "config.yaml"],
    "import-weights": ["import-weights", "nowhere", "--backbone", "videodit", "--out", "weights"],
    "precompute": ["precompute", "config.yaml"],
    "sample": ["sample", "trained", "--prompt", "a", "--seconds", "1", "--out", "sample.wav"],
}
STEPS = {"train": STARTED, "resume": "trained/metrics.jsonl"}
"""Commands that make steps, and the file that grows with the first of them."""


def started(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    """The command, begun in a folder, its output in files there."""
    with open(folder.with_suffix(".out"), "w") as out:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "ttt"), *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "NO_TORCH_COMPILE": "1"},
        )


def seconds_to_its_first_step(folder: Path, words: list[str], steps: str | None) -> float:
    """How long the command takes undisturbed until it makes a step or, without steps, until it ends."""
    begun = time.monotonic()
    file = folder / (steps or "")
    before = file.stat().st_size if steps and file.exists() else 0
    process = started(folder, words)
    while process.poll() is None and not (steps and file.exists() and file.stat().st_size > before):
        time.sleep(0.01)
    taken = time.monotonic() - begun
    ended(process)
    return taken


def ended(process: subprocess.Popen[str]) -> None:
    """End the command and what it has started, if it is still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def one(template: Path, words: list[str], delay: float, number: int, steps: str | None) -> tuple[str, str]:
    """A try: how it ended in words, and what it said."""
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "here"
        shutil.copytree(template, folder)
        before = _files(folder)
        process = started(folder, words)
        try:
            time.sleep(delay)
            process.send_signal(number)
            sent = time.monotonic()
            code = process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            return "does not end", ""
        finally:
            ended(process)
        taken = time.monotonic() - sent
        said = folder.with_suffix(".out").read_text(errors="replace")
        new = sorted(_files(folder) - before)
    saved = steps is not None and "saved" in said and code == 130
    how = {130: "130", -signal.SIGINT: "130"}.get(
        code, f"exit {code}"
    )  # a shell reports a signal as 128 and its number
    how = "by the signal" if code == -number and number != signal.SIGINT else how
    told = [
        "done" if steps is None and code not in (130, -number) and "Traceback" not in said else how,
        *(["after its step"] if saved else []),
        *(["traceback"] if "Traceback" in said or "Error:" in said or "ignored" in said else []),
        *([f"left {', '.join(new[:3])}"] if new and not saved and how in ("130", "by the signal") else []),
        *(["late"] if taken > 3 and not saved else []),
    ]
    return ", ".join(told), said


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def template(folder: Path) -> Path:
    """A folder with a run and a config, in which every command finds what it asks for."""
    folder.mkdir()
    ttt = str(Path(sys.executable).parent / "ttt")
    for words in (
        ["train", "--backbone", "moshi", "--set", "run_dir=trained", "--set", "train.max_steps=1", *TINY],
        ["init", "--backbone", "moshi", "--out", "config.yaml"],
    ):
        subprocess.run([ttt, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def main(words: list[str] | None = None) -> int:
    """Make the tries; 1 if one ended otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", default="train", help=f"with commas between, or all: {', '.join(COMMANDS)}")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--signal", default="SIGINT")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    number = signal.Signals[options.signal]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this ends the try too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tries inherit what this process ignores, as under nohup
    wrong = 0
    with tempfile.TemporaryDirectory() as above:
        base = template(Path(above) / "template")
        for name in list(COMMANDS) if options.commands == "all" else options.commands.split(","):
            drawn = random.Random(f"{options.seed} {name}")
            trial = Path(shutil.copytree(base, Path(above) / "trial"))
            seconds = seconds_to_its_first_step(trial, COMMANDS[name], STEPS.get(name))
            shutil.rmtree(trial)
            ends: collections.Counter[str] = collections.Counter()
            for _ in range(options.runs):
                delay = drawn.uniform(0, seconds)
                how, said = one(base, COMMANDS[name], delay, number, STEPS.get(name))
                ends[how] += 1
                if how not in ("130", "by the signal", "done", "130, after its step"):
                    wrong += 1
                    print(f"  {name}, {delay:.3f} s of {seconds:.1f}: {how}: {said.strip()[-300:]!r}", flush=True)
            told = "; ".join(f"{count} × {ended}" for ended, count in ends.most_common())
            print(f"{options.signal} in {name}, {options.runs} tries within {seconds:.1f} s: {told}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
