"""A recorder for the CPU that behaves as a CUDA graph: `ttt.ops.replay` is tested with it.

What it records are PyTorch's operations with the very tensors that they read and wrote. A replay runs them again on
that memory, and no Python. Before, all memory that the recorded function allocated is overwritten, as that of a graph
is by whatever else uses its pool: so a result that was handed out instead of a copy changes, and so does whatever was
recorded but is not computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt.ops.replay import Replay


class _Tape(TorchDispatchMode):
    """Keeps each operation, its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.allocated: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        fresh = [x for x in made if _address(x) not in given]
        for x in fresh:
            self.allocated[_address(x)] = x
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if writes or (fresh and "empty" not in func._schema.name):  # a view launches nothing
            self.operations.append((func, args, kwargs, [] if writes else made))
        return found


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class RecordedOperations:
    """Records on the CPU.

    Args:
        failing: what recording raises, as on a device that cannot.
    """

    def __init__(self, failing: Exception | None = None) -> None:
        self.failing = failing
        self.operations: list[int] = []
        """How many operations each recording has."""

    def records(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def in_turn(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def record(self, function: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[Replay, Sequence[Tensor]]:
        with _Tape() as tape:
            results = function()
        if self.failing is not None:
            raise self.failing
        self.operations.append(len(tape.operations))

        def replay() -> None:
            own = tuple(tape.allocated.values())
            # Autograd does not see what a graph writes: it would refuse a tensor that has changed since it was saved.
            with torch.autograd._unsafe_preserve_version_counter(own):
                for x in own:
                    _overwrite(x)
                for func, args, kwargs, made in tape.operations:
                    again = func(*args, **kwargs)
                    for mine, theirs in zip(made, tree_leaves(again), strict=False):
                        mine.copy_(theirs)

        return replay, results


def _overwrite(x: Tensor) -> None:
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    whole.fill_(torch.nan if x.is_floating_point() else 1)
