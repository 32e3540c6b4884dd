"""Settings by their dotted names, `ttt.mini_batch_size`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def dotted(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of a nesting of mappings, each by its dotted name.

    Args:
        settings: as `model_dump` gives them.
        above: what every name begins with, a final dot included.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        found.update(dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return found
