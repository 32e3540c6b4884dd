"""Kernels beside the definition: answers, final states and every gradient, over the product of cases; and their times.

The definition is `ttt/ops/reference.py`, token by token, in float64 on the CPU. In Triton's interpreter the kernels run
in float64 too, unless a precision rounds their operands; on a GPU in float32. What is too far there is told with how
far the definition is from itself in float32: of a few tokens the terms of gradients cancel, and that may be 2e-4.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import quick_interpreter
import torch
from pairwise import Row, covering
from torch import Tensor

from ttt.check.doctor import forced
from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.rows import Tokens
from ttt.ops.triton.available import obstacle

PAIRS = {1: (1, 1), 3: (3, 1), 32: (4, 8)}
"""B and H of each B · H."""
BOUNDS = {"float64": 1e-12, "ieee": 1e-5, "tf32": 5e-3, "bf16": 5e-2}
"""Of the largest difference, relative to the largest number of its tensor. The last two are what 11 and 8 bits of an
operand allow after a few mini-batches; they are there to find what is wrong, not to say how good it is."""


@dataclass(frozen=True)
class Case:
    """One problem."""

    kind: str
    """`linear` or `mlp`"""
    width: int
    """F"""
    size: int
    """C"""
    tokens: int
    pairs: int
    """B · H"""
    causal: bool
    opened: bool = False
    """Whether each row finds its mini-batch open, and elsewhere than the other rows."""
    precision: str = "ieee"
    group_size: int = 2
    single: bool = False
    """In float32 in the interpreter too, where it would be float64."""

    @property
    def name(self) -> str:
        """For people, and for `--only`."""
        kind = "causal" if self.causal else "non-causal"
        opened = ", opened" if self.opened else ""
        shape = f"F {self.width}, C {self.size}, T {self.tokens}, B·H {self.pairs}"
        rest = f", groups of {self.group_size}" * (self.group_size != 2) + ", float32" * self.single
        return f"{self.kind}, {shape}, {kind}{opened}, {self.precision}{rest}"


def runs(case: Case, device: str = "cuda") -> bool:
    """Whether there are kernels for these sizes; others are refused in a sentence."""
    widths = (case.width, case.width) if case.kind == "linear" else (case.width, 4 * case.width, case.width)
    device = "meta" if device == "cuda" else device  # for which there need be no GPU
    return obstacle(device_type=device, dtypes=(torch.float32,), widths=widths, size=case.size) is None


def cases(device: str = "cuda") -> Iterator[Case]:
    """The whole product, but for what no kernel takes."""
    yield from (case for case in _product_of_cases() if runs(case, device))


LENGTHS: dict[str, Callable[[int], int]] = {
    "1": lambda size: 1,
    "C - 1": lambda size: size - 1,
    "C": lambda size: size,
    "C + 1": lambda size: size + 1,
    "3C + 2": lambda size: 3 * size + 2,
}
"""T, by C."""
FACTORS: dict[str, Sequence[Any]] = {
    "kind": ("linear", "mlp"),
    "width": (64, 128),
    "size": (1, 16, 64),
    "pairs": tuple(PAIRS),
    "tokens": tuple(LENGTHS),
    "update": ("causal", "causal, opened", "non-causal"),
    "group_size": (0, 1, 2, 16),
    "numbers": ("float64", "float32", "bf16"),
}
"""What is varied in the interpreter."""


def case_of(row: Row) -> Case:
    """The case that has these values of `FACTORS`."""
    return Case(
        row["kind"],
        row["width"],
        row["size"],
        LENGTHS[row["tokens"]](row["size"]),
        row["pairs"],
        causal=row["update"] != "non-causal",
        opened=row["update"] == "causal, opened",
        precision="bf16" if row["numbers"] == "bf16" else "ieee",
        group_size=row["group_size"],
        single=row["numbers"] == "float32",
    )


def can_be(row: Row) -> bool:
    """Whether there is such a case; with C 1 no mini-batch is open, none has C − 1 tokens, and T 1 is T C."""
    if row["size"] == 1 and (row["update"] == "causal, opened" or row["tokens"] in ("1", "C - 1")):
        return False
    return runs(case_of(row), "cpu")


def cost_of(row: Row) -> float:
    """About what a case takes in the interpreter: programs, mini-batches, and a little for the size of tensors."""
    case = case_of(row)
    tiles = 1 if case.kind == "linear" else case.width // 8
    return case.pairs * tiles * (1 + -(-case.tokens // case.size)) * (1 + case.size * case.width / 8192)


def chosen_cases(strength: int) -> list[Case]:
    """Cases in which every combination of values of two (or `strength`) of `FACTORS` occurs.

    By the root of what they take: cheap ones as far as that allows, and some that are more than the least of each.
    """
    return list(map(case_of, covering(FACTORS, can_be, lambda row: cost_of(row) ** 0.5, strength)))


def _product_of_cases() -> Iterator[Case]:
    for kind, width, size, pairs, causal in itertools.product(
        ("linear", "mlp"), (64, 128), (1, 16, 64), PAIRS, (True, False)
    ):
        for tokens in dict.fromkeys((1, size - 1, size, size + 1, 3 * size + 2)):
            if tokens:
                yield Case(kind, width, size, tokens, pairs, causal)
                if causal and size > 1:
                    yield Case(kind, width, size, tokens, pairs, causal, opened=True)
        for precision in ("tf32", "bf16"):
            yield Case(kind, width, size, 2 * size + 1, pairs, causal, precision=precision)


def quick_cases() -> Iterator[Case]:
    """One of each kind, small: the answer in a minute."""
    for kind, causal in itertools.product(("linear", "mlp"), (True, False)):
        yield Case(kind, 64, 16, 50, 1, causal, opened=causal)


def first_cases() -> Iterator[Case]:
    """The whole product, the most telling first: one of every kernel, then lengths, precisions, and the rest."""
    first = [
        Case(kind, width, size, 3 * size + 2, 32, causal, precision=precision)
        for width, size, causal in ((128, 16, True), (64, 64, False), (64, 16, True), (128, 1, True))
        for precision in ("ieee", "tf32", "bf16")
        for kind in ("mlp", "linear")
    ]
    yield from filter(runs, first)
    yield from (case for case in cases() if case not in first)


# --- one case ---


class Problem:
    """A case's tensors in float64, values that vary; of a narrower dtype, those that it holds."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(0)
        batch, heads = PAIRS[case.pairs]
        shape = batch, heads, case.tokens
        q, k, target = (self._normal(*shape, case.width) for _ in range(3))
        rate = torch.rand(*shape, 1, dtype=torch.float64, generator=self.generator) / case.width
        widths = (case.width, case.width) if case.kind == "linear" else (case.width, 4 * case.width, case.width)
        weights = [
            self._normal(batch, heads, rows, columns) / inside**0.5
            for inside, columns in itertools.pairwise(widths)
            for rows in (inside, 1)
        ]
        gamma, beta = 1 + 0.2 * self._normal(heads, 1, case.width), 0.2 * self._normal(heads, 1, case.width)
        scale = 1 / torch.arange(1, case.size + 1, dtype=torch.float64) if case.causal else None
        scale = torch.full((case.size,), 1 / case.size, dtype=torch.float64) if scale is None else 1.1 * scale
        before = [0.1 * self._normal(*w.shape) for w in weights] if case.opened else []
        self.count = torch.arange(1, batch + 1) % case.size if case.opened else None
        self.inputs = [x.to(dtype).double() for x in (q, k, target, rate, gamma, beta, scale, *weights, *before)]
        self.names = ["q", "k", "target", "rate", "gamma", "beta", *(["scale"] if case.causal else [])]
        self.names += [f"{what} {i}" for what, of in (("weights", weights), ("sums", before)) for i in range(len(of))]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def run(self, implementation: str, device: str, dtype: torch.dtype, *, exactly: bool = False) -> dict[str, Tensor]:
        """Answers, final state and every gradient, on the CPU in float64; exactly, or in the case's precision."""
        answer, inputs = self.prepared(implementation, device, dtype, "ieee" if exactly else self.case.precision)
        z, after = answer()
        ends = {f"final weights {i}": w for i, w in enumerate(after.weights)}
        ends |= {f"final sums {i}": g for i, g in enumerate(after.gradients or ())}
        results = {"answers": z, **ends}
        loss = torch.zeros((), dtype=dtype, device=device)
        for value in results.values():
            loss = loss + (value * _weight(value)).sum()
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        for name, gradient, given in zip(self.names, gradients, inputs, strict=True):
            results[f"gradient of {name}"] = torch.zeros_like(given) if gradient is None else gradient
        return {name: value.detach().cpu().double() for name, value in results.items()}

    def prepared(
        self, implementation: str, device: str, dtype: torch.dtype, precision: str
    ) -> tuple[Callable[[], tuple[Tensor, Stream]], list[Tensor]]:
        """A forward pass that is ready to run, and its inputs, which want gradients."""
        case = self.case
        moved = [x.to(device, dtype) for x in self.inputs]
        q, k, target, rate, gamma, beta, scale, *rest = moved
        # A non-causal step is 1/C by definition.
        inputs = [x.requires_grad_() for x in moved if case.causal or x is not scale]
        half = len(rest) // 2 if case.opened else len(rest)
        before = tuple(rest[half:]) or None
        count = None if self.count is None else self.count.to(device)
        inner = Inner(gamma, beta, scale, case.causal, 1e-6, precision)  # type: ignore[arg-type]

        def answer() -> tuple[Tensor, Stream]:
            stream = Stream(tuple(rest[:half]), before, count)
            with forced(implementation):
                return learn(Tokens(q, k, target, rate), stream, inner, group_size=case.group_size)

        return answer, inputs


