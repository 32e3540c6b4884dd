"""Training: `train` and what it is made of. Loaded when first asked for, so that reading a run needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["TrainResult", "train"]

if TYPE_CHECKING:
    from ttt.train.loop import train
    from ttt.train.result import TrainResult


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ttt.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'ttt.train' has no attribute {name!r}")
