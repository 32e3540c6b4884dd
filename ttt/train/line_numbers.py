"""The numbers of a metrics line by name, as dashboards take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def numbers_of(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a line with its name, those of `layers` as `SITE/NAME`; without `step`."""
    for name, value in line.items():
        if name == "layers":
            for site, evidence in value.items():
                yield from ((f"{site}/{key}", number) for key, number in evidence.items() if number is not None)
        elif name != "step" and isinstance(value, (int, float)):
            yield name, value
