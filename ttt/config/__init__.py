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
    from ttt.check.load import (
        CheckedConfig,
        LoadedConfig,
        check_config,
        dump_config,
        load_config,
        run_config_model,
    )
    from ttt.config.findings import CODES, Finding, Place, Severity, render_json, render_text
    from ttt.config.source import Source

_EXPORTS = {
    "CODES": "ttt.config.findings",
    "Finding": "ttt.config.findings",
    "Place": "ttt.config.findings",
    "Severity": "ttt.config.findings",
    "render_json": "ttt.config.findings",
    "render_text": "ttt.config.findings",
    "Source": "ttt.config.source",
    "CheckedConfig": "ttt.check.load",
    "LoadedConfig": "ttt.check.load",
    "check_config": "ttt.check.load",
    "dump_config": "ttt.check.load",
    "load_config": "ttt.check.load",
    "run_config_model": "ttt.check.load",
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
