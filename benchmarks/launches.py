"""Kernels that a scan launches on a GPU, the bytes they move and the memory they take: counted without a GPU.

    python benchmarks/launches.py               # the fused scan and the Triton kernels of this working tree
    python benchmarks/launches.py 265967d       # and the fused scan of another revision before them
    python benchmarks/launches.py --write       # and keep it: benchmarks/results/launches.json and .md

The fused scan runs on the device `meta`, where it chooses its chunks as on a GPU. Every operation of PyTorch that is no
view and no allocation counts as one launch; a product that first copies its base into another result counts as two.
Bytes are those of the tensors that an operation reads and writes, of each once; `state` are those of matrices of fast
weights among them, in multiples of S, the fast weights of all heads and rows. `peak` is the most memory at a time
beyond the inputs, answers included. Triton kernels run in Triton's interpreter (`launches_triton.py`). Nothing here ran
on a GPU: caches, and kernels that a library splits, are not seen.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported

import torch  # isort: skip
from contenders import Shape
from revisions import fused_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt.ops import fused
from ttt.ops.decode import learn_one_
from ttt.ops.minibatch import Inner, Stream
from ttt.ops.rows import Tokens
from ttt.ops.triton.available import INSTALLED

SHAPES = (
    Shape("Moshi, B 1", "mlp", 4096, 32, 16, tokens=176),
    Shape("Moshi, B 16", "mlp", 4096, 32, 16, tokens=176, batch=16),
    Shape("Moshi, C 1, B 1", "mlp", 4096, 32, 1, tokens=32),
    Shape("Video-DiT", "mlp", 3072, 48, 64, tokens=2048, causal=False),
)
LINEAR = Shape("Linear, F 64", "linear", 2048, 32, 16, tokens=256)
"""Of the Triton kernels and of the fused scan, beside the MLPs above."""
GROUP = 16
RESULTS = Path(__file__).parent / "results" / "launches.json"
_COPIES_BASE = (torch.ops.aten.baddbmm.out, torch.ops.aten.baddbmm.default)


class Count(TorchDispatchMode):
    """Counts what runs inside it.

    Args:
        matrices: `[in, out]` of the fast weights, as they may be laid out.
    """

    def __init__(self, matrices: set[tuple[int, int]]) -> None:
        super().__init__()
        self.matrices = matrices
        self.launches = self.bytes = self.state_bytes = self.peak_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view:
            self._weigh(found)
        if not is_view and "empty" not in func._schema.name:
            self._count(func, args, kwargs, found)
        return found

    def _weigh(self, found: Any) -> None:
        """Count the memory of results, so long as it is there."""
        self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._live.values()))

    def _count(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        self.launches += 1
        written = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        read = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if func._schema.name.split("::")[1] in ("copy_", "zero_", "fill_"):  # the target is not read
            read = read[1:]
        self._move(read + written)
        if func in _COPIES_BASE:
            self.launches += 1
            self._move([written[0], written[0]])

    def _move(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            numbers = 1
            for size, stride in zip(x.shape, x.stride(), strict=True):
                numbers *= size if stride else 1  # what is expanded is there once
            self.bytes += numbers * x.element_size()
            if x.dim() >= 2 and self.matrices & {tuple(x.shape[-2:]), tuple(x.shape[:-3:-1])}:
                self.state_bytes += numbers * x.element_size()


class Pass(NamedTuple):
    """One pass over all mini-batches, each number but the last for one of them."""

    launches: float
    bytes: float
    states: float
    """Of S."""
    peak_bytes: int | None
    """None where nobody counts it."""

    @classmethod
    def of(cls, count: Count, steps: int, state: int) -> Pass:
        """The means."""
        return cls(count.launches / steps, count.bytes / steps, count.state_bytes / steps / state, count.peak_bytes)


class Row(NamedTuple):
    """A line of the table."""

    shape: str
    by: str
    """Which scan, or its revision."""
    name: str
    """Of the pass."""
    told: bool
    """Whether matrices of weights can be told from tokens by their sizes."""
    counted: Pass

    def __str__(self) -> str:
        states = f"{self.counted.states:.2f}" if self.told else "not told"
        peak = "" if self.counted.peak_bytes is None else f"{self.counted.peak_bytes / 2**20:,.0f}"
        moved = f"{self.counted.launches:,.1f} | {self.counted.bytes / 2**20:,.1f}"
        return f"| {self.shape} | {self.by} | {self.name} | {moved} | {states} | {peak} |"


def told(shape: Shape) -> bool:
    """Whether a mini-batch has another number of tokens than any width."""
    return shape.mini_batch_size not in shape.widths and 2 * shape.mini_batch_size not in shape.widths


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _weights(shape: Shape) -> list[Tensor]:
    pairs = itertools.pairwise(shape.widths)
    leading = shape.batch, shape.heads
    return [_meta(*leading, *sizes) for a, b in pairs for sizes in ((a, b), (1, b))]


def matrices(shape: Shape) -> set[tuple[int, int]]:
    """The matrices themselves, with a bias below, and with zeros below that."""
    return {(a + more, b) for a, b in itertools.pairwise(shape.widths) for more in (0, 1, 4)}


def count(package: ModuleType, shape: Shape) -> dict[str, Pass]:
    """The passes of a package's scan: answering alone, the first pass of training, and its backward in groups."""
    operator = importlib.import_module(f"{package.__name__}.operator")
    layout = importlib.import_module(f"{package.__name__}.layout")
    size, width = shape.mini_batch_size, shape.head_width
    steps = shape.tokens // size
    cells = shape.batch, shape.heads, steps, size
    tokens = [_meta(*cells, width) for _ in range(3)] + [_meta(*cells, 1)]
    norms = [_meta(shape.heads, 1, width), _meta(shape.heads, 1, width)]
    weights = _weights(shape)
    settings = shape.causal, 1e-6
    found = {}
    state = sum(x.nbytes for x in weights)

    def counted(name: str, function: Any) -> Any:
        with Count(matrices(shape)) as counter:
            result = function()
        found[name] = Pass.of(counter, steps, state)
        return result

    def problem(group_size: int) -> Any:
        shared = *norms, _meta(1, size), _meta(1, 1)
        return layout.Problem(*tokens, *shared, weights, [], *settings, group_size)

    counted("answers alone", lambda: operator._run_forward(problem(0), keep=False))
    _, following, saved = counted("forward", lambda: operator._run_forward(problem(GROUP), keep=True))
    backward = counted(
        "backward", lambda: operator._Backward(problem(GROUP), saved, following).run(_meta(*cells, width))
    )
    assert len(backward) == 10
    return found


