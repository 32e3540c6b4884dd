"""What a plugin provides, how it is found, and how it is asked. Imports no torch.

Everything is imported when it is first asked for, so that one name does not cost all of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt.plugins.backbone import (
        Backbone,
        BackboneFacts,
        Batch,
        LossOutput,
        RecordingFormat,
        SamplePlan,
        SampleRequest,
        WindowDataset,
    )
    from ttt.plugins.discovery import (
        GROUP,
        PluginInfo,
        discover,
        examined,
        find,
        forget,
        get_backbone,
        names,
    )
    from ttt.plugins.hookspecs import hookimpl

_EXPORTS = {
    "Backbone": "ttt.plugins.backbone",
    "BackboneFacts": "ttt.plugins.backbone",
    "Batch": "ttt.plugins.backbone",
    "GROUP": "ttt.plugins.discovery",
    "LossOutput": "ttt.plugins.backbone",
    "PluginInfo": "ttt.plugins.discovery",
    "RecordingFormat": "ttt.plugins.backbone",
    "SamplePlan": "ttt.plugins.backbone",
    "SampleRequest": "ttt.plugins.backbone",
    "WindowDataset": "ttt.plugins.backbone",
    "discover": "ttt.plugins.discovery",
    "examined": "ttt.plugins.discovery",
    "find": "ttt.plugins.discovery",
    "forget": "ttt.plugins.discovery",
    "get_backbone": "ttt.plugins.discovery",
    "hookimpl": "ttt.plugins.hookspecs",
    "names": "ttt.plugins.discovery",
}

__all__ = [
    "GROUP",
    "Backbone",
    "BackboneFacts",
    "Batch",
    "LossOutput",
    "PluginInfo",
    "RecordingFormat",
    "SamplePlan",
    "SampleRequest",
    "WindowDataset",
    "discover",
    "examined",
    "find",
    "forget",
    "get_backbone",
    "hookimpl",
    "names",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ttt.plugins' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
