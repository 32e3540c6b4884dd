"""Amounts for people: bytes and operations, read and written."""

from __future__ import annotations

import re

from ttt.printable import shortened

_PREFIXES = "KMGTPEZY"
_AMOUNT = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]+)\s*", re.IGNORECASE | re.ASCII)
_UNITS = {"b": 1} | {
    f"{prefix}{ending}".casefold(): base**power
    for power, prefix in enumerate(_PREFIXES, 1)
    for ending, base in (("B", 1000), ("iB", 1024), ("", 1024))
}
"""Bytes of each unit, in lower case."""


def parse_bytes(text: str) -> int:
    """`80GiB`, `80G` and `24 GB` as bytes, in capitals or not.

    `GiB` and a prefix alone are binary (1 GiB is 1024³ bytes), `GB` is decimal (10⁹ bytes). A number alone has no
    unit, and is refused: who writes 80 means GiB.

    Raises:
        ValueError: this is not a size, or less than a byte; the message says what to write.
    """
    match = _AMOUNT.fullmatch(text)
    factor = _UNITS.get(match[2].casefold()) if match else None
    size = int(float(match[1]) * factor) if match and factor else 0
    if size < 1:
        raise ValueError(f"`{shortened(text, 60)}` is not a size; write 80GiB")
    return size


def show_bytes(count: float) -> str:
    """An amount for people, in binary units and three digits: `14.3 GiB`, as torch and nvidia-smi report memory."""
    if abs(count) > 1 << 80:  # beyond what a float divides, in a config that nobody means
        return "more than 10^12 TiB"
    if abs(count) < 1024:
        return f"{count:.0f} {'byte' if round(count) == 1 else 'bytes'}"
    power = 1
    while abs(count) / 1024**power >= 999.5:
        power += 1
    return f"{count / 1024**power:.3g} {_PREFIXES[power - 1]}iB"


def show_flops(count: float) -> str:
    """Operations for people, in three digits: `1.23 TFLOP`."""
    if count > 1e24:  # in a config that nobody means
        return "more than 10^24 FLOP"
    power = 0
    while count / 1000**power >= 999.5 and power < 6:
        power += 1
    return f"{count / 1000**power:.3g} {'kMGTPE'[power - 1] if power else ''}FLOP"
