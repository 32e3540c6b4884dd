"""Training: `train` and its parts. They are imported on first use, so that reading a run needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["TrainResult", "train"]

if TYPE_CHECKING:
    from ttt.train.result import TrainResult
    from ttt.train.start import train


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ttt.train import start

        return getattr(start, name)
    raise AttributeError(f"module 'ttt.train' has no attribute {name!r}")
