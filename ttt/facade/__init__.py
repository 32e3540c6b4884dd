"""A model with TTT in the manner of PEFT: wrapped, trained, saved, loaded, and unwrapped again in Python.

    wrapping.py       `get_ttt_model`: TTT goes in, everything else is frozen
    model.py          `TTTModel`: what such a model can do beside what its own class can
    recognising.py    where the sites of a model come from
    attached.py       what a model with TTT remembers of itself
    injecting.py      TTT put into a model whose own parameters are frozen
    counting.py       how many parameters are trained, and whose they are
    options.py        what users of transformers and PEFT give to `save_pretrained`
    saving.py         the files of a model with TTT; loading.py reads them again
    card.py           the model card beside them; figures.py, what was measured
    hub.py            the hub of Hugging Face
    peft_configs.py   PEFT around a model that has TTT already

The model stays what it is: an instance of a subclass of its own class, whose parameters keep their names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt.facade.card import model_card
    from ttt.facade.model import TTTModel
    from ttt.facade.wrapping import get_ttt_model

__all__ = ["TTTModel", "get_ttt_model", "model_card"]

_EXPORTS = {
    "TTTModel": "ttt.facade.model",
    "get_ttt_model": "ttt.facade.wrapping",
    "model_card": "ttt.facade.card",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ttt.facade' has no attribute {name!r}")
