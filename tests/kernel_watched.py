"""What Triton's interpreter does not notice of kernels: where programs read and write, and of what products are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy
import numpy.typing
import pytest
from torch import Tensor
from triton.runtime import interpreter

Addresses = numpy.typing.NDArray[numpy.uint64]


class Places:
    """Addresses that programs may touch, and those that the running one has touched since its last barrier."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.read: list[tuple[tuple[int, ...], Addresses]] = []
        self.written: list[Addresses] = []

    def take(self, arguments: Iterator[Any]) -> None:
        """Let a launch touch its tensors: from the first number of each to its last."""
        tensors = [x for x in arguments if isinstance(x, Tensor) and x.numel()]
        self.spans = [(x.data_ptr(), x.data_ptr() + x.element_size() * _last(x)) for x in tensors]

    def check(self, pointers: Any, mask: Any, *, write: bool) -> None:
        """Whether an access stays inside the tensors, and needs no barrier before it."""
        touched = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape)].ravel()
        inside = numpy.zeros(touched.shape, bool)
        for first, last in self.spans:
            inside |= (touched >= first) & (touched <= last)
        assert inside.all(), "a program reads or writes what is no tensor of its launch"
        if write:
            # In a tile of the same shape each number belongs to the same thread, which has read it itself.
            others = [read for shape, read in self.read if shape != pointers.data.shape]
            assert not _meet(touched, others), "what other threads may not have read yet is written over"
            self.written.append(touched)
        else:
            assert not _meet(touched, self.written), "what other threads may not have written yet is read"
            self.read.append((pointers.data.shape, touched))

    def wait(self) -> None:
        """At a barrier, and where a program begins."""
        self.read, self.written = [], []


def _last(x: Tensor) -> int:
    """How many numbers after the first of a tensor its last lies."""
    return sum(stride * (count - 1) for stride, count in zip(x.stride(), x.shape, strict=True))


def _meet(touched: Addresses, before: list[Addresses]) -> bool:
    return any(numpy.isin(touched, other).any() for other in before)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fail where a program leaves the tensors of its launch, or a thread does not wait for another.

    What a program's thread stores, another sees behind a barrier alone; the interpreter has one thread.
    """
    places = Places()
    builder = interpreter.InterpreterBuilder
    run, begin = interpreter.InterpretedFunction.run, builder.set_grid_idx
    load, store, wait = builder.create_masked_load, builder.create_masked_store, builder.create_barrier

    def running(kernel: Any, *arguments: Any, **settings: Any) -> None:
        places.take(iter((*arguments, *settings.values())))
        run(kernel, *arguments, **settings)

    def beginning(self: Any, *index: int) -> None:
        places.wait()
        begin(self, *index)

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        places.check(pointers, mask, write=False)
        return load(self, pointers, mask, *rest)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        places.check(pointers, mask, write=True)
        return store(self, pointers, value, mask, *rest)

    def waiting(self: Any) -> Any:
        places.wait()
        return wait(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", running)
        patch.setattr(builder, "set_grid_idx", beginning)
        patch.setattr(builder, "create_masked_load", loading)
        patch.setattr(builder, "create_masked_store", storing)
        patch.setattr(builder, "create_barrier", waiting)
        yield


@contextlib.contextmanager
def products() -> Iterator[list[tuple[str, bool]]]:
    """Of each product of a launch: the precision that the device is asked for, and whether both operands are bfloat16.

    In bfloat16 itself, or rounded to it, as in the interpreter; an operand of zeros is both.
    """
    found: list[tuple[str, bool]] = []
    builder = interpreter.InterpreterBuilder
    right = builder.create_dot

    def noting(self: Any, a: Any, b: Any, start: Any, precision: Any, most: Any) -> Any:
        found.append((precision.name, _is_rounded(a.data) and _is_rounded(b.data)))
        return right(self, a, b, start, precision, most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", noting)
        yield found


def _is_rounded(x: Any) -> bool:
    single = x.astype(numpy.float32)
    return bool((single == x).all() and not (single.view(numpy.uint32) & 0xFFFF).any())
