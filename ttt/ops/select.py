"""Chooses which implementation of the inner learning runs; no other place decides it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal, get_args

import torch

from ttt.ops.constants import SMALL, VARIABLE

Implementation = Literal["reference", "generic", "fused"]
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


def implementation(
    *, device_type: str, dtypes: Iterable[torch.dtype], mini_batches: int | None = None, numbers: int = 0
) -> Implementation:
    """The implementation that runs: the one that `TTT_OPS` names, else the fastest that can run.

    | | what it is | types | second derivatives | chosen |
    | --- | --- | --- | --- | --- |
    | `fused` | one operation with its backward by hand | float32, float64; one for all | no | for the scan |
    | `generic` | `ttt.scan` over the dual form, by autograd | any | with group size 0 | for the rest |
    | `reference` | token by token, from the definition | any | yes | never |

    Each runs every inner model, causal or not, and open mini-batches, on any device.

    Args:
        device_type: `cpu`, `cuda`, …
        dtypes: types of tokens and fast weights.
        mini_batches: how many are scanned; None for one that may be open on either side and runs outside the scan.
        numbers: how many numbers the widest tensor of one mini-batch has, `B · H · C · width`.

    Raises:
        ValueError: `TTT_OPS` names no implementation, or `fused` for types that it cannot run in.
    """
    found = {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
    runs_fused = len(found) == 1 and all(dtype in FUSED_DTYPES for dtype in found.values())
    forced = forced_implementation()
    if forced == "fused" and not runs_fused:
        raise ValueError(
            f"{VARIABLE}=fused needs tokens and fast weights of one type, float32 or float64, not "
            f"{' and '.join(sorted(found))}; write generic, or unset it"
        )
    if forced is not None:
        return forced
    small = mini_batches is None and device_type == "cpu" and numbers < SMALL
    return "fused" if runs_fused and not small else "generic"