def _weight(value: Tensor) -> Tensor:
    """How much the loss makes of each number of a result."""
    return torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).view_as(value)


def differences(
    case: Case, implementation: str, device: str, dtype: torch.dtype, *, against: str = "reference"
) -> dict[str, float]:
    """How far an implementation's tensors are from the definition's, relative to the largest number of each.

    Both get the same numbers, those that `dtype` holds. Where operands are rounded, gradients of rates and step sizes
    are measured by the terms that they sum: of few tokens they are few numbers, in each of which thousands of terms of
    both signs nearly cancel while their roundings do not.

    Args:
        case: the problem.
        implementation: what is compared.
        device: where it runs.
        dtype: in which it runs.
        against: what stands for the definition, in float64; `reference` runs on the CPU, another on the device.

    Raises:
        AssertionError: the two do not give the same tensors.
    """
    problem = Problem(case, dtype)
    expected = problem.run(against, "cpu" if against == "reference" else device, torch.float64, exactly=True)
    found = problem.run(implementation, device, dtype)
    assert expected.keys() == found.keys(), (sorted(expected), sorted(found))
    largest = {name: float(value.abs().max()) for name, value in expected.items()}
    if case.causal and case.precision != "ieee":
        for name, terms in _terms(problem, expected).items():
            largest[name] = max(largest[name], terms)
    return {name: float((found[name] - value).abs().max()) / (largest[name] or 1.0) for name, value in expected.items()}


