"""Large pages for the memory that mini-batches keep, where Linux has them.

A group keeps tens of megabytes, and group size 0 hundreds. Memory of that size comes fresh from the kernel each time,
which clears it page by page of 4 KiB when it is first written: at mini-batches of one token that took a third of a
training pass. With 2 MiB at a time it takes a few hundredths. PyTorch does the same for all its memory if the
environment variable `THP_MEM_ALLOC_ENABLE` is set before the first large tensor: whoever starts the process may.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable

from torch import Tensor

LARGE = 1 << 21
"""Bytes of a large page on x86-64, and on ARM with pages of 4 KiB."""


def in_large_pages(tensors: Iterable[Tensor]) -> None:
    """Ask Linux to back whole large pages of the tensors' memory by such.

    It is advice: the kernel may not follow it, or not have them. On other systems and devices nothing happens.
    """
    advise = _advise()
    if advise is None:
        return
    for x in tensors:
        if x.device.type != "cpu" or x.nbytes < LARGE:
            continue
        start = -(-x.data_ptr() // LARGE) * LARGE
        end = (x.data_ptr() + x.nbytes) // LARGE * LARGE
        if start < end:
            advise(start, end - start, mmap.MADV_HUGEPAGE)


@functools.cache
def _advise() -> Callable[..., int] | None:
    """The C library's `madvise`, or None where there is none with large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found
