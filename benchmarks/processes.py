"""Steps a second of one run in 1, 2 and 4 processes by layout, its losses against those of one process, and the bytes
that a step hands to collectives.

The processes are forked and talk over gloo on this machine. On two cores this says nothing about scaling: four
processes share what two could use. The bytes are those of the tensors that a process gives to each kind of collective
in one step, counted where PyTorch dispatches them; `ttt check --devices` computes what devices send for them.

With `--out` the figures are kept as JSON too. With `--saving` it is how long a step that saves waits for its
checkpoint, by `train.ckpt_async`, of how many bytes.

    python benchmarks/processes.py                            the demo of Moshi, made a little wider
    python benchmarks/processes.py --backbone videodit --steps 7 --out benchmarks/results/processes-videodit.json
    python benchmarks/processes.py --saving --set backbone.dim=512
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `ttt train --nproc`: DDP warns of what it looks for
ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "1 process": (1, ""),
    "replicate 2": (2, ""),
    "shard 2": (2, "{shard: 2}"),
    "replicate 4": (4, ""),
    "shard 4": (4, "{shard: 4}"),
    "replicate 2, shard 2": (4, "{shard: 2}"),
    "tensor 2": (2, "{tensor: 2}"),
    "shard 2, tensor 2": (4, "{shard: 2, tensor: 2}"),
    "replicate 2, tensor 2": (4, "{replicate: 2, tensor: 2}"),
}


def _counting() -> Any:
    """A mode in which the bytes of the tensors that collectives get are counted by the collective's name."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        """Counts."""

        def __init__(self) -> None:
            super().__init__()
            self.bytes: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            """Count a collective, and run it."""
            if func.namespace in ("c10d", "_c10d_functional"):
                name = func._opname.strip("_")
                given = args[1] if "base" in name or "into" in name else args[0]
                tensors = given if isinstance(given, (list, tuple)) else [given]
                self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    return Counting()


def _run(rank: int, options: argparse.Namespace, parallel: str, told: Path) -> None:
    import torch

    from ttt.check import load_config
    from ttt.plugins import get_backbone
    from ttt.train import pictures, train
    from ttt.train.metrics import read_metrics
    from ttt.train.saving import Saver
    from ttt.train.step import Stepper

    torch.set_num_threads(1)
    pictures.draw_run = lambda run: []  # type: ignore[assignment]
    times: list[float] = []
    counted: list[Counter[str]] = []
    advance = Stepper.advance

    def timed(stepper: Stepper) -> None:
        counting = _counting() if len(times) == 2 else None
        begun = time.monotonic()
        with counting or contextlib.nullcontext():
            advance(stepper)
        times.append(time.monotonic() - begun)
        if counting is not None:
            counted.append(counting.bytes)

    waits: list[float] = []
    save = Saver.save

    def waited(saver: Saver, *, rescuing: bool = False) -> None:
        before, begun = saver._step, time.monotonic()
        save(saver, rescuing=rescuing)
        if saver._step != before:
            waits.append(time.monotonic() - begun)

    Saver.save = waited  # type: ignore[method-assign]
    Stepper.advance = timed  # type: ignore[method-assign]
    backbone = get_backbone(options.backbone)
    saving = ["train.ckpt_freq=4", "train.ckpt_keep=1"] if options.saving else []
    overrides = [
        f"train.max_steps={options.steps + 3}", "train.batch_size=4", "train.cpu_threads=1", "train.device=cpu",
        f"train.trainable={options.trainable}", "train.evidence_freq=1000", "train.log_freq=1", "eval.max_batches=1",
        f"run_dir={told.with_suffix('')}", *options.set, *saving, *([f"train.parallel={parallel}"] if parallel else []),
    ]  # fmt: skip
    config = load_config("demo", text=backbone.presets()["demo"], backbone=backbone, overrides=overrides).config
    result = train(config, backbone)
    if rank == 0:
        assert result.checkpoint is not None
        size = sum(file.stat().st_size for file in result.checkpoint.rglob("*") if file.is_file())
        rest = sorted([*times[1:2], *times[3:]])
        median = sorted(waits)[len(waits) // 2]
        losses = [line["loss"] for line in read_metrics(result.run_dir / "metrics.jsonl")]
        found = {"seconds": rest[len(rest) // 2], "bytes": counted[0], "waits": median, "size": size, "losses": losses}
        told.write_text(json.dumps(found), encoding="utf-8")


def _measured(together: Any, count: int, options: argparse.Namespace, parallel: str) -> Any:
    """What a run in forked processes tells of itself."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.json")
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(together(count, _run, options, parallel, told))
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise SystemExit(f"{count} processes, {parallel}: failed")
        return json.loads(told.read_text("utf-8"))


def main() -> None:
    """Run each layout, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="moshi")
    parser.add_argument("--trainable", default="all")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--saving", action="store_true", help="how long steps wait for checkpoints")
    options = parser.parse_args()
    os.environ["NO_TORCH_COMPILE"] = "1"
    sys.path.insert(0, str(ROOT / "tests"))
    from several import together

    if options.saving:
        print(f"{'layout':22} {'sync s':>8} {'async s':>8} {'s a step':>9}  bytes of a checkpoint")
        for layout, (count, parallel) in LAYOUTS.items():
            both = []
            for value in ("false", "true"):
                options.set.append(f"train.ckpt_async={value}")
                both.append(_measured(together, count, options, parallel))
            sync, beside = both
            print(
                f"{layout:22} {sync['waits']:8.3f} {beside['waits']:8.3f} {sync['seconds']:9.3f}  {sync['size']:,}",
                flush=True,
            )
        return
    print(f"{'layout':22} {'s a step':>9} {'steps/s':>8} {'losses differ':>13}  bytes of a step, by process")
    table: dict[str, Any] = {}
    for layout, (count, parallel) in LAYOUTS.items():
        found = table[layout] = _measured(together, count, options, parallel)
        first = next(iter(table.values()))["losses"]
        off = found["off"] = max(abs(one - other) for one, other in zip(found["losses"], first, strict=True))
        sent = ", ".join(f"{name} {size:,}" for name, size in sorted(found["bytes"].items())) or "none"
        print(f"{layout:22} {found['seconds']:9.3f} {1 / found['seconds']:8.2f} {off:13.1e}  {sent}", flush=True)
    if options.out:
        kept = {"backbone": options.backbone, "set": options.set, "trainable": options.trainable, "layouts": table}
        options.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