def _terms(problem: Problem, results: dict[str, Tensor]) -> dict[str, float]:
    """What the loss of the final weights adds to gradients of rates and of `s_C`, if no two of its terms cancelled.

    Weights change by `s_C · Σ rate · …` over the tokens. So that loss adds `Σ weight · change / s_C` to the one, and to
    the largest of the others no less than the terms of all over the sum of all rates.
    """
    given = {name: x.detach().cpu().double() for name, x in zip(problem.names, problem.inputs, strict=True)}
    changes = [results[f"final {name}"] - x for name, x in given.items() if name.startswith("weights")]
    total = sum(float((change.abs() * _weight(change)).sum()) for change in changes)
    return {
        "gradient of scale": total / float(given["scale"][-1]),
        "gradient of rate": total / float(given["rate"].sum()),
    }


def bound_of(case: Case, dtype: torch.dtype) -> float:
    """How far is too far."""
    return BOUNDS["float64" if dtype == torch.float64 and case.precision != "bf16" else case.precision]


# --- times ---


def times(case: Case, implementation: str, repeats: int = 20) -> dict[str, float]:
    """Median milliseconds on the GPU of a forward pass without gradients, and of forward and backward."""
    answer, inputs = Problem(case).prepared(implementation, "cuda", torch.float32, case.precision)

    def both() -> None:
        z, _ = answer()
        torch.autograd.grad(z.sum(), inputs, allow_unused=True)

    return {
        "forward": milliseconds(torch.no_grad()(answer), repeats),
        "forward and backward": milliseconds(both, repeats),
    }


