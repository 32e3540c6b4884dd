"""TTT against LoRA at equal parameters: the same data, windows, steps and evaluation; each at its own learning rate.

    python benchmarks/lora_against_ttt.py                   # some ten minutes on two CPU cores
    python benchmarks/lora_against_ttt.py --config my.yaml  # your backbone and data, with your rates: --rates 1e-5,1e-4

Every arm is a run of one config with another `adapter`. Rates are tried on the first seed; the one with the lowest
training loss over the last steps is taken, so that nothing is chosen by held-out data. Then every seed is trained with
it. What is finished stays in `--work`: `ttt runs FOLDER` compares the runs there, and a run that was killed goes on.

By default this is the demo of Moshi: a random, frozen backbone of 1.7 million parameters, and minutes of speech. It
proves nothing about Moshi; it shows that the two can be compared. In a random backbone almost any change of its linear
layers helps, and LoRA may change all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ttt.adapter_file import read_info
from ttt.check import load_config
from ttt.files import read_json, write_text
from ttt.train import train
from ttt.train.claim import METRICS, SUMMARY
from ttt.train.metrics import read_metrics

ARMS = {
    "TTT": ["adapter=ttt"],
    "LoRA in attention": ["adapter=lora", "lora.rank=match", "lora.linears=attention"],
    "LoRA in all linears": ["adapter=lora", "lora.rank=match", "lora.linears=all"],
    "TTT + LoRA in attention": ["adapter=ttt+lora", "lora.rank=match", "lora.linears=attention"],
}
"""The settings of each arm; the last one has twice the parameters."""
_LAST = 10
"""Steps whose mean training loss decides between rates."""
PROVES_NOTHING = (
    "The demo's backbone is random and tiny: these numbers prove nothing about Moshi. They show that both are trained "
    "and measured alike."
)


@dataclass(frozen=True)
class Run:
    """What one run gave."""

    arm: str
    rate: float
    seed: int
    parameters: int
    rank: int | None
    training_loss: float
    """Mean of the last steps."""
    held_out: float
    closed: float
    """The plain backbone on the same windows."""


def made(arm: str, rate: float, seed: int, base: Sequence[str], config: str | None, work: Path) -> Run:
    """Train a run, or go on with it, or read what it gave."""
    folder = work / f"{arm.replace(' ', '_')}-lr{rate:g}-seed{seed}"
    settings = [*base, *ARMS[arm], f"train.lr={rate!r}", f"train.seed={seed}", f"run_dir={folder}"]
    text = None if config else _demo()
    loaded = load_config(config or "demo", text=text, overrides=settings)
    if not (folder / SUMMARY).is_file():
        train(loaded.config, loaded.backbone, resume=folder.is_dir(), console=Console(quiet=True))
    summary, lines = read_json(folder / SUMMARY, sealed=True), read_metrics(folder / METRICS)
    info = read_info(folder)
    return Run(
        arm=arm,
        rate=rate,
        seed=seed,
        parameters=info.parameters,
        rank=None if info.lora is None else info.lora.rank,
        training_loss=statistics.fmean(line["loss"] for line in lines[-_LAST:]),
        held_out=summary["eval_loss"],
        closed=summary["eval_loss_gates_closed"],
    )


def _demo() -> str:
    from ttt.plugins import get_backbone

    return get_backbone("moshi").presets()["demo"]


def table(runs: Sequence[Run]) -> str:
    """A line for each arm: parameters, the rate taken, held-out loss as mean ± standard deviation of the seeds."""
    lines = [
        "| arm | parameters | rank | lr | held-out loss | against the plain backbone |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(run.arm for run in runs):
        found = [run for run in runs if run.arm == arm]
        gains = [run.held_out / run.closed - 1 for run in found]
        lines.append(
            f"| {arm} | {found[0].parameters:,} | {found[0].rank or '–'} | {found[0].rate:g} | "
            f"{_spread([run.held_out for run in found], '.3f')} | {_spread(gains, '+.1%')} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    error = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):{form}} ± {error:{form.lstrip('+')}}"


def rates_tried(runs: Sequence[Run]) -> str:
    """The training and held-out loss of each arm at each rate."""
    lines = ["| arm | lr | training loss, last steps | held-out loss |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.arm} | {r.rate:g} | {r.training_loss:.3f} | {r.held_out:.3f} |" for r in runs)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a config; without it, the demo of Moshi")
    parser.add_argument("--rates", default="1e-3,3e-3,1e-2")
    parser.add_argument("--arms", default=",".join(ARMS), help="which, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], dest="settings", help="section.key=value, for every run")
    parser.add_argument("--work", type=Path, help="folder of the runs; they stay there")
    parser.add_argument("--out", type=Path, help="a .json; the tables go beside it as .md")
    asked = parser.parse_args(arguments)
    short = [] if asked.config else ["data.duration_sec=5", "eval.max_batches=8"]
    base = [*short, f"train.max_steps={asked.steps}", "train.ckpt_freq=0", *asked.settings]
    rates = [float(rate) for rate in asked.rates.split(",")]
    tried: list[Run] = []
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        for arm in asked.arms.split(","):
            found = [_told(made(arm, rate, 0, base, asked.config, work)) for rate in rates]
            tried += found
            best = min(found, key=lambda run: run.training_loss)
            seeds = [_told(made(arm, best.rate, seed, base, asked.config, work)) for seed in range(1, asked.seeds)]
            runs += [best, *seeds]
    text = (
        f"{table(runs)}\n\n{'' if asked.config else PROVES_NOTHING}\n\nRates tried, seed 0:\n\n{rates_tried(tried)}\n"
    )
    print(text)
    if asked.out:
        content: dict[str, Any] = {
            "settings": base,
            "runs": [asdict(run) for run in runs],
            "tried": [asdict(run) for run in tried],
            "processor": platform.machine(),
        }
        write_text(asked.out, json.dumps(content, indent=1) + "\n")
        write_text(asked.out.with_suffix(".md"), text)


def _told(run: Run) -> Run:
    print(f"{run.arm}, lr {run.rate:g}, seed {run.seed}: held out {run.held_out:.3f}", file=sys.stderr)
    return run


if __name__ == "__main__":
    main()
