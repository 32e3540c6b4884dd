"""The fused scan of another revision beside that of the working tree, in one process.

    python benchmarks/revisions.py 265967d
    python benchmarks/revisions.py main --shapes Video-like --groups 0 16

Both take turns, round after round, on one thread, whose own processor time is taken: what else the machine does is not
in it. What is printed are the medians of the ratios within a round, old over new, so that more than 1 is faster. Memory
is counted by the allocator, of one pass each.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from allocations import allocations  # before torch: it quietens the profiler

import torch  # isort: skip
from contenders import Shape
from scan import SHAPES, Clock, ratio
from torch import Tensor

from ttt.ops import fused

_PACKAGE = "ttt/ops/fused"
MORE = (
    Shape("Moshi, streams", "mlp", 1024, 8, 16, tokens=188, batch=4),
    Shape("Video-like, shorter", "mlp", 512, 8, 64, tokens=2048, causal=False),
)


def fused_of(revision: str, folder: Path) -> ModuleType:
    """The package `ttt.ops.fused` of a revision under a name and an operation of its own."""
    name = f"fused_of_{re.sub(r'[^0-9A-Za-z]', '_', revision)}"
    listed = subprocess.run(
        ["git", "ls-tree", "--name-only", revision, f"{_PACKAGE}/"], check=True, capture_output=True, text=True
    )
    package = folder / name
    package.mkdir()
    for path in listed.stdout.split():
        text = subprocess.run(["git", "show", f"{revision}:{path}"], check=True, capture_output=True, text=True).stdout
        text = text.replace("ttt.ops.fused", name).replace('"ttt::', f'"{name}::').replace("ops.ttt.", f"ops.{name}.")
        (package / Path(path).name).write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


class ThreadClock(Clock):
    """Times one thread by the processor time that it takes."""

    def seconds(self, function: Callable[[], object]) -> float:
        """Of one call."""
        start = time.thread_time()
        function()
        return time.thread_time() - start


class Scan:
    """One scan of a shape, forward and with backward.

    Args:
        package: whose scan.
        shape: the problem.
        group_size: mini-batches that backward recomputes at a time.
        device: where.
    """

    def __init__(self, package: ModuleType, shape: Shape, group_size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*sizes, generator=generator) * scale).to(device).requires_grad_()

        steps, width = shape.tokens // shape.mini_batch_size, shape.head_width
        cells = shape.batch, shape.heads, steps, shape.mini_batch_size
        self.weights = [
            normal(shape.batch, shape.heads, *sizes, scale=0.1)
            for fan_in, fan_out in itertools.pairwise(shape.widths)
            for sizes in ((fan_in, fan_out), (1, fan_out))
        ]
        self.tokens = [*(normal(*cells, width) for _ in range(3)), normal(*cells, 1, scale=0.01)]
        position = torch.arange(1, shape.mini_batch_size + 1, device=device)
        scale = 1 / position if shape.causal else torch.full(position.shape, 1 / shape.mini_batch_size).to(device)
        self.shared = [1 + normal(shape.heads, 1, width, scale=0.1), normal(shape.heads, 1, width, scale=0.1), scale]
        self.settings: dict[str, Any] = {"causal": shape.causal, "eps": 1e-6, "group_size": group_size}
        self.package = package

    def answers(self) -> Tensor:
        """What it answers, differentiable."""
        z: Tensor = self.package.fused_scan(tuple(self.weights), *self.tokens, *self.shared, **self.settings)[0]
        return z

    @torch.no_grad()
    def forward(self) -> None:
        """Without gradients."""
        self.answers()

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward."""
        z = self.answers()
        return torch.autograd.grad(z, [*self.tokens, *self.weights], torch.ones_like(z))


def compare(old: ModuleType, shape: Shape, group_size: int, clock: Clock) -> str:
    """One line of the table."""
    scans = [Scan(package, shape, group_size, clock.device) for package in (old, fused)]
    for one in scans:
        one.both()
    agree = max(((a - b).norm() / b.norm()).item() for a, b in zip(*(one.both() for one in scans), strict=True))
    cells = [f"{shape.name}, group {group_size}"]
    for which in ("forward", "both"):
        passes = [getattr(one, which) for one in scans]
        before, after = clock.rounds(passes)
        peaks = [allocations(one, clock.device).peak / 2**20 for one in passes]
        cells += [f"{ratio(before, after):.2f}", f"{peaks[0]:,.1f} to {peaks[1]:,.1f}"]
    return " | ".join([*cells, f"{agree:.0e}"])


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--shapes", nargs="+", metavar="NAME")
    parser.add_argument("--groups", nargs="+", type=int, default=[0, 16], metavar="N")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each cell")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = ThreadClock(torch.device("cpu"), arguments.repeats, budget=arguments.budget)
    print("| scan | forward, times as fast | MB | with backward | MB | largest difference |\n|" + " --- |" * 6)
    with tempfile.TemporaryDirectory() as folder:
        old = fused_of(arguments.revision, Path(folder))
        for shape in (*SHAPES, *MORE):
            if shape.name in (arguments.shapes or (shape.name,)):
                for group_size in arguments.groups:
                    print(f"| {compare(old, shape, group_size, clock)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
