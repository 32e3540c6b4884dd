"""TTT in the causal language models of Hugging Face's `transformers`, whatever their architecture.

    structure.py      a model's decoder layers, found from its structure
    passes.py         one forward pass: which tokens count, and which cache the layers share
    states.py         TTT states that travel with a `transformers` cache
    sites.py          the sites: after each decoder layer
    attention.py      attention limited to a window and sinks

    backbone.py       the base class of backbone plugins; options.py, its sections of a config; rules.py, its rules
    facts.py          what is known of a model before it is built
    building.py       building it; hub.py says what can go wrong when it is read
    running.py        its logits, whole and in pieces, and its loss
    documents.py      the documents in files; tokens.py, their tokens; windows.py, what training reads of them
    scoring.py        how likely it finds what it reads; clips.py, what it reads

No architecture is named here. A model whose structure is not understood is refused. `import ttt.hf` needs neither torch
nor `transformers`: they are imported when something that needs them is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt.hf.attention import limit_attention
    from ttt.hf.backbone import CausalLMBackbone
    from ttt.hf.options import CausalLMOptions, TextData
    from ttt.hf.sites import causal_lm_sites

__all__ = ["CausalLMBackbone", "CausalLMOptions", "TextData", "causal_lm_sites", "limit_attention"]

_EXPORTS = {
    "CausalLMBackbone": "ttt.hf.backbone",
    "CausalLMOptions": "ttt.hf.options",
    "TextData": "ttt.hf.options",
    "causal_lm_sites": "ttt.hf.sites",
    "limit_attention": "ttt.hf.attention",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ttt.hf' has no attribute {name!r}")
