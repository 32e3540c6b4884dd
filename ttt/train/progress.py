"""How far a run is: what changes from step to step, beside the weights and the optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ttt.state import TTTState


@dataclass
class Progress:
    """How far a run is. Only a step that is done changes it, and every checkpoint holds it."""

    done: int = 0
    """Optimiser steps, those before a resumption included."""
    seconds: float = 0.0
    """Time that the steps took."""
    tokens: int = 0
    """Positions that they read."""
    states: dict[str, TTTState] = field(default_factory=dict)
    """Carried fast weights by site, with `persistent_states`."""
    line: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last step."""
