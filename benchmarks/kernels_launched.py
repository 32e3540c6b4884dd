"""Launches of Triton kernels, recorded in Triton's interpreter: in which form, over how many programs, what they move.

On a GPU the profiler counts them (`first_gpu_stages.py`).
"""

from __future__ import annotations

import bisect
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from torch import Tensor
from triton.runtime import interpreter

_DEFAULTS = {"num_warps": 4, "num_stages": 3}
"""Triton's own, where a launch does not say."""


@dataclass
class Launch:
    """One launch of a kernel."""

    kernel: Any
    constants: dict[str, Any]
    """The values of its `tl.constexpr` parameters."""
    num_warps: int
    num_stages: int
    programs: int
    shapes: dict[str, tuple[int, ...]]
    """Of the tensors, by parameter."""
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes that programs load and store, by the parameter into whose tensor they point. What several programs load is
    counted for each: a GPU's caches may save some of that."""


@contextlib.contextmanager
def launches(*, run: bool = True) -> Iterator[list[Launch]]:
    """Record the launches of the block.

    Args:
        run: whether they run; without it they cost nothing, and what they would have written holds no numbers.
    """
    found: list[Launch] = []
    right = interpreter.InterpretedFunction.run

    def recording(kernel: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | settings
        shape = grid(named) if callable(grid) else grid
        programs = 1
        for each in shape:
            programs *= each
        chosen = {key: settings.get(key, value) for key, value in _DEFAULTS.items()}
        constants = {name: named[name] for name in _constants_of(kernel)}
        shapes = {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
        found.append(Launch(kernel, constants, **chosen, programs=programs, shapes=shapes))
        if run:
            with _moved(named, found[-1].moved):
                right(kernel, *args, grid=grid, warmup=warmup, **settings)

    interpreter.InterpretedFunction.run = recording
    try:
        yield found
    finally:
        interpreter.InterpretedFunction.run = right


def _constants_of(kernel: Any) -> list[str]:
    annotations = kernel.fn.__annotations__
    return [name for name in kernel.arg_names if "constexpr" in str(annotations.get(name, ""))]


@contextlib.contextmanager
def _moved(named: dict[str, Any], counter: Counter[str]) -> Iterator[None]:
    """Count the bytes that are loaded and stored, by parameter."""
    places = sorted((value.data_ptr(), name) for name, value in named.items() if isinstance(value, Tensor))
    starts = [start for start, _ in places]
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        if mask.data.any():
            first = int(pointers.data[mask.data].min())
            _, name = places[bisect.bisect_right(starts, first) - 1]
            counter[name] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = loading, storing
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before a kernel is imported"
