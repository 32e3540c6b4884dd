"""Scalars of YAML 1.2's core schema: `1e-5` is a number; `on`, `off`, `yes` and `no` are text."""

from __future__ import annotations

import re
from typing import Any

NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
BOOLEAN = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
INTEGER = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_MAX_DIGITS = 400  # Python refuses to read numbers of thousands of digits; nobody writes them


def resolve(text: str) -> Any:
    """The value of a scalar without quotes: null, a boolean or a number, else the text itself."""
    if NULL.match(text):
        return None
    if BOOLEAN.match(text):
        return text[0] in "tT"
    if len(text) <= _MAX_DIGITS:
        if INTEGER.match(text):
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if FLOAT.match(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
