"""Values as moshi-finetune reads them: with PyYAML, which knows YAML 1.1, then as the types of its `args.py`."""

from __future__ import annotations

import re
from typing import Any

from ttt.plugins import Import

_TRUE = ("true", "yes", "on", "y", "t", "1")
_FALSE = ("false", "no", "off", "n", "f", "0")
_BOOLEANS = {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}
_WHOLE = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_FRACTION = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?\Z")
_MOST_DIGITS = 40


def flag(value: Any) -> Any:
    """A boolean of YAML 1.1, or one that is written as a text, as one of YAML 1.2. Anything else as it is."""
    return _BOOLEANS.get(value.strip().casefold(), value) if isinstance(value, str) else value


def figure(value: Any) -> Any:
    """A number that is written as a text, `"1e-5"`, or with underscores, `10_000`. Anything else as it is."""
    if not isinstance(value, str) or len(value) > _MOST_DIGITS:
        return value
    text = value.strip()
    if _WHOLE.match(text):
        return int(text)
    return float(text) if _FRACTION.match(text) else value


def is_on(moving: Import, old: str, *, default: bool) -> bool:
    """Whether a switch of the old file is on. What is no boolean counts as the default."""
    value = flag(moving.get(old, default))
    return value if isinstance(value, bool) else default


def move_figure(moving: Import, old: str, new: str, *, note: str = "") -> None:
    """Move a number, also one that is written as a text."""
    moving.move(old, new, note=note, value=figure(moving.get(old)))


def move_flag(moving: Import, old: str, new: str) -> None:
    """Move a boolean."""
    moving.move(old, new, value=flag(moving.get(old)))


def drop_the_rest(moving: Import, section: str, why: str) -> None:
    """Say why the keys of a section that nothing has accounted for have no counterpart."""
    written = moving.source.data.get(section)
    for key in [f"{section}.{name}" for name in written] if isinstance(written, dict) and written else [section]:
        if not moving.is_accounted(key):
            moving.drop(key, why)
