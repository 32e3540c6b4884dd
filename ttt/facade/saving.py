"""Writing the files of a model with TTT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt.adapter_file import save_adapter
from ttt.errors import UsageError
from ttt.facade.attached import Attached


def save(attached: Attached, folder: str | Path, options: Mapping[str, Any]) -> None:
    """Write the adapter's files into a folder."""
    if not isinstance(folder, (str, Path)):
        raise UsageError(f"save_pretrained takes a folder, not {type(folder).__name__}")
    save_adapter(folder, attached.injection, backbone=attached.backbone, training=attached.training)
