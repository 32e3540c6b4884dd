"""The forms in which kernels are shipped: what is compiled, for which sizes, with how many warps and stages.

A test compiles every form without a GPU and reads registers, spills and shared memory; `benchmarks/kernels.py` writes
them as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Form:
    """One specialisation of a kernel."""

    name: str
    """For people, such as `linear forward, F 64, C 16, causal`."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Triton's type of each parameter that is no constant: `*fp32`, `i32`, `fp32`, …"""
    constants: Mapping[str, Any]
    """The value of each `tl.constexpr` parameter."""
    num_warps: int = 4
    num_stages: int = 2
    spilled_bytes: int = 0
    """The most bytes a thread may spill to memory."""
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Parameters that are always multiples of 16 (pointers, strides)."""
