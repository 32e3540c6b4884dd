"""Chooses which implementation of the inner learning runs; no other place decides it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch

from ttt.ops.constants import SMALL, VARIABLE
from ttt.ops.triton.available import obstacle

Implementation = Literal["reference", "generic", "fused", "triton"]
PORTABLE: tuple[Implementation, ...] = ("reference", "generic", "fused")
"""Those that run on every device, for every inner model."""
FUSED_DTYPES = (torch.float32, torch.float64)


def forced_implementation() -> Implementation | None:
    """The implementation that the environment variable `TTT_OPS` names; None if it is not set or empty.

    Raises:
        ValueError: it names no implementation.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    for known in get_args(Implementation):
        if name == known:
            return known
    raise ValueError(
        f"{VARIABLE}={name} is not an implementation; write {', '.join(get_args(Implementation))}, or unset it"
    )


class CannotRunError(ValueError):
    """The implementation that `TTT_OPS` names cannot run here."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}; {fix}")
        self.problem, self.fix = problem, fix


def implementation(
    *,
    device_type: str,
    dtypes: Iterable[torch.dtype],
    mini_batches: int | None = None,
    numbers: int = 0,
    widths: Sequence[int] | None = None,
    size: int | None = None,
) -> Implementation:
    """The implementation that runs: the one that `TTT_OPS` names, else the fastest that can run.

    | | what it is | types | second derivatives | chosen |
    | --- | --- | --- | --- | --- |
    | `triton` | kernels in Triton | float32; float64 in the interpreter | no | never |
    | `fused` | one operation with its backward by hand | float32, float64; one for all | no | for the scan |
    | `generic` | `ttt.scan` over the dual form, by autograd | any | with group size 0 | for the rest |
    | `reference` | token by token, from the definition | any | yes | never |

    Each runs causal updates and others, and open mini-batches. `triton` needs Triton and a GPU, or its interpreter, and
    has kernels for some widths (`ttt.ops.triton.available`); the others run every inner model on any device.
    `triton` is never chosen by itself, because it has not been compared with the others on a GPU.

    Args:
        device_type: `cpu`, `cuda`, …
        dtypes: types of tokens and fast weights.
        mini_batches: how many are scanned; None for one that may be open on either side and runs outside the scan.
        numbers: how many numbers the widest tensor of one mini-batch has, `B · H · C · width`.
        widths: the inner model's input width, then the output width of each layer; None if it is not known.
        size: tokens of a mini-batch, C; None if it is not known.

    Raises:
        ValueError: `TTT_OPS` names no implementation.
        CannotRunError: it names one that cannot run here.
    """
    dtypes = set(dtypes)
    found = {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
    runs_fused = len(found) == 1 and all(dtype in FUSED_DTYPES for dtype in found.values())
    forced = forced_implementation()
    if forced == "fused" and not runs_fused:
        names = " and ".join(sorted(found))
        raise CannotRunError(
            f"{VARIABLE}=fused needs tokens and fast weights of one type, float32 or float64, not {names}",
            "write generic, or unset it",
        )
    why = obstacle(device_type=device_type, dtypes=dtypes, widths=widths, size=size) if forced == "triton" else None
    if why is not None:
        raise CannotRunError(f"{VARIABLE}=triton {why}", "write another implementation, or unset it")
    if forced is not None:
        return forced
    small = mini_batches is None and device_type == "cpu" and numbers < SMALL
    return "fused" if runs_fused and not small else "generic"
