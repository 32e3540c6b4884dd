"""The forms in which the linear inner model's kernels are shipped."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import torch

from ttt.ops.constants import Precision
from ttt.ops.triton.forms import Form
from ttt.ops.triton.linear import BLOCK, LAUNCH, linear_forward_kernel, rows_of
from ttt.ops.triton.linear_backward import linear_backward_kernel
from ttt.ops.triton.linear_token import token_backward_kernel, token_forward_kernel

_COUNTS = frozenset(
    (*(f"{x}_{axis}" for x in ("rate", "d_answers") for axis in "bht"), "last_n", "last_b", "heads", "steps", "length",
     "openings", "group")
)  # fmt: skip
_SPACED = frozenset(f"{x}_{axis}" for x in ("q", "k", "target") for axis in "bht")
"""Strides, which are multiples of 16 as F is."""
_UNALIGNED = frozenset(("rate", "scale", "last", "d_rate", "d_scale", "d_pushes"))
_SPILLED: dict[tuple[str, int, int, bool], int | dict[int, int]] = {
    ("forward", 64, 1, False): 16, ("backward", 128, 1, False): 16, ("backward", 64, 16, True): 64,
    ("backward", 64, 16, False): 64, ("forward", 64, 64, True): 128, ("forward", 64, 64, False): 96,
    ("backward", 64, 64, True): 112, ("backward", 64, 64, False): 96,
    ("forward", 128, 16, True): 96, ("forward", 128, 16, False): 64,
    ("backward", 128, 16, True): {80: 96, 90: 64, 100: 208}, ("backward", 128, 16, False): 64,
    ("forward", 128, 64, True): {80: 128, 90: 128, 100: 224}, ("forward", 128, 64, False): 128,
    ("backward", 128, 64, True): {80: 192, 90: 64, 100: 224}, ("backward", 128, 64, False): 96,
}  # fmt: skip
"""Bytes that a thread may spill, by F, C and whether the update is causal.

In backward more tiles `[ROWS,F]` live at a time than a thread has registers for, beside a product's factors.
"""
_SIZES = tuple(itertools.product((64, 128), (16, 64), (True, False)))
"""F, C and whether the update is causal."""


def forms() -> list[Form]:
    """Every configuration of the kernels that is shipped."""
    found = []
    least = {"LEAST": 4 * torch.finfo(torch.float32).eps}
    for width in (64, 128):
        constants: dict[str, Any] = {"F": width, "EPS": 1e-6}
        answers = {**constants, "ANSWERS": True, "KEEPS": True}
        found.append(_form("forward", f"F {width}, C 1", token_forward_kernel, answers))
        found.append(_form("backward", f"F {width}, C 1", token_backward_kernel, {**constants, **least}))
    for (width, size, causal), precision in itertools.product(_SIZES, get_args(Precision)):
        name = f"F {width}, C {size}, {'causal' if causal else 'non-causal'}, {precision}"
        constants = {
            "C": size, "ROWS": rows_of(width, size), "F": width, "BLOCK": BLOCK, "EPS": 1e-6, "CAUSAL": causal,
            "CLOSES": True, "OPENED": False, "PRECISION": precision,
        }  # fmt: skip
        found.append(_form("forward", name, linear_forward_kernel, {**constants, "ANSWERS": True, "KEEPS": True}))
        backward = {**constants, **least, "ROWS": rows_of(width, size, back=True)}
        found.append(_form("backward", name, linear_backward_kernel, backward))
    return found


def _form(way: str, name: str, kernel: Any, constants: dict[str, Any]) -> Form:
    given = [argument for argument in kernel.arg_names if argument not in constants]
    signature = {argument: "i32" if argument in _COUNTS | _SPACED else "*fp32" for argument in given}
    spilled = _SPILLED.get((way, constants["F"], constants.get("C", 1), constants.get("CAUSAL", False)), 0)
    return Form(
        f"linear {way}, {name}", kernel, signature, constants, **LAUNCH, spilled_bytes=spilled,
        aligned=frozenset(given) - _COUNTS - _UNALIGNED,
    )  # fmt: skip
