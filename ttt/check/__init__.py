"""What is said about a run before it starts: a config is read, checked, explained, shown, compared or imported.

Only `ttt.check.probe` and `ttt.check.doctor`, which run models, import torch. Every name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt.check.catalogue import CODES
    from ttt.check.load import CheckedConfig, LoadedConfig, check_config, load_config
    from ttt.check.render import render_json, render_text

_EXPORTS = {
    "CODES": "ttt.check.catalogue",
    "CheckedConfig": "ttt.check.load",
    "LoadedConfig": "ttt.check.load",
    "check_config": "ttt.check.load",
    "load_config": "ttt.check.load",
    "render_json": "ttt.check.render",
    "render_text": "ttt.check.render",
}

__all__ = [
    "CODES",
    "CheckedConfig",
    "LoadedConfig",
    "check_config",
    "load_config",
    "render_json",
    "render_text",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ttt.check' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
