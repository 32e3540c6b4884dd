"""The fused scan of another revision beside that of the working tree, or its groups beside each other.

    python benchmarks/revisions.py 265967d
    python benchmarks/revisions.py 265967d --processes 12 --budget 2
    python benchmarks/revisions.py main --shapes Video-like --groups 0 16
    python benchmarks/revisions.py                # group 0 of the working tree beside group 16

Both take turns, round after round, on one thread, whose own processor time is taken (with `--threads 2` and more, the
clock's). Other work on the machine is not in it, but takes memory bandwidth, caches and clock from it; so rounds are
short and many: sequences are cut to `--steps` mini-batches. What is compared are medians of the ratios within a round,
old over new, so that more than 1 is faster; and the ratio of the shortest times, `least`, which other work disturbs
least. Memory is counted by the allocator, of one pass each.

Where a process's memory happens to lie makes some percent of difference, however many rounds it runs: the same code
beside itself has been 0.95 in one process and 1.03 in the next. So all of it is done in several processes, and which of
the two makes its tensors first alternates. Printed is the median over processes, with its standard error from how they
differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from allocations import allocations  # before torch: it quietens the profiler

import torch  # isort: skip
from contenders import Shape
from scan import SHAPES, Clock
from torch import Tensor

from ttt.ops import fused

_PACKAGE = "ttt/ops/fused"
_NORM = "ttt/ops/norm.py"
"""What it takes from outside the package that is arithmetic too."""
MORE = (
    Shape("Moshi, streams", "mlp", 1024, 8, 16, tokens=188, batch=4),
    Shape("Video-like, shorter", "mlp", 512, 8, 64, tokens=2048, causal=False),
)


def fused_of(revision: str, folder: Path) -> ModuleType:
    """The package `ttt.ops.fused` of a revision, with its `ttt.ops.norm`, under a name and an operation of its own."""
    name = f"fused_of_{re.sub(r'[^0-9A-Za-z]', '_', revision)}"
    listed = subprocess.run(
        ["git", "ls-tree", "--name-only", revision, f"{_PACKAGE}/"], check=True, capture_output=True, text=True
    )
    package = folder / name
    package.mkdir()
    for path in (*listed.stdout.split(), _NORM):
        text = subprocess.run(["git", "show", f"{revision}:{path}"], check=True, capture_output=True, text=True).stdout
        text = text.replace("ttt.ops.fused", name).replace("ttt.ops.norm", f"{name}.norm")
        text = text.replace('"ttt::', f'"{name}::').replace("ops.ttt", f"ops.{name}")
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


class Faster(NamedTuple):
    """How many times as fast something is."""

    median: float
    """Of the ratios within a round; of several processes, of their medians."""
    error: float
    """The median's standard error: from the ratios' quartiles, or from how much processes differ."""
    least: float
    """The ratio of the shortest times; of several processes, the median of theirs."""

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Faster:
        """From seconds of the same rounds."""
        ratios = [a / b for a, b in zip(before, after, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        # For normal errors, quartiles are 1.349 standard deviations apart, and a median's error is 1.253 of a mean's.
        error = 1.253 * (high - low) / 1.349 / math.sqrt(len(ratios))
        return cls(statistics.median(ratios), error, min(before) / min(after))

    @classmethod
    def of_processes(cls, found: Sequence[Faster]) -> Faster:
        """From what each process has found, two or more."""
        medians = [one.median for one in found]
        error = 1.253 * statistics.stdev(medians) / math.sqrt(len(medians))  # of few, quartiles tell too little
        return cls(statistics.median(medians), error, statistics.median(one.least for one in found))

    def __str__(self) -> str:
        return f"{self.median:.3f} ± {self.error:.3f}, least {self.least:.3f}"


Cells = list[str | float | Faster]
"""Of a line of a table."""


def cut(shape: Shape, steps: int) -> Shape:
    """The same of at most so many mini-batches, all of them full."""
    size = shape.mini_batch_size
    return dataclasses.replace(shape, tokens=min(shape.tokens // size, steps) * size)


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


def compare(old: ModuleType, shape: Shape, group_size: int, clock: Clock, *, turned: bool = False) -> Cells:
    """One line of the table of two revisions.

    Args:
        old: the other revision's package.
        shape: the problem.
        group_size: mini-batches that backward recomputes at a time.
        clock: which times.
        turned: whether the working tree's tensors are made first.
    """
    packages = (fused, old) if turned else (old, fused)
    made = [Scan(package, shape, group_size, clock.device) for package in packages]
    scans = made[::-1] if turned else made
    for one in made:
        one.both()
    agree = max(((a - b).norm() / b.norm()).item() for a, b in zip(*(one.both() for one in scans), strict=True))
    cells: Cells = [f"{shape.name}, group {group_size}"]
    for which in ("forward", "both"):
        passes = [getattr(one, which) for one in scans]
        before, after = clock.rounds(passes)
        peaks = [allocations(one, clock.device).peak / 2**20 for one in passes]
        cells += [Faster.of(before, after), f"{peaks[0]:,.1f} to {peaks[1]:,.1f}"]
    return [*cells, agree]


def compare_groups(shape: Shape, clock: Clock, *, turned: bool = False) -> Cells:
    """One line of the table of groups: everything kept beside groups of 16, and what each holds of its closed form."""
    made = {size: Scan(fused, shape, size, clock.device) for size in ((0, 16) if turned else (16, 0))}
    for one in made.values():
        one.both()
    before, after = clock.rounds([made[16].both, made[0].both])
    cells: Cells = [shape.name, Faster.of(before, after)]
    for size in (0, 16):
        answers = made[size].answers().nbytes  # the result itself, which no closed form counts
        held = allocations(made[size].answers, clock.device).held - answers
        cells.append(f"{held / 2**20:,.2f} of {shape.cost(size).kept_bytes / 2**20:,.2f}")
    return cells


def lines(arguments: argparse.Namespace, turned: bool) -> list[Cells]:
    """The table, as one process finds it."""
    torch.set_num_threads(arguments.threads)
    kind = ThreadClock if arguments.threads == 1 else Clock
    clock = kind(torch.device("cpu"), arguments.repeats, budget=arguments.budget)
    wanted = [one for one in (*SHAPES, *MORE) if one.name in arguments.shapes]
    shapes = [cut(shape, arguments.steps) for shape in wanted]
    if arguments.revision is None:
        return [compare_groups(shape, clock, turned=turned) for shape in shapes]
    with tempfile.TemporaryDirectory() as folder:
        old = fused_of(arguments.revision, Path(folder))
        pairs = itertools.product(shapes, arguments.groups)
        return [compare(old, shape, group_size, clock, turned=turned) for shape, group_size in pairs]


def pooled(cells: Sequence[str | float | Faster]) -> str:
    """The same cell of several processes' tables: the largest difference, and names and memory as each says."""
    found = [cell for cell in cells if isinstance(cell, Faster)]
    if found:
        return str(Faster.of_processes(found))
    differences = [cell for cell in cells if isinstance(cell, float)]
    return f"{max(differences):.0e}" if differences else " or ".join(dict.fromkeys(map(str, cells)))


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", help="the other one; without it, groups are compared")
    names = [shape.name for shape in (*SHAPES, *MORE)]
    parser.add_argument("--shapes", nargs="+", metavar="NAME", choices=names, default=names, help=", ".join(names))
    parser.add_argument("--groups", nargs="+", type=int, default=[0, 16], metavar="N", help="of two revisions")
    parser.add_argument("--repeats", type=int, default=400, help="rounds at most, in each process")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each cell, in each process")
    parser.add_argument("--steps", type=int, default=48, metavar="N", help="mini-batches at most")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="cores that compute")
    parser.add_argument("--processes", type=int, default=8, metavar="N", help="one after the other, 2 or more")
    arguments = parser.parse_args()
    if arguments.processes < 2:
        parser.error("--processes is 2 or more: one cannot tell how far off it is")
    tables = []
    for turn in range(arguments.processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            tables.append(process.submit(lines, arguments, turn % 2 == 1).result())
        print(f"process {turn + 1} of {arguments.processes}", file=sys.stderr, flush=True)
    if arguments.revision is None:
        print("| scan | group 0 over group 16, times as fast | MB held by group 0 | by group 16 |\n|" + " --- |" * 4)
    else:
        print("| scan | forward, times as fast | MB | with backward | MB | largest difference |\n|" + " --- |" * 6)
    for same in zip(*tables, strict=True):
        print(f"| {' | '.join(map(pooled, zip(*same, strict=True)))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
