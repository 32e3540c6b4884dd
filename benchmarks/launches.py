"""Kernels that the fused scan launches on a GPU, and the bytes they move: counted on the device `meta`, without one.

    python benchmarks/launches.py            # this working tree
    python benchmarks/launches.py 265967d    # and another revision before it

Every operation of PyTorch that is no view and no allocation counts as one launch; a product that first copies its base
into another result counts as two. Bytes are those of the tensors that an operation reads and writes, of each once;
`state` are those of matrices of fast weights among them, in multiples of S, the fast weights of all heads and rows. The
scan chooses its chunks as on a GPU. Nothing here ran on one: caches, and kernels that a library splits, are not seen.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from contenders import Shape
from revisions import fused_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt.ops import fused
from ttt.ops.decode import learn_one_
from ttt.ops.minibatch import Inner, Stream
from ttt.ops.rows import Tokens

SHAPES = (
    Shape("Moshi, B 1", "mlp", 4096, 32, 16, tokens=176),
    Shape("Moshi, B 16", "mlp", 4096, 32, 16, tokens=176, batch=16),
    Shape("Moshi, C 1, B 1", "mlp", 4096, 32, 1, tokens=32),
    Shape("Video-DiT", "mlp", 3072, 48, 64, tokens=2048, causal=False),
)
GROUP = 16
_COPIES_BASE = (torch.ops.aten.baddbmm.out, torch.ops.aten.baddbmm.default)


class Count(TorchDispatchMode):
    """Counts what runs inside it.

    Args:
        matrices: `[in, out]` of the fast weights, as they may be laid out.
    """

    def __init__(self, matrices: set[tuple[int, int]]) -> None:
        super().__init__()
        self.matrices = matrices
        self.launches = self.bytes = self.state_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in func._schema.name:
            self._count(func, args, kwargs, found)
        return found

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
    """One pass over all mini-batches, each number for one of them."""

    launches: float
    bytes: float
    states: float
    """Of S."""

    @classmethod
    def of(cls, count: Count, steps: int, state: int) -> Pass:
        """The means."""
        return cls(count.launches / steps, count.bytes / steps, count.state_bytes / steps / state)

    def cells(self, shape: Shape) -> str:
        """For the table; where tokens of a mini-batch are as many as a width, they cannot be told from weights."""
        told = shape.mini_batch_size not in shape.widths and 2 * shape.mini_batch_size not in shape.widths
        states = f"{self.states:.2f}" if told else "not told"
        return f"{self.launches:,.1f} | {self.bytes / 2**20:,.1f} | {states}"


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _weights(shape: Shape) -> list[Tensor]:
    pairs = itertools.pairwise(shape.widths)
    leading = shape.batch, shape.heads
    return [_meta(*leading, *sizes) for a, b in pairs for sizes in ((a, b), (1, b))]


def _matrices(shape: Shape) -> set[tuple[int, int]]:
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
        with Count(_matrices(shape)) as counter:
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
    with Count(_matrices(shape)) as counter:
        learn_one_(tokens, stream, inner)
    return Pass.of(counter, 1, sum(x.nbytes for x in weights))


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", help="another revision to count too")
    arguments = parser.parse_args()
    print(f"Each number for one mini-batch; backward in groups of {GROUP}, which it recomputes.\n")
    print("| scan | revision | pass | launches | MB | state, of S |\n|" + " --- |" * 6)
    with tempfile.TemporaryDirectory() as folder:
        packages = {"this": fused}
        if arguments.revision:
            packages = {arguments.revision: fused_of(arguments.revision, Path(folder)), **packages}
        for shape in SHAPES:
            for revision, package in packages.items():
                for name, one in count(package, shape).items():
                    print(f"| {shape.name} | {revision} | {name} | {one.cells(shape)} |", flush=True)
            if shape.causal and shape.mini_batch_size > 1:
                print(f"| {shape.name} | this | a token in place | {count_decoding(shape).cells(shape)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
