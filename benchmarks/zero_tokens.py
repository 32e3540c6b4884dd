"""What a stretch of zero tokens does to a layer's gradient: nothing.

Padding and dropped text are tokens of zeros, and where biases are zero, as they are before the first step, such a
token has no direction: every norm of the layer divides by what ε alone keeps from being 0. A layer at its start reads
a sequence with a stretch of zeros, and the same sequence without it. The loss is of the tokens that are not zero.
Whole mini-batches are zero, so that those of the others are the same. Of nothing but zeros the gradient is to be
finite; there the loss is of them.

    python benchmarks/zero_tokens.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ttt.config import TTTConfig
from ttt.layer import TTTLayer

DIM, HEADS, SIZE, LENGTH = 64, 2, 16, 128
MOST = 0.10
"""How far the gradient's norm may be from what it is without zeros."""
PRESETS: dict[str, dict[str, Any]] = {
    "lm": {},
    "video": {"preset": "video"},
    "moshi": {
        "qkvo_bias": True, "normalize_qk": True, "normalize_target": True, "learnable_token_idx": False,
        "input_norm": "rms",
    },
}  # fmt: skip
TYPES = (torch.float32, torch.bfloat16, torch.float16)
STRETCHES: dict[str, slice] = {
    "text": slice(0, 3 * SIZE),
    "middle": slice(3 * SIZE, 5 * SIZE),
    "padding": slice(LENGTH - 3 * SIZE, LENGTH),
    "all": slice(0, LENGTH),
}


class Measured(NamedTuple):
    """Norms of the gradient of all parameters."""

    preset: str
    layer_type: str
    dtype: torch.dtype
    stretch: str
    zeros: float
    without: float

    @property
    def away(self) -> float:
        """The difference as a share; of nothing but zeros there is nothing to compare with."""
        return 0.0 if self.stretch == "all" else abs(self.zeros / self.without - 1)

    @property
    def holds(self) -> bool:
        """Whether the gradient is finite and as without zeros."""
        return self.zeros < float("inf") and self.away <= MOST


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient_norm(settings: dict[str, Any], dtype: torch.dtype, zeros: slice, *, cut: bool) -> float:
    """The norm of the gradient of all parameters of a fresh layer over `LENGTH` tokens.

    Args:
        settings: of the layer.
        dtype: of the tokens.
        zeros: which of them are zero.
        cut: leave those out instead.
    """
    layer = TTTLayer(DIM, HEADS, TTTConfig.model_validate({"mini_batch_size": SIZE, **settings}))
    layer.reset_parameters(torch.Generator().manual_seed(0))
    kept = torch.ones(LENGTH, dtype=torch.bool)
    kept[zeros] = False
    there = kept if cut else torch.ones_like(kept)
    x, weights = _normal(1, 1, LENGTH, DIM) * kept[:, None], _normal(2, 1, LENGTH, DIM) / DIM
    if kept.any():
        weights *= kept[:, None] / kept.sum()
    angles = _normal(3, 1, 1, LENGTH, DIM // HEADS // 2)[:, :, there]
    rotary = (angles.cos(), angles.sin()) if layer.config.rope == "backbone" else None
    y, _ = layer(x[:, there].to(dtype), rotary=rotary)
    (y.float() * weights[:, there]).sum().backward()
    return torch.stack([p.grad.norm() for p in layer.parameters() if p.grad is not None]).norm().item()


def measure(types: tuple[torch.dtype, ...] = TYPES) -> Iterator[Measured]:
    """Every preset, inner model, type and stretch."""
    for preset, settings in PRESETS.items():
        for layer_type in ("linear", "mlp"):
            for dtype in types:
                of = {"layer_type": layer_type, **settings}
                for stretch, zeros in STRETCHES.items():
                    without = 0.0 if stretch == "all" else gradient_norm(of, dtype, zeros, cut=True)
                    yield Measured(
                        preset, layer_type, dtype, stretch, gradient_norm(of, dtype, zeros, cut=False), without
                    )


def main() -> int:
    """Print the table; 1 if a row does not hold."""
    table = Table("preset", "inner model", "tokens", "zeros", "norm with them", "without", "away", box=None)
    found = list(measure())
    for row in found:
        compared = ("", "") if row.stretch == "all" else (f"{row.without:.4g}", f"{row.away:.2%}")
        kind = str(row.dtype).removeprefix("torch.")
        mark = "" if row.holds else " ✗"
        table.add_row(
            row.preset, row.layer_type, kind, row.stretch, f"{row.zeros:.4g}", *compared[:1], compared[1] + mark
        )
    Console().print(table)
    return 0 if all(row.holds for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
