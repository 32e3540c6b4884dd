"""A translated config of another program: where each key went, or why it has no counterpart.

Plugins know the formats and implement the hook `ttt_import_config`. This file has the record that names every key of
the old file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttt.config.places import KeyPath, dotted
from ttt.config.source import Source
from ttt.errors import UsageError


@dataclass(frozen=True)
class ImportedKey:
    """What became of one key."""

    old: str
    """The key in the old file, dotted; empty for a value that was added."""
    new: str | None
    """The key in the new config, dotted; None if there is no counterpart."""
    note: str = ""
    """How the value changed, or why there is no counterpart."""


@dataclass(frozen=True)
class ImportedConfig:
    """A foreign config in this project's terms."""

    format: str
    """Whose config it was, "moshi-finetune"."""
    values: Mapping[str, Any]
    """The new config, values by dotted key; what it leaves out takes this project's defaults. A number in a key is a
    place in a list: `eval.tasks.0.name`."""
    keys: Sequence[ImportedKey]
    """Every key of the old file, in its order, then what was added."""


LARGEST = 1e15
"""The largest number, and the smallest negated, that is read from another program's config."""


def number(value: Any, *, whole: bool = False) -> Any:
    """The value if it is a number, else None. true, false and texts are not numbers; `8.0` is the whole number 8."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return (int(value) if value == int(value) else None) if whole else value


@dataclass
class Import:
    """An import in progress. A plugin moves and drops the old keys one by one; `done` lists the keys that it forgot."""

    source: Source
    """The old file. If it is not YAML, its data without places."""
    format: str
    """Whose config it is."""
    _values: dict[str, Any] = field(default_factory=dict)
    _keys: dict[str, list[ImportedKey]] = field(default_factory=dict)
    _added: list[ImportedKey] = field(default_factory=list)

    @functools.cached_property
    def _old(self) -> dict[str, Any]:
        """The values of the old file, by dotted key."""
        return dict(_leaves(self.source.data, ()))

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be used.

        Raises:
            UsageError: a number is infinite, NaN or larger than `LARGEST`; the message names its place.
        """
        for path, value in _scalars(self.source.data, ()):
            if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
                told = f"{value}, no finite number" if isinstance(value, float) and value - value else "far too large"
                raise UsageError(
                    f"{self.source.place(path)}: `{dotted(path)}` is {told}; write a number up to {LARGEST:g} there, "
                    f"or take the key out"
                )

    def has(self, old: str) -> bool:
        """Whether the old file has a key."""
        return old in self._old

    def get(self, old: str, default: Any = None) -> Any:
        """The value of a key of the old file."""
        return self._old.get(old, default)

    def move(self, old: str, new: str, *, note: str = "", **changed: Any) -> None:
        """Write a key of the old file to a key of the new one, if the old file has it.

        Args:
            old: dotted.
            new: dotted.
            note: how the value changed.
            changed: `value=…` if the value changes.
        """
        if self.has(old):
            self._values[new] = changed.get("value", self.get(old))
            self._keys.setdefault(old, []).append(ImportedKey(old, new, note))

    def is_accounted(self, old: str) -> bool:
        """Whether a key of the old file was moved or dropped; of a section, whether all its keys were."""
        paths = [path for path in self._old if path == old or path.startswith(f"{old}.")]
        return all(path in self._keys for path in paths)

    def drop(self, old: str, why: str) -> None:
        """Say why a key of the old file has no counterpart; for a section, of all its keys."""
        for path in self._old:
            if path == old or path.startswith(f"{old}."):
                self._keys.setdefault(path, []).append(ImportedKey(path, None, why))

    def add(self, new: str, value: Any, why: str) -> None:
        """Write a value that the old file does not have."""
        self._values[new] = value
        self._added.append(ImportedKey("", new, why))

    def done(self) -> ImportedConfig:
        """The result. Keys that were neither moved nor dropped are listed as unknown."""
        keys: list[ImportedKey] = []
        for path in self._old:
            keys += self._keys.get(path) or [ImportedKey(path, None, f"no key of {self.format} that is known here")]
        return ImportedConfig(self.format, self._values, (*keys, *self._added))


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[str, Any]]:
    """Every key whose value is not a section, dotted. An empty section counts as a value."""
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield ".".join(f'"{key}"' if "." in str(key) else str(key) for key in path), value  # `a.b` is no `b` of `a`


def _scalars(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is neither a section nor a list, those in lists included."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _scalars(item, (*path, index))
    else:
        yield path, value
