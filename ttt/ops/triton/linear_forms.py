"""The forms in which the linear inner model's kernels are shipped."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import torch

from ttt.ops.constants import Precision
from ttt.ops.triton.forms import Form
from ttt.ops.triton.linear import launch_of, linear_forward_kernel, rows_of
from ttt.ops.triton.linear_backward import BLOCK, linear_backward_kernel

_COUNTS = frozenset(
    (*(f"{x}_{axis}" for x in ("rate", "d_answers") for axis in "bht"), "last_n", "last_b", "heads", "steps", "length",
     "openings", "group")
)  # fmt: skip
_SPACED = frozenset(f"{x}_{axis}" for x in ("q", "k", "target") for axis in "bht")
"""Strides, which are multiples of 16 as F is."""
_UNALIGNED = frozenset(("rate", "scale", "last", "d_rate", "d_scale", "d_pushes"))
_SPILLED: dict[tuple[str, int, str], int | dict[int, int]] = {
    ("forward", 64, "ieee"): 128, ("forward", 128, "ieee"): 15_872,
    ("forward", 64, "tf32"): {80: 768}, ("forward", 64, "bf16"): {80: 512},
    ("forward", 128, "tf32"): {80: 28_928, 90: 64, 100: 128}, ("forward", 128, "bf16"): {80: 19_968, 90: 128, 100: 192},
    ("backward", 128, "ieee"): 512, ("backward", 128, "tf32"): 512, ("backward", 128, "bf16"): 512,
    ("backward", 64, "tf32"): 128, ("backward", 64, "bf16"): 128,
}  # fmt: skip
"""Bytes that a thread may spill, by F and precision.

Forward in `ieee` has no matrix unit, so that a thread gathers the whole inner width of both factors, for which W in
registers leaves no room. Nor does it in the layouts of an A100's matrix unit: there F 128 is slow. In backward ten
tiles `[ROWS,F]` live at a time.
"""
_SIZES = ((64, 1, False), (64, 16, True), (64, 16, False), (128, 1, False), (128, 16, True), (128, 16, False))
"""F, C and whether the update is causal; for one token it is the same either way."""


def forms() -> list[Form]:
    """Every configuration of both kernels that is shipped."""
    found = []
    for (width, size, causal), precision in itertools.product(_SIZES, get_args(Precision)):
        name = f"F {width}, C {size}, {'causal' if causal else 'non-causal'}, {precision}"
        constants = {
            "C": size, "ROWS": rows_of(size), "F": width, "EPS": 1e-6, "CAUSAL": causal, "CLOSES": True,
            "OPENED": False, "PRECISION": precision,
        }  # fmt: skip
        forward = {**constants, "ANSWERS": True, "KEEPS": True}
        backward = {**constants, "LEAST": 4 * torch.finfo(torch.float32).eps, "BLOCK": BLOCK}
        found.append(_form("forward", name, linear_forward_kernel, forward))
        found.append(_form("backward", name, linear_backward_kernel, backward))
    return found


def _form(way: str, name: str, kernel: Any, constants: dict[str, Any]) -> Form:
    given = [argument for argument in kernel.arg_names if argument not in constants]
    signature = {argument: "i32" if argument in _COUNTS | _SPACED else "*fp32" for argument in given}
    width, precision = constants["F"], constants["PRECISION"]
    return Form(
        f"linear {way}, {name}", kernel, signature, constants, **launch_of(width, constants["C"], precision,
        back=way == "backward"), spilled_bytes=_SPILLED.get((way, width, precision), 0),
        aligned=frozenset(given) - _COUNTS - _UNALIGNED,
    )  # fmt: skip
