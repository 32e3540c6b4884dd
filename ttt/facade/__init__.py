"""A model with TTT in the manner of PEFT: wrapped, trained, saved, loaded, and unwrapped again in Python.

    wrapping.py       `get_ttt_model`: TTT goes in, everything else is frozen
    model.py          `TTTModel`: what such a model can do beside what its own class can
    recognising.py    where the sites of a model come from
    attached.py       what a model with TTT remembers of itself
    injecting.py      TTT put into a model whose own parameters are frozen
    counting.py       how many parameters are trained, and whose they are
    saving.py         the files of a model with TTT
    loading.py        reading them again

The model stays what it is: an instance of a subclass of its own class, whose parameters keep their names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt.facade.model import TTTModel
    from ttt.facade.wrapping import get_ttt_model

__all__ = ["TTTModel", "get_ttt_model"]

_EXPORTS = {"TTTModel": "ttt.facade.model", "get_ttt_model": "ttt.facade.wrapping"}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ttt.facade' has no attribute {name!r}")
