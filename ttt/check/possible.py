"""Sizes of a model that nothing has: sums about it would not end."""

from __future__ import annotations

from ttt.check.codes import TTT103
from ttt.config.findings import Finding
from ttt.plugins import BackboneFacts

_MOST = {
    **{"dim": 1 << 24, "num_heads": 1 << 20, "num_layers": 1 << 16, "layers_per_checkpoint": 1 << 20, "gates": 1 << 10},
    **{"tokens_per_window": 1 << 50, "parameters": 1 << 60, "attention_parameters": 1 << 60},
    **{"layer_activation_bytes": 1 << 60, "head_activation_bytes": 1 << 60},
}
"""The largest value that is accepted for each of a backbone's facts."""


def impossible_size(facts: BackboneFacts) -> Finding | None:
    """The first of a model's sizes that is larger than anything."""
    for name, most in _MOST.items():
        size = getattr(facts, name, None)
        if isinstance(size, int) and size > most:
            return TTT103.at(
                "backbone",
                f"these options make a model whose {name} is more than {most:,}: nothing is that large",
                "write smaller numbers in `backbone` and `data`, or name another model's files",
            )
    return None
