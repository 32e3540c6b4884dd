"""Launches of a whole TTT layer, forward and backward, with its scans called and with them replayed as CUDA graphs.

    python benchmarks/launches_replayed.py

Counted on the device `meta`, as `launches.py` counts: nothing here ran on a GPU. A recorded pass of a scan is three
launches, its arguments copied in, its graph, its results copied out. One that is too large is called as it is
(`ttt.ops.constants.MOST_BYTES_OF_ONE`); of several scans the largest is told.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from launches import Count
from torch import Tensor

from ttt.config import TTTConfig
from ttt.layer import TTTLayer
from ttt.ops.constants import MOST_BYTES_OF_ONE
from ttt.ops.fused import operator
from ttt.ops.fused.layout import Problem
from ttt.ops.replay import _extent, _flat

OF_A_REPLAY = 3


class Shape(NamedTuple):
    """A layer and what it reads."""

    name: str
    dim: int
    heads: int
    size: int
    tokens: int
    batch: int = 1
    causal: bool = True


SHAPES = (
    Shape("Moshi, B 1", 4096, 32, 16, 188),
    Shape("Moshi, B 2", 4096, 32, 16, 188, batch=2),
    Shape("Moshi, B 16", 4096, 32, 16, 188, batch=16),
    Shape("Moshi, C 1, B 1", 4096, 32, 1, 188),
    Shape("Video-DiT, 3 s", 3072, 48, 64, 17_776, causal=False),
)


class LayerCount(Count):
    """Counts around the scans, and inside each pass of one."""

    def __init__(self) -> None:
        super().__init__(set())
        self.scans: list[int] = []
        """Launches of each."""
        self.sizes: list[int] = []
        """Bytes of the arguments and results of each."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not name.startswith("ttt::minibatches"):
            return super().__torch_dispatch__(func, types, args, kwargs)
        with Count(set()) as inside:
            if name.endswith("_backward"):
                problem, kept = Problem(*args[2:12], *args[13:]), args[12]
                found: Any = operator._run_backward(problem, kept, args[0], args[1])
            else:
                found = operator._run_forward(Problem(*args[:-1]), keep=args[-1])
        self.scans.append(inside.launches)
        self.sizes.append(sum(_extent(x) for x in (*_flat(args)[0], *_flat(found)[0])))
        return func(*args, **(kwargs or {}))

    def __str__(self) -> str:
        called = self.launches + sum(self.scans)
        recorded = [size <= MOST_BYTES_OF_ONE for size in self.sizes]
        replayed = self.launches + sum(
            OF_A_REPLAY if small else launches for small, launches in zip(recorded, self.scans, strict=True)
        )
        most = max(self.sizes) / 2**20
        return f"{called:,} | {replayed:,} | {self.launches:,} | {most:,.0f}"


def passes(shape: Shape) -> tuple[LayerCount, LayerCount]:
    """A layer's forward and its backward."""
    config = TTTConfig.model_validate(
        {
            **{"layer_type": "mlp", "mini_batch_size": shape.size, "causal": shape.causal, "normalize_qk": True},
            **{"normalize_target": True, "qkvo_bias": True, "learnable_token_idx": False},
            **{"rope": "mini_batch" if shape.causal else "none"},
        }
    )
    layer = TTTLayer(shape.dim, shape.heads, config, device="meta")
    x = torch.empty(shape.batch, shape.tokens, shape.dim, device="meta", requires_grad=True)
    with LayerCount() as forward:
        y: Tensor = layer(x)[0]
    with LayerCount() as backward:
        torch.autograd.grad(y, [x, *layer.parameters()], torch.empty_like(y), allow_unused=True)
    return forward, backward


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| TTT-MLP layer | pass | called | replayed | around the scans | MiB of a scan's arguments and results |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for shape in SHAPES:
        for name, counted in zip(("forward", "backward"), passes(shape), strict=True):
            print(f"| {shape.name} | {name} | {counted} |")


if __name__ == "__main__":
    main()
