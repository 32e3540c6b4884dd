"""Training Moshi's demo on windows of 600 s: seconds a step, and the peak of memory beside what `ttt check` estimates.

    python benchmarks/moshi_long_windows.py                        # 600 s, five steps, with checkpointing and without
    python benchmarks/moshi_long_windows.py --seconds 3600 --steps 1

Attention sees 50 frames in layers with TTT and 100 in the others, as in configs that people train. The recording is the
demo's dialogue, again and again. Each variant runs in a process of its own: `ttt.train` runs its steps, then one more
step is counted allocation by allocation (`benchmarks/allocations.py`). The estimate is of what PyTorch allocates; the
process's own growth is printed beside it. Results go to `benchmarks/results/moshi_long_windows.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import sphn
import torch
from allocations import allocations
from rich.console import Console

from ttt import inject
from ttt.amounts import show_bytes
from ttt.check import load_config
from ttt.check.estimate import estimate
from ttt.config import RunConfig
from ttt.plugins import get_backbone
from ttt.train.learnable import choose_learnable
from ttt.train.metrics import read_metrics
from ttt.train.optim import Optimizer
from ttt.train.setup import peak_memory_bytes
from ttt.train.start import train

MOSHI = get_backbone("moshi")
DEMO = Path(__file__).resolve().parent.parent / "plugins" / "moshi" / "ttt_moshi" / "demo"
CONTEXTS = {"ttt_layer_context": 50, "non_ttt_layer_context": 100}
VARIANTS: dict[str, dict[str, Any]] = {
    "contexts 50 and 100": {**CONTEXTS, "checkpointing": False},
    "contexts 50 and 100, checkpointing": {**CONTEXTS, "checkpointing": True},
}


def recording(folder: Path, seconds: float) -> Path:
    """Write the demo's dialogue, repeated, as moshi-finetune's data; returns the `.jsonl`."""
    pcm, rate = sphn.read(str(DEMO / "dialogue.flac"))
    words = json.loads((DEMO / "dialogue.json").read_text(encoding="utf-8"))["alignments"]
    length = pcm.shape[1] / rate
    times = int(-(-seconds // length))
    samples = np.tile(pcm, times)[:, : round(seconds * rate)]
    with wave.open(str(folder / "long.wav"), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(int(rate))
        file.writeframes((samples.T * 32767).astype("<i2").tobytes())
    said = [
        [word, [start + again * length, end + again * length], speaker]
        for again in range(times)
        for word, (start, end), speaker in words
        if end + again * length < seconds
    ]
    (folder / "long.json").write_text(json.dumps({"alignments": said}), encoding="utf-8")
    line = {"path": "long.wav", "duration": samples.shape[1] / rate}
    (folder / "long.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    return folder / "long.jsonl"


def run_config(variant: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> RunConfig:
    """The demo's config, changed."""
    changes = [f"backbone.{key}={value}" for key, value in variant.items() if key != "checkpointing"]
    changes += [
        f"data.train_data={recording(folder, arguments.seconds)}",
        f"data.duration_sec={arguments.seconds:g}",
        f"train.gradient_checkpointing={'true' if variant['checkpointing'] else 'false'}",
        f"train.max_steps={arguments.steps}",
        *("train.batch_size=1", "train.log_freq=1", "train.evidence_freq=100", "train.device=cpu"),
        f"run_dir={folder / 'run'}",
    ]
    return load_config(None, text=MOSHI.presets()["demo"], backbone=MOSHI, overrides=changes).config


def counted_peak(config: RunConfig) -> int:
    """The most bytes that a training step holds, the model and the optimiser included."""
    model = MOSHI.build(config.backbone, device="cpu", dtype=torch.float32).train()
    injection = inject.apply(model, MOSHI.sites(model), config.ttt)
    MOSHI.set_gradient_checkpointing(model, config.train.gradient_checkpointing)
    learnable = choose_learnable(model, injection, config.train, is_attention=MOSHI.is_attention)
    optimizer = Optimizer(learnable, config.train)
    frames = MOSHI.facts(config).tokens_per_window
    assert frames is not None
    batch = MOSHI.example_batch(model, batch_size=1, tokens=frames, seed=0)

    def step() -> None:
        MOSHI.loss(model, batch, config).loss.backward()
        optimizer.collect()
        optimizer.clip()
        optimizer.step(0)

    optimizer.collect()
    tensors = [*model.parameters(), *optimizer.tensors().values()]
    held = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())
    return held + allocations(step, torch.device("cpu")).peak


def measure(variant: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a variant, count one step of it, and estimate it."""
    with tempfile.TemporaryDirectory() as name:
        config = run_config(variant, arguments, Path(name))
        before = peak_memory_bytes(torch.device("cpu"))
        result = train(config, MOSHI, console=Console(quiet=True))
        grown = peak_memory_bytes(torch.device("cpu")) - before
        lines = read_metrics(Path(name) / "run" / "metrics.jsonl")
    facts = MOSHI.facts(config)
    needs = estimate(config, facts)
    assert facts.tokens_per_window is not None
    steps = [facts.tokens_per_window / line["tokens_per_second"] for line in lines]
    return {
        "frames": facts.tokens_per_window,
        "steps": result.steps,
        "losses": [line["loss"] for line in lines],
        "seconds_a_step": steps[len(steps) // 2],
        "estimate_low_bytes": needs.low,
        "allocated_peak_bytes": counted_peak(config),
        "estimate_high_bytes": needs.high,
        "process_growth_bytes": grown,
    }


def _in_child(variant: dict[str, Any], arguments: argparse.Namespace, pipe: Any) -> None:
    torch.set_num_threads(arguments.threads)
    pipe.send(measure(variant, arguments))


def main() -> None:
    """Run every variant in a process of its own, and print and keep what it measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=VARIANTS, action="append")
    arguments = parser.parse_args()
    processes, found = multiprocessing.get_context("spawn"), {}
    for name in arguments.only or VARIANTS:
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=_in_child, args=(VARIANTS[name], arguments, sender))
        child.start()
        sender.close()
        found[name] = one = receiver.recv()
        child.join()
        inside = one["estimate_low_bytes"] <= one["allocated_peak_bytes"] <= one["estimate_high_bytes"]
        print(
            f"{name}: {one['steps']} steps of {one['frames']:,} frames, {one['seconds_a_step']:.1f} s a step; "
            f"{show_bytes(one['allocated_peak_bytes'])} at the peak, estimated {show_bytes(one['estimate_low_bytes'])} "
            f"to {show_bytes(one['estimate_high_bytes'])}{'' if inside else ': NOT IN RANGE'}; the process grew by "
            f"{show_bytes(one['process_growth_bytes'])}; loss {one['losses'][0]:.3f} to {one['losses'][-1]:.3f}",
            flush=True,
        )
        if arguments.only is None and arguments.seconds == 600:
            _keep(found, arguments)


def _keep(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    results = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": arguments.threads},
        "torch": torch.__version__,
        "seconds": arguments.seconds,
        "variants": found,
    }
    file = Path(__file__).parent / "results" / "moshi_long_windows.json"
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
