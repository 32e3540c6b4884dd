"""What a run is, where each of its keys was written, and what is wrong with it. Imports no torch.

The models are here at once; what reads and checks files is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ttt.config.schema import (
    BackboneOptions,
    DataOptions,
    EvalConfig,
    RunConfig,
    TrainConfig,
    TTTConfig,
)

if TYPE_CHECKING:
    from ttt.config.diagnostics import CODES, Finding, Place, Severity, render_json, render_text
    from ttt.config.load import (
        CheckedConfig,
        LoadedConfig,
        check_config,
        dump_config,
        load_config,
        run_config_model,
    )
    from ttt.config.source import Source

_EXPORTS = {
    "CODES": "ttt.config.diagnostics",
    "Finding": "ttt.config.diagnostics",
    "Place": "ttt.config.diagnostics",
    "Severity": "ttt.config.diagnostics",
    "render_json": "ttt.config.diagnostics",
    "render_text": "ttt.config.diagnostics",
    "Source": "ttt.config.source",
    "CheckedConfig": "ttt.config.load",
    "LoadedConfig": "ttt.config.load",
    "check_config": "ttt.config.load",
    "dump_config": "ttt.config.load",
    "load_config": "ttt.config.load",
    "run_config_model": "ttt.config.load",
}

__all__ = [
    "CODES",
    "BackboneOptions",
    "CheckedConfig",
    "DataOptions",
    "EvalConfig",
    "Finding",
    "LoadedConfig",
    "Place",
    "RunConfig",
    "Severity",
    "Source",
    "TTTConfig",
    "TrainConfig",
    "check_config",
    "dump_config",
    "load_config",
    "render_json",
    "render_text",
    "run_config_model",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ttt.config' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