def milliseconds(function: Callable[[], Any], repeats: int, device: str = "cuda") -> float:
    """The median of some calls, by CUDA's events, after three that do not count. On a CPU, of one call by the clock."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(3):
        function()
    found = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        function()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last))
    return statistics.median(found)


# --- all of it ---


def row_of(case: Case, implementation: str, device: str, *, against: str = "reference") -> dict[str, Any]:
    """A case compared, and timed beside the fused scan if there is a GPU; what fails is told, not raised."""
    dtype = torch.float64 if device == "cpu" and not case.single else torch.float32
    row: dict[str, Any] = {"case": case.name, **asdict(case), "agrees": False}
    try:
        with _nan_in_new_memory():
            far = differences(case, implementation, device, dtype, against=against)
        worst = max(far, key=lambda name: far[name] if far[name] == far[name] else float("inf"))
        row |= {"difference": far[worst], "of": worst, "bound": bound_of(case, dtype)}
        row["agrees"] = far[worst] <= row["bound"]
        if not row["agrees"] and dtype == torch.float32:
            row["definition"] = differences(case, "reference", "cpu", dtype)[worst]
        if device != "cpu" and row["agrees"]:
            row["milliseconds"] = {name: times(case, name) for name in ("fused", implementation)}
    except Exception as error:  # the next form may run where this one does not
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return row


@contextlib.contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """What is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def compare_and_time(arguments: argparse.Namespace, device: str) -> int:
    """Compare every case, then time it if there is a GPU; how many are too far."""
    rows: list[dict[str, Any]] = []
    for row in _rows(list(_chosen(arguments, device)), arguments.implementation, device):
        rows.append(row)
        said = row.get("error") or f"{row['difference']:.1e} ({row['of']})"
        if "definition" in row:
            said += f"; the definition in float32 is {row['definition']:.1e} away"
        print(f"{'ok   ' if row['agrees'] else 'WRONG'} {row['case']}: {said}", flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    wrong = sum(not row["agrees"] for row in rows)
    print(f"{len(rows)} cases, {wrong} too far")
    return wrong


def _chosen(arguments: argparse.Namespace, device: str) -> Iterator[Case]:
    """What is compared: on a GPU the whole product, in the interpreter a part of it that has every pair of values."""
    chosen: Iterable[Case] = cases(device) if arguments.all or device != "cpu" else chosen_cases(arguments.strength)
    for case in quick_cases() if arguments.quick else chosen:
        if arguments.only in case.name and not (device == "cpu" and case.precision == "tf32"):
            yield case  # the interpreter does not round to TF32


def _rows(chosen: Sequence[Case], implementation: str, device: str) -> Iterator[dict[str, Any]]:
    """Their rows, in order; the interpreter's by as many processes as there are cores."""
    if device != "cpu":
        yield from (row_of(case, implementation, device) for case in chosen)
        return
    # Spawned: a fork beside PyTorch's threads would wait for ever.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _begin_interpreting) as processes:
        yield from processes.map(row_of, chosen, itertools.repeat(implementation), itertools.repeat(device))


def _begin_interpreting() -> None:
    torch.set_num_threads(1)
    quick_interpreter.install()
