"""The MLP's Triton kernels, in Triton's interpreter: outputs, final state and every gradient against the definition."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import quick_interpreter
from triton.runtime import interpreter

from ttt.ops.fused.layout import Problem
from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.rows import Tokens
from ttt.ops.triton import mlp_run
from ttt.ops.triton.mlp_backward import mlp_backward
from ttt.ops.triton.mlp_forward import mlp_forward

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="compares in the interpreter; benchmarks compare on a GPU"
)
Found = tuple[list[Tensor], list[Tensor]]


@pytest.fixture(autouse=True)
def new_memory_holds_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is allocated holds NaN until it is written."""
    quick_interpreter.install()
    torch.set_deterministic_debug_mode("error")  # without the compiler, which the other call imports
    yield
    torch.set_deterministic_debug_mode("default")


@dataclass
class Case:
    """A sequence and a state, of values that vary, every tensor a leaf that wants a gradient."""

    length: int
    size: int = 4
    width: int = 16
    hidden: int = 32
    batch: int = 1
    heads: int = 1
    causal: bool = True
    counts: tuple[int, ...] = ()
    """Tokens that each row has read of its open mini-batch; empty: every row begins."""
    lengths: tuple[int, ...] = ()
    """How many tokens of each row count; empty: all."""
    group_size: int = 2
    dtype: torch.dtype = torch.float64
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.length)

        def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
            return x.to(self.dtype).requires_grad_()

        rows, width, hidden = (self.batch, self.heads), self.width, self.hidden
        tokens = [normal(*rows, self.length, width) for _ in range(3)]
        rate = torch.rand(*rows, self.length, 1, generator=generator, dtype=torch.float64) / width + 0.02
        shapes = ((width, hidden), (1, hidden), (hidden, width), (1, width))
        scales = (width**-0.5, 0.2, hidden**-0.5, 0.2)
        weights = [normal(*rows, *shape, scale=scale) for shape, scale in zip(shapes, scales, strict=True)]
        summed = [normal(*rows, *shape, scale=0.1) for shape in shapes] if self.counts else []
        norms = [normal(self.heads, 1, width, scale=0.3, shift=1.0), normal(self.heads, 1, width, scale=0.3)]
        self.leaves = [
            *tokens, rate.to(self.dtype).requires_grad_(), *norms, normal(self.size, scale=0.2), *weights, *summed
        ]  # fmt: skip

    def learn(self, name: str) -> Found:
        """Outputs, final state included, and the gradients of all leaves, by one implementation."""
        q, k, target, rate, gamma, beta, offset, *state = self.leaves
        scale = 1 / torch.arange(1, self.size + 1).to(offset)
        scale = (scale + offset).clamp_min(0) if self.causal else torch.full_like(scale, 1 / self.size)
        stream = Stream(
            tuple(state[:4]), tuple(state[4:]) or None, torch.tensor(self.counts) if self.counts else None
        )  # fmt: skip
        mask = torch.arange(self.length) < torch.tensor(self.lengths)[:, None] if self.lengths else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TTT_OPS", name)
            z, end = learn(
                Tokens(q, k, target, rate), stream, Inner(gamma, beta, scale, self.causal, 1e-6),
                group_size=self.group_size, mask_BT=mask,
            )  # fmt: skip
            outputs = [z, *end.weights, *(end.gradients or ())]
            total = sum((weighed(x) for x in outputs), torch.zeros((), dtype=z.dtype))
            found = torch.autograd.grad(total, self.leaves, allow_unused=True)
        return outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(self.leaves, found, strict=True)]


def weighed(x: Tensor) -> Tensor:
    """A sum that weighs every number differently."""
    return (x * torch.linspace(0.3, 1.7, x.numel(), dtype=x.dtype).view_as(x)).sum()


def assert_near(found: Found, expected: Found, bound: float) -> None:
    for index, (a, b) in enumerate(zip(itertools.chain(*found), itertools.chain(*expected), strict=True)):
        assert a.shape == b.shape, index
        assert (a - b).norm() <= bound * b.norm(), (index, (a - b).norm() / b.norm())


CASES = {
    "3C + 2 tokens, groups of 2": Case(length=14, heads=2),
    "C + 1, no groups, the first tokens of three": Case(length=6, size=5, batch=2, group_size=0, lengths=(6, 5)),
    "groups of 1, one hidden tile": Case(length=12, hidden=16, group_size=1),
    "C tokens, groups beyond them, three hidden tiles": Case(length=4, hidden=48, group_size=16),
    "C - 1 tokens": Case(length=3),
    "one token": Case(length=1),
    "open in every row elsewhere": Case(length=8, batch=3, counts=(0, 1, 3), group_size=1),
    "one token of an open mini-batch": Case(length=1, batch=2, counts=(1, 3)),
    "not causal": Case(length=10, batch=2, causal=False),
    "not causal, masked": Case(length=7, batch=2, causal=False, lengths=(7, 2)),
    "C 1, F 64": Case(length=3, size=1, width=64, hidden=32),
    "C 16, F 128": Case(length=17, size=16, width=128, hidden=32),
    "C 64, F 64": Case(length=65, size=64, width=64, hidden=32),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_the_definitions(case: Case) -> None:
    assert_near(case.learn("triton"), case.learn("reference"), 1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_whole_hidden_widths(causal: bool) -> None:
    """4 F, as a layer has it."""
    case = Case(length=18, size=16, width=64, hidden=256, causal=causal)
    assert_near(case.learn("triton"), case.learn("reference"), 1e-12)
