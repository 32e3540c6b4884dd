"""Adapter files: `adapter_model.safetensors` and `adapter_config.json`. They say what they belong to.

The safetensors header holds the same settings as the JSON beside it, so that file is enough; the JSON is for people
and tools. A folder may also hold `backbone_model.safetensors`, the backbone's own parameters that were trained along
with the adapter; then the adapter's header says so, and the two load together or not at all.

    format.py         names, version, and what a file says of itself
    reading.py        reading that
    differences.py    how a file and a config or a model differ
    fingerprint.py    knowing a backbone's weights again
    saving.py, loading.py

Reading what a file is needs no torch: what needs it is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ttt.adapter_file.differences import ChangedSetting, changed_at_start, config_differences, way_to_fit
from ttt.adapter_file.format import (
    BACKBONE,
    CONFIG,
    FORMAT,
    MAX_HEADER,
    MAX_SITES,
    MODEL,
    VERSION,
    AdapterInfo,
    SiteInfo,
    backbone_identity,
)
from ttt.adapter_file.reading import read_info, trained_backbone, verify_adapter

if TYPE_CHECKING:
    from ttt.adapter_file.fingerprint import BackboneWeights, same_weights, weights_fingerprint
    from ttt.adapter_file.loading import load_adapter
    from ttt.adapter_file.saving import save_adapter

__all__ = [
    "BACKBONE",
    "CONFIG",
    "FORMAT",
    "MAX_HEADER",
    "MAX_SITES",
    "MODEL",
    "VERSION",
    "AdapterInfo",
    "BackboneWeights",
    "ChangedSetting",
    "SiteInfo",
    "backbone_identity",
    "changed_at_start",
    "config_differences",
    "load_adapter",
    "read_info",
    "same_weights",
    "save_adapter",
    "trained_backbone",
    "verify_adapter",
    "way_to_fit",
    "weights_fingerprint",
]

_WITH_TORCH = {
    "load_adapter": "ttt.adapter_file.loading",
    "save_adapter": "ttt.adapter_file.saving",
    "BackboneWeights": "ttt.adapter_file.fingerprint",
    "same_weights": "ttt.adapter_file.fingerprint",
    "weights_fingerprint": "ttt.adapter_file.fingerprint",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(_WITH_TORCH[name]), name)
    raise AttributeError(f"module 'ttt.adapter_file' has no attribute {name!r}")
