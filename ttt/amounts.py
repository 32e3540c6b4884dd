"""Amounts for people: bytes and operations, read and written."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGTP", 1)
    for ending, base in (("B", 1000), ("iB", 1024), ("", 1024))
}


def parse_bytes(text: str) -> int:
    """`80GiB`, `24 GB`, `512M` as bytes; a prefix alone is binary, as is `GiB`.

    Raises:
        ValueError: it is no positive amount of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {unit.casefold(): factor for unit, factor in _UNITS.items()}
    factor = units.get(match[2].casefold()) if match else None
    if match is None or factor is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory; write one such as 80GiB, 24GB or 512MiB")
    return int(float(match[1]) * factor)


def show_bytes(count: float) -> str:
    """An amount for people, in binary units and three digits: `14.3 GiB`."""
    if abs(count) > 1 << 80:  # beyond what a float divides, in a config that nobody means
        return "more than 10^12 TiB"
    if abs(count) < 1000:
        return f"{count:.0f} bytes"
    power = 1
    while abs(count) / 1024**power >= 999.5 and power < 4:
        power += 1
    return f"{count / 1024**power:.3g} {'KMGT'[power - 1]}iB"


def show_flops(count: float) -> str:
    """Operations for people, in three digits: `1.23 TFLOP`."""
    if count > 1e24:  # in a config that nobody means
        return "more than 10^24 FLOP"
    power = 0
    while count / 1000**power >= 999.5 and power < 6:
        power += 1
    return f"{count / 1000**power:.3g} {'kMGTPE'[power - 1] if power else ''}FLOP"
