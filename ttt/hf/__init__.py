"""TTT in the causal language models of Hugging Face's `transformers`, whatever their architecture.

    structure.py      a model's decoder layers, found from its structure
    passes.py         one forward pass: which tokens count, and where the cache that its layers share stands
    masks.py          which tokens count, from what a decoder is told about padding
    states.py         TTT states that travel with a `transformers` cache
    sites.py          the sites: after each decoder layer
    attention.py      attention limited to a window and sinks

No architecture is named here. A model whose structure is not understood is refused. `import ttt.hf` needs neither torch
nor `transformers`: they are imported when something that needs them is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt.hf.attention import limit_attention
    from ttt.hf.sites import causal_lm_sites

__all__ = ["causal_lm_sites", "limit_attention"]

_EXPORTS = {"causal_lm_sites": "ttt.hf.sites", "limit_attention": "ttt.hf.attention"}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ttt.hf' has no attribute {name!r}")
