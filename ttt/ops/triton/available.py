"""Whether the Triton kernels can run, and if not, why; imports no Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
WIDTHS = (16, 32, 64, 128)
"""The F of the linear inner model's kernels."""
LARGEST = 64
"""The largest mini-batch C of all kernels."""


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; it reads the variable as a kernel's module is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(
    *, device_type: str, dtypes: Iterable[torch.dtype], widths: Sequence[int] | None = None, size: int | None = None
) -> str | None:
    """Why the kernels cannot run, as the end of a sentence; None if they can.

    Args:
        device_type: `cpu`, `cuda`, …
        dtypes: types of tokens and fast weights.
        widths: the inner model's input width, then the output width of each layer; None if it is not known.
        size: tokens of a mini-batch, C; None if it is not known.
    """
    if not INSTALLED:
        return "needs Triton, which is not installed"
    if device_type not in ("cuda", "meta") and not (device_type == "cpu" and interpreted()):
        return (
            f"needs a GPU, not the device {device_type}; TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly"
        )
    found = set(dtypes)
    allowed = {torch.float32} if device_type == "cuda" else {torch.float32, torch.float64}
    if len(found) != 1 or not found <= allowed:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        return f"needs tokens and fast weights in float32, not {names}"
    return None if widths is None else _misfit(widths, size)


def _misfit(widths: Sequence[int], size: int | None) -> str | None:
    """Why there is no kernel for these shapes."""
    depth = len(widths) - 1
    if depth > 2:
        return f"has kernels for inner models of one or two layers, not {depth}"
    if depth == 1 and widths[0] not in WIDTHS:
        return f"has kernels of the linear inner model for heads of {', '.join(map(str, WIDTHS))}, not {widths[0]}"
    if size is not None and size > LARGEST:
        return f"has kernels for mini-batches of at most {LARGEST} tokens with heads of {widths[0]}, not {size}"
    return None
