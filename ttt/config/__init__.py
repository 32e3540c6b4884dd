"""What a run is: its sections, where each key was written, what can be found in it. Imports no torch.

It imports nothing from the rest of the library but errors. The models are imported at once, all other names on first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ttt.config.evaluation import EvalConfig, ScoreOptions
from ttt.config.misfit import Misfit
from ttt.config.paths import LocalPath
from ttt.config.schema import (
    BackboneOptions,
    DataOptions,
    RunConfig,
    TrainConfig,
    TTTConfig,
)
from ttt.config.tasks import TaskOptions

if TYPE_CHECKING:
    from ttt.config.dumping import dump_config
    from ttt.config.explanation import Explanation
    from ttt.config.findings import Blame, Code, Finding, Place, Severity
    from ttt.config.source import Source

_EXPORTS = {
    "Blame": "ttt.config.findings",
    "Code": "ttt.config.findings",
    "Explanation": "ttt.config.explanation",
    "Finding": "ttt.config.findings",
    "Place": "ttt.config.findings",
    "Severity": "ttt.config.findings",
    "Source": "ttt.config.source",
    "dump_config": "ttt.config.dumping",
}

__all__ = [
    "BackboneOptions",
    "Blame",
    "Code",
    "DataOptions",
    "EvalConfig",
    "Explanation",
    "Finding",
    "LocalPath",
    "Misfit",
    "Place",
    "RunConfig",
    "ScoreOptions",
    "Severity",
    "Source",
    "TTTConfig",
    "TaskOptions",
    "TrainConfig",
    "dump_config",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ttt.config' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
