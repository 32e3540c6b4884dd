"""Bytes that each process of a run holds and sends in one step, by layout, beside what `ttt check --devices` computes.

Parameters, gradients and optimiser are counted in the processes, after the backward pass of the third step: the storage
of every parameter, of every gradient, of every tensor of the optimiser's state and of the masters. What is sent follows
from the tensors that a process gives to collectives, counted where PyTorch dispatches them: of n processes, each sends
`2 (n-1)/n` of what they sum, `n-1` times its part of what they gather, and `(n-1)/n` of what they sum for one of them.

    python benchmarks/sharded_memory.py                       the demo of Moshi, in 2 processes
    python benchmarks/sharded_memory.py --backbone videodit --processes 4
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("parameters", "gradients", "optimizer")
SETTINGS = {
    "what is trained: TTT": ["train.trainable=ttt"],
    "everything": ["train.trainable=all"],
    "everything, bfloat16": ["train.trainable=all", "train.param_dtype=bfloat16"],
}


def held(parts: Any) -> dict[str, int]:
    """Bytes of a process's parameters, gradients and optimiser, each storage once."""
    optimizer = parts.optimizer
    targets = list(optimizer._targets.values())
    own = list(parts.model.parameters())
    masters = [target for target in targets if all(target is not parameter for parameter in own)]
    gradients = [tensor.grad for tensor in (*own, *masters) if tensor.grad is not None]
    moments = [value for state in optimizer._adamw.state.values() for value in state.values()]
    return {
        "parameters": _bytes(own),
        "gradients": _bytes(gradients),
        "optimizer": _bytes([*moments, *masters]),
    }


def _bytes(tensors: Any) -> int:
    local = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(storages.values())


def sent_bytes(given: dict[str, int], processes: int) -> int:
    """Bytes that a process sends, from those of the tensors that it gives to each kind of collective."""
    total = 0.0
    for name, size in given.items():
        if "reduce_scatter" in name:
            total += size * (processes - 1) / processes
        elif "allgather" in name or "all_gather" in name:
            total += size * (processes - 1)
        elif "allreduce" in name or "all_reduce" in name:
            total += size * 2 * (processes - 1) / processes
    return round(total)


def _run(rank: int, options: argparse.Namespace, overrides: list[str], told: Path) -> None:
    import torch
    from processes import _counting

    from ttt.check import load_config
    from ttt.plugins import get_backbone
    from ttt.train import pictures, train
    from ttt.train.optim import Optimizer
    from ttt.train.step import Stepper

    torch.set_num_threads(1)
    pictures.draw_run = lambda run: []  # type: ignore[assignment]
    steps: list[dict[str, Any]] = []
    advance, clip = Stepper.advance, Optimizer.clip

    def watched(stepper: Stepper) -> None:
        steps.append({"parts": stepper._parts})
        with _counting() as counting:
            advance(stepper)
        steps[-1]["given"] = dict(counting.bytes)

    def counted(optimizer: Optimizer) -> Any:
        steps[-1]["held"] = held(steps[-1]["parts"])
        return clip(optimizer)

    Stepper.advance, Optimizer.clip = watched, counted  # type: ignore[method-assign, assignment]
    backbone = get_backbone(options.backbone)
    config = load_config("demo", text=backbone.presets()["demo"], backbone=backbone, overrides=overrides).config
    train(config, backbone)
    found = {"held": steps[2]["held"], "given": steps[2]["given"]}
    told.with_name(f"{told.name}.{rank}").write_text(json.dumps(found), encoding="utf-8")


def measured(options: argparse.Namespace, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """What each process of a run holds and gives to collectives."""
    from several import together

    told = folder / "told"
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(together(options.processes, _run, options, [*overrides, f"run_dir={folder / 'run'}"], told))
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit(f"{overrides}: failed")
    ranks = range(options.processes)
    return [json.loads(told.with_name(f"{told.name}.{rank}").read_text("utf-8")) for rank in ranks]


def estimated(options: argparse.Namespace, overrides: list[str], layout: Any) -> tuple[dict[str, int], int]:
    """What `ttt check --devices` says of one process: bytes by kind, and bytes sent in a step."""
    from ttt.check import load_config
    from ttt.check.layouts import needs_of_layout
    from ttt.plugins import get_backbone

    backbone = get_backbone(options.backbone)
    config = load_config("demo", text=backbone.presets()["demo"], backbone=backbone, overrides=overrides).config
    needs = needs_of_layout(config, backbone.facts(config), None, layout)
    return {kind: needs.needs.parts[kind] for kind in KINDS}, needs.sent.total


def main() -> None:
    """Run each layout with each setting, and print the table; fails if a process holds 10 % more or less."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="moshi")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    os.environ["NO_TORCH_COMPILE"] = "1"
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
    import torch

    import ttt.train  # noqa: F401 - once, and not in each process
    from ttt.parallel.layout import Layout
    from ttt.plugins import get_backbone

    backbone = get_backbone(options.backbone)
    backbone.build(backbone.tiny(), device="meta", dtype=torch.float32)  # imports what it needs

    count, off = options.processes, 0.0
    layouts = {f"replicate {count}": Layout(count), f"shard {count}": Layout(1, count)}
    print(f"{'':46}{'parameters':>24}{'gradients':>24}{'optimizer':>24}{'sent in a step':>26}")
    for setting, keys in SETTINGS.items():
        for name, layout in layouts.items():
            overrides = [
                "train.max_steps=4", f"train.batch_size={2 * count}", "train.cpu_threads=1", "train.device=cpu",
                "train.evidence_freq=1000", "eval.max_batches=1", "train.gradient_checkpointing=true", *keys,
                f"train.parallel={{replicate: {layout.replicate}, shard: {layout.shard}}}", *options.set,
            ]  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                found = measured(options, overrides, Path(folder))
            expected, sent = estimated(options, overrides, layout)
            cells = []
            for kind in KINDS:
                values = [rank["held"][kind] for rank in found]
                off = max(off, *(abs(value / expected[kind] - 1) for value in values))
                cells.append(f"{max(values):,} / {expected[kind]:,}")
            given = max(sent_bytes(rank["given"], count) for rank in found)
            row = "".join(f"{cell:>24}" for cell in cells)
            print(f"{setting + ', ' + name:46}{row}{f'{given:,} / {sent:,}':>26}", flush=True)
    print(f"counted / computed; at most {off:.1%} apart in what a process holds")
    if off > 0.1:
        raise SystemExit("more than 10 % apart")


if __name__ == "__main__":
    main()
