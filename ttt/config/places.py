"""The places of keys and values, in the data and in the file."""

from __future__ import annotations

from dataclasses import dataclass

from ttt.config.findings import Place

KeyPath = tuple[str | int, ...]
"""The path to a value in the data: keys of mappings, positions in lists."""


def dotted(path: KeyPath) -> str:
    """A path as text, `ttt.layers.2`."""
    return ".".join(map(str, path))


def path_of(text: str) -> KeyPath:
    """The path from its text, the inverse of `dotted`. A part of digits is a position in a list."""
    words = text.split(".") if text else []
    return tuple(int(word) if word.isdecimal() and len(word) < 10 else word for word in words)


@dataclass(frozen=True)
class Located:
    """The places of a key and of its value. For a value in a list, both are the value's."""

    key: Place
    value: Place
