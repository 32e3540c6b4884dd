"""Autocast around arithmetic that chooses its own types: switched off, or set as it was in an earlier pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context that switches autocast off for the device of `x`; it does nothing if autocast is off already."""
    kind = x.device.type
    # Not by `is_autocast_available`, which `torch.compile` of torch 2.11 cannot trace; `meta` alone has none.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class AutocastState:
    """The autocast settings at the time it is made, to be restored when the same code runs again.

    The cache of casts stays off: a cast that one run caches under `no_grad` must not be reused by a run that needs it
    differentiable.
    """

    def __init__(self, device_type: str) -> None:
        known = device_type != "cpu" and torch.amp.is_autocast_available(device_type)  # `meta` has none
        self.device_types = (device_type, "cpu") if known else ("cpu",)
        self.settings = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self.device_types
        ]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which the settings hold again."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.settings:
                # Even if autocast is off, its constructor warns about a type that it does not support.
                keywords = {"dtype": dtype} if enabled else {}
                stack.enter_context(torch.autocast(kind, enabled=enabled, cache_enabled=False, **keywords))
            yield
