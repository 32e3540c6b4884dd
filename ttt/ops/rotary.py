"""Rotary embedding of adjacent pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, width: int, *, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `position · θ^(−2i/F)`, each `[…, F/2]`, for positions `[…]` and an even width F.

    Source: RoFormer (arXiv 2104.09864), equation 15.
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=dtype) / width
    angles = positions.to(dtype)[..., None] * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each adjacent pair `(2i, 2i+1)` of the last dimension by its angle; `x` `[…, F]`, angles `[…, F/2]`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
