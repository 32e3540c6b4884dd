"""Test-time-training adapters for sequence models: layers that learn while they read.

`import ttt` is light: what needs torch is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ttt.version import __version__

_EXPORTS = {
    "scan": "ttt.ops.scan",
    "TTTConfig": "ttt.config",
    "TTTLayer": "ttt.layer",
    "TTTState": "ttt.state",
    "TTTAdapter": "ttt.adapter",
    "Gate": "ttt.adapter",
    "gates_closed": "ttt.adapter",
    "Site": "ttt.plugins",
    "save_adapter": "ttt.adapter_file",
    "load_adapter": "ttt.adapter_file",
    "Backbone": "ttt.plugins",
    "hookimpl": "ttt.plugins",
    "NestedCheckpointWarning": "ttt.errors",
    "get_ttt_model": "ttt.facade",
    "TTTModel": "ttt.facade",
}

__all__ = [
    "Backbone",
    "Gate",
    "NestedCheckpointWarning",
    "Site",
    "TTTAdapter",
    "TTTConfig",
    "TTTLayer",
    "TTTModel",
    "TTTState",
    "__version__",
    "gates_closed",
    "get_ttt_model",
    "hookimpl",
    "load_adapter",
    "save_adapter",
    "scan",
]

if TYPE_CHECKING:
    from ttt.adapter import Gate, TTTAdapter, gates_closed
    from ttt.adapter_file import load_adapter, save_adapter
    from ttt.config import TTTConfig
    from ttt.errors import NestedCheckpointWarning
    from ttt.facade import TTTModel, get_ttt_model
    from ttt.layer import TTTLayer
    from ttt.ops.scan import scan
    from ttt.plugins import Backbone, Site, hookimpl
    from ttt.state import TTTState


_MODULES = ("inject", "evidence", "ops", "testing")
"""Submodules that `import ttt` is enough for."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"ttt.{name}")
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ttt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