def count_decoding(shape: Shape) -> Pass:
    """One token of every stream, read in place."""
    leading, width = (shape.batch, shape.heads, 1), shape.head_width
    weights = tuple(_weights(shape))
    stream = Stream(
        weights, tuple(torch.empty_like(w) for w in weights), torch.empty(shape.batch, device="meta").long()
    )
    norms = _meta(shape.heads, 1, width), _meta(shape.heads, 1, width)
    inner = Inner(*norms, _meta(shape.mini_batch_size), True, 1e-6)
    tokens = Tokens(*(_meta(*leading, width) for _ in range(3)), _meta(*leading, 1))
    with Count(matrices(shape)) as counter:
        learn_one_(tokens, stream, inner, wait=False)
    return Pass.of(counter, 1, sum(x.nbytes for x in weights))


def rows(packages: dict[str, ModuleType], *, kernels: bool) -> Iterator[Row]:
    """The whole table.

    Args:
        packages: scans by the name of the line, the last one this working tree's.
        kernels: whether to count the Triton kernels too.
    """
    for shape in (*SHAPES, LINEAR):
        for by, package in packages.items():
            for name, one in count(package, shape).items():
                yield Row(shape.name, by, name, told(shape), one)
        if kernels:
            from launches_triton import count_triton

            for name, one in count_triton(shape).items():
                yield Row(shape.name, "triton", name, told(shape), one)
        if shape.causal and shape.mini_batch_size > 1 and shape.layer_type == "mlp":
            yield Row(shape.name, "fused", "a token in place", told(shape), count_decoding(shape))


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", help="another revision to count too")
    parser.add_argument("--write", action="store_true", help="keep the table, and its numbers as JSON")
    arguments = parser.parse_args()
    if arguments.write and arguments.revision:
        parser.error("--write keeps what this working tree launches, without another revision")
    found, lines = [], [_HEAD]
    print(_HEAD)
    with tempfile.TemporaryDirectory() as folder:
        packages = {"fused": fused}
        if arguments.revision:
            packages = {arguments.revision: fused_of(arguments.revision, Path(folder)), **packages}
        for row in rows(packages, kernels=INSTALLED):
            print(row, flush=True)
            found.append({**row._asdict(), "counted": row.counted._asdict()})
            lines.append(str(row))
    if arguments.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        RESULTS.with_suffix(".md").write_text("\n".join([_TITLE, *lines]) + "\n", encoding="utf-8")
    return 0


_HEAD = """| scan | by | pass | launches | MB | state, of S | peak, MB |
| --- | --- | --- | ---: | ---: | ---: | ---: |"""
_TITLE = f"""# What scans launch and move

Counted without a GPU by `benchmarks/launches.py --write`, whose first lines say how; none of it says how fast a scan
is. Launches, MB and state (in sizes of the fast weights) are for one mini-batch; backward runs in groups of {GROUP},
which it computes again. What several programs of a Triton kernel load is counted for each, as if no cache helped.
"""


if __name__ == "__main__":
    sys.exit(main())
