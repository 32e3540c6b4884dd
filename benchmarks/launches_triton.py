"""The same count for the Triton kernels, by Triton's interpreter on the CPU: see `launches.py`.

A scan of one head runs twice. First its kernels do not run, and what the host launches around them is counted as for
the fused scan. Then they run, and what their programs load and store is counted, number by number. The bytes are those
of one head, times heads and rows; launches do not depend on these. What several programs load is counted for each of
them, as if no cache helped.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from contenders import Shape
from kernels_launched import launches
from launches import GROUP, Count, Pass, matrices
from torch import Tensor

from ttt.ops.fused.layout import Problem
from ttt.ops.triton import operator


def count_triton(shape: Shape) -> dict[str, Pass]:
    """The passes of the kernels' scan; the steps are the shape's, at most those of a group.

    Args:
        shape: one that the kernels have forms for.
    """
    size = shape.mini_batch_size
    steps = min(shape.tokens // size, GROUP)
    one = dataclasses.replace(shape, dim=shape.head_width, heads=1, batch=1, tokens=steps * size)
    problem, d_answers, d_following = _drawn(one, steps)
    _, _, saved = operator._forward(problem, keep=True)
    passes = {
        "answers alone": lambda: operator._forward(problem, keep=False),
        "forward": lambda: operator._forward(problem, keep=True),
        "backward": lambda: operator._backward(problem, saved, d_answers, d_following),
    }
    return {name: _counted(run, one, steps, pairs=shape.batch * shape.heads) for name, run in passes.items()}


def _counted(run: Any, shape: Shape, steps: int, *, pairs: int) -> Pass:
    told = matrices(shape)
    with Count(told) as host, launches(run=False):
        run()
    with launches() as found:
        run()
    moved = state = 0
    for launch in found:
        moved += launch.moved.total()
        state += sum(count for name, count in launch.moved.items() if told & {launch.shapes[name][-2:]})
    weights = 4 * sum(a * b + b for a, b in itertools.pairwise(shape.widths))
    return Pass(
        (host.launches + len(found)) / steps,
        pairs * (host.bytes + moved) / steps,
        (host.state_bytes + state) / steps / weights,
        None,
    )


def _drawn(shape: Shape, steps: int) -> tuple[Problem, Tensor, list[Tensor]]:
    """A problem of one head with the answers' and the weights' gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) * 0.1

    cells, width = (1, 1, steps, shape.mini_batch_size), shape.head_width
    tokens = [*(normal(*cells, width) for _ in range(3)), normal(*cells, 1)]
    weights = [normal(1, 1, *sizes) for a, b in itertools.pairwise(shape.widths) for sizes in ((a, b), (1, b))]
    scale = torch.full((1, shape.mini_batch_size), 1 / shape.mini_batch_size)
    shared = normal(1, 1, width), normal(1, 1, width), scale, scale[:, -1:]
    problem = Problem(*tokens, *shared, weights, [], shape.causal, 1e-6, GROUP)
    return problem, normal(*cells, width), [normal(*w.shape) for w in weights]
