"""Where keys and values are, in the data and in the file."""

from __future__ import annotations

from dataclasses import dataclass

from ttt.config.findings import Place

KeyPath = tuple[str | int, ...]
"""Where a value is in the data: keys of mappings, positions in lists."""


def dotted(path: KeyPath) -> str:
    """A path as people write it, `ttt.layers.2`."""
    return ".".join(map(str, path))


def path_of(text: str) -> KeyPath:
    """The path that `dotted` wrote; a word of digits is a position in a list."""
    words = text.split(".") if text else []
    return tuple(int(word) if word.isdecimal() and len(word) < 10 else word for word in words)


@dataclass(frozen=True)
class Located:
    """Where a key and its value are written; in a list, both are the value's."""

    key: Place
    value: Place
