"""How far a run is: what changes from step to step, besides the weights and the optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ttt.state import TTTState


@dataclass
class Progress:
    """How far a run is. It changes only when a step is done, and every checkpoint holds it."""

    done: int = 0
    """Optimiser steps done, including those before the run was resumed."""
    seconds: float = 0.0
    """Seconds that the steps took."""
    tokens: int = 0
    """Positions that the steps read."""
    states: dict[str, TTTState] = field(default_factory=dict)
    """Carried fast weights by site, with `persistent_states`."""
    line: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last step."""
