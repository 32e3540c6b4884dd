"""Training steps a second of Moshi's demo with and without workers, from sound files and from codes on disk.

    python benchmarks/data_loading.py                      # 0 and 2 workers, five rounds of 12 steps
    python benchmarks/data_loading.py --workers 4 --rounds 9

The recording is the demo's dialogue, again and again, as FLAC. Every step reads windows that were not read before, so
all of them are decoded, and encoded where there are no codes. In each round every variant makes the same steps in turn,
from the same weights; the table has medians over the rounds, and the median of the ratios within a round. What a run
waits for its first batch, in which workers start, is measured apart. Results go to
`benchmarks/results/data_loading.json`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rich.console import Console

from ttt.check import load_config
from ttt.plugins import get_backbone
from ttt.train.loading import Loader
from ttt.train.parts import build_parts
from ttt.train.progress import Progress
from ttt.train.rundir import RunDir
from ttt.train.step import Stepper

MOSHI = get_backbone("moshi")
DEMO = Path(__file__).resolve().parent.parent / "plugins" / "moshi" / "ttt_moshi" / "demo"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """One way to read."""

    codes: bool
    workers: int

    @property
    def name(self) -> str:
        """In words."""
        return f"{'codes' if self.codes else 'sound'}, {self.workers} workers"


def recording(folder: Path, seconds: float) -> Path:
    """Write the demo's dialogue, repeated, as moshi-finetune's data; returns the `.jsonl`."""
    once, rate = soundfile.read(DEMO / "dialogue.flac")
    whole = np.tile(once, (int(-(-seconds * rate // len(once))), 1))[: round(seconds * rate)]
    soundfile.write(folder / "long.flac", whole, rate)
    (folder / "long.json").write_text(json.dumps({"alignments": [["hello", [0.5, 1.0], "SPEAKER_MAIN"]]}))
    (folder / "long.jsonl").write_text(json.dumps({"path": "long.flac", "duration": len(whole) / rate}) + "\n")
    return folder / "long.jsonl"


def config_of(variant: Variant, folder: Path, arguments: argparse.Namespace) -> Any:
    """The demo's config, changed."""
    changes = [
        f"data.train_data={folder / 'long.jsonl'}",
        f"data.codes={folder / 'codes' if variant.codes else 'null'}",
        f"data.num_workers={variant.workers}",
        f"train.max_steps={arguments.steps + 1}",
        *("train.evidence_freq=100000", "train.device=cpu", f"run_dir={folder / 'run'}"),
    ]
    return load_config(None, text=MOSHI.presets()["demo"], backbone=MOSHI, overrides=changes, training=False).config


def measure(variant: Variant, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the steps: how long the first one took, and how many of the others there were in a second."""
    config = config_of(variant, folder, arguments)
    parts = build_parts(config, MOSHI, CPU, RunDir(folder / "run"), Console(file=io.StringIO()))
    progress, losses, started = Progress(), [], time.monotonic()
    with Loader(
        parts.dataset,
        lambda number: parts.order.at(number).windows,
        passes=config.train.max_steps,
        device=CPU,
        workers=variant.workers,
    ) as loader:
        stepper = Stepper(parts, progress, loader)
        for step in range(arguments.steps + 1):
            stepper.advance()
            losses.append(progress.line["loss"])
            if step == 0:
                first, started = time.monotonic() - started, time.monotonic()
        seconds = time.monotonic() - started
    return {"steps_per_second": arguments.steps / seconds, "first_step_seconds": first, "losses": losses}


def table(rounds: list[dict[str, dict[str, Any]]], base: str) -> dict[str, dict[str, float]]:
    """For each variant the medians over the rounds, and that of its speed over the base's in the same round."""
    return {
        name: {
            "steps_per_second": statistics.median(each[name]["steps_per_second"] for each in rounds),
            "first_step_seconds": statistics.median(each[name]["first_step_seconds"] for each in rounds),
            "times_the_first": statistics.median(
                each[name]["steps_per_second"] / each[base]["steps_per_second"] for each in rounds
            ),
        }
        for name in rounds[0]
    }


def main() -> None:
    """Run the rounds, and print and keep what they measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_loading.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    variants = [Variant(codes, workers) for codes in (False, True) for workers in (0, arguments.workers)]
    rounds: list[dict[str, dict[str, Any]]] = []
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recording(folder, 2 * 15.0 * (arguments.steps + 1))
        MOSHI.precompute(config_of(Variant(True, 0), folder, arguments), console=Console(file=io.StringIO()))
        for number in range(arguments.rounds):
            rounds.append({each.name: measure(each, folder, arguments) for each in variants})
            told = (f"{name} {one['steps_per_second']:.2f}" for name, one in rounds[-1].items())
            print(f"round {number + 1}: {'; '.join(told)} steps/s", flush=True)
    losses = [one["losses"] for each in rounds for one in each.values()]
    assert losses == losses[:1] * len(losses), "all read the same"
    found = table(rounds, variants[0].name)
    for name, one in found.items():
        print(
            f"{name:18}  {one['steps_per_second']:.2f} steps/s  × {one['times_the_first']:.2f}  "
            f"first step {one['first_step_seconds']:.2f} s"
        )
    results = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_before_and_after": [before[0], os.getloadavg()[0]],
        "torch": torch.__version__,
        "steps": arguments.steps,
        "rounds": [
            {name: {key: value for key, value in one.items() if key != "losses"} for name, one in each.items()}
            for each in rounds
        ],
        "medians": found,
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
