"""Configs of other programs in this project's terms: where each key went, or why it has no counterpart.

The formats themselves are known to the backbones whose users have such files (`Backbone.import_config`); here is what
every importer needs: a record in which no key of the old file is lost, and the writing of the new one.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ttt.check.load import dump_value
from ttt.config.findings import summary
from ttt.config.schema import RunConfig
from ttt.config.source import KeyPath, Source, dotted, parse_source
from ttt.errors import ConfigError, UsageError
from ttt.printable import printable, shell_word

if TYPE_CHECKING:
    from ttt.plugins.backbone import Backbone

_COMMENT = 500
"""Characters of somebody else's text in a comment, or in an account."""
MOST_LISTED = 200
"""Keys of a kind that an account lists; the others are counted."""


@dataclass(frozen=True)
class ImportedKey:
    """What became of one key."""

    old: str
    """The key in the old file, dotted; empty for a value that stands in none of its keys."""
    new: str | None
    """The key in the new config, dotted; None where there is no counterpart."""
    note: str = ""
    """How the value changed, or why there is no counterpart."""


@dataclass(frozen=True)
class ImportedConfig:
    """A foreign config in this project's terms."""

    format: str
    """Whose config it was, "moshi-finetune"."""
    values: Mapping[str, Any]
    """The new config, values by dotted key; what it leaves out takes this project's defaults."""
    keys: Sequence[ImportedKey]
    """Every key of the old file, in its order, then what was added."""


LARGEST = 1e15
"""The largest number, and the smallest negated, that is read from another program's config."""


def number(value: Any, *, whole: bool = False) -> Any:
    """The value if it is a number, else None: true, false and texts are none, `8.0` is the whole number 8."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return (int(value) if value == int(value) else None) if whole else value


@dataclass
class Import:
    """An import under way: a backbone moves and drops the old keys one by one, and `done` tells of those it forgot."""

    source: Source
    """The old file, where that is YAML; of other formats, its data and no places."""
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
        """Refuse numbers that nothing can be computed from.

        Raises:
            UsageError: one is infinite, none, or beyond anything that a config says; the message names its place.
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
        """Write a key of the old file to a key of the new one, where the old file has it.

        Args:
            old: dotted.
            new: dotted.
            note: how the value changed.
            changed: `value=…` where it is not the old one's.
        """
        if self.has(old):
            self._values[new] = changed.get("value", self.get(old))
            self._keys.setdefault(old, []).append(ImportedKey(old, new, note))

    def drop(self, old: str, why: str) -> None:
        """Say why a key of the old file has no counterpart; for a section, of all its keys."""
        for path in self._old:
            if path == old or path.startswith(f"{old}."):
                self._keys.setdefault(path, []).append(ImportedKey(path, None, why))

    def add(self, new: str, value: Any, why: str) -> None:
        """Write a value that the old file says nowhere."""
        self._values[new] = value
        self._added.append(ImportedKey("", new, why))

    def done(self) -> ImportedConfig:
        """The result; keys of which nothing was said are told as unknown."""
        keys: list[ImportedKey] = []
        for path in self._old:
            keys += self._keys.get(path) or [ImportedKey(path, None, f"no key of {self.format} that is known here")]
        return ImportedConfig(self.format, self._values, (*keys, *self._added))


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[str, Any]]:
    """Every key whose value is no section, dotted; an empty section counts as a value."""
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


def import_config(text: str, *, file: str, backbones: Sequence[Backbone]) -> tuple[Backbone, ImportedConfig] | None:
    """Ask the backbones, one by one, to read a foreign config; None where it is none that they know.

    Args:
        text: the old file.
        file: its name.
        backbones: in the order to be asked.

    Raises:
        ConfigError: the file is meant to be YAML, and is none, or says a key twice.
        PluginError: a backbone failed when it was asked.
        UsageError: it is a config of this project already, or a backbone's that is damaged.
    """
    source = parse_source(text, file=file)
    if file.casefold().endswith((".yaml", ".yml")) and source.findings:
        raise ConfigError(f"{file}: {summary(source.findings)}", source.findings)
    if isinstance(source.data.get("backbone"), Mapping):
        raise UsageError(f"{file}: is a config of this project already; check it with `ttt check {shell_word(file)}`")
    for backbone in backbones:
        imported = backbone.import_config(text, file=file)
        if imported is not None:
            return backbone, imported
    return None


# --- the new file, and the account of it ---


def write_imported(imported: ImportedConfig, *, origin: str) -> str:
    """The new config as YAML, each key with the old one that it comes from."""
    origins = {key.new: key for key in imported.keys if key.new is not None}
    lines = [f"# Imported from {_in_a_comment(origin)} ({_in_a_comment(imported.format)}) by `ttt import-config`."]
    for section in RunConfig.model_fields:
        keys = [key for key in imported.values if key == section or key.startswith(f"{section}.")]
        if not keys:
            continue
        nested = keys != [section]
        lines += ["", f"{section}:"] if nested else [""]
        for key in keys:
            name = dump_value(key.rpartition(".")[2])
            written = f"{'  ' if nested else ''}{name}: {dump_value(imported.values[key])}"
            comment = _comment(origins[key], key)
            lines.append(f"{written:36} # {comment}" if comment else written)
    return "\n".join(lines) + "\n"


def _comment(origin: ImportedKey, key: str) -> str:
    named = origin.old if origin.old.rpartition(".")[2] != key.rpartition(".")[2] else ""
    return _in_a_comment("; ".join(part for part in (named, origin.note) if part))


def _in_a_comment(text: str) -> str:
    """Somebody else's text as a comment holds it: in one line, whatever ends a line to YAML, and no longer."""
    text = printable(text)
    return text if len(text) <= _COMMENT else f"{text[: _COMMENT - 1]}…"


def render_account(imported: ImportedConfig, *, width: int | None = None) -> str:
    """Where each key went, or why it has no counterpart, for people.

    Args:
        imported: the result of an import.
        width: columns to wrap notes at; None leaves each key on one line.
    """
    lines: list[str] = []
    for title, keys in (
        ("moved:", [key for key in imported.keys if key.old and key.new]),
        ("added:", [key for key in imported.keys if not key.old]),
        ("no counterpart:", [key for key in imported.keys if key.new is None]),
    ):
        if not keys:
            continue
        lines += [*([""] if lines else []), title]
        for key in keys[:MOST_LISTED]:
            lines += _account_of(key, imported, width)
        if len(keys) > MOST_LISTED:
            lines.append(f"  and {len(keys) - MOST_LISTED:,} more")
    return "\n".join(lines)


def _account_of(key: ImportedKey, imported: ImportedConfig, width: int | None) -> list[str]:
    key = replace(key, old=_in_a_comment(key.old), note=_in_a_comment(key.note))
    if key.new is None:
        head = f"  {key.old}"
    else:
        arrow = f"{key.old} → " if key.old else ""
        head = f"  {arrow}{key.new}: {_in_a_comment(dump_value(imported.values[key.new]))}"
    if width is not None and key.new is not None and len(head) > width:
        lines = _account_of(ImportedKey("", key.new, key.note), imported, width)
        return [f"  {key.old}", *(f"    → {line.strip()}" if at == 0 else line for at, line in enumerate(lines))]
    if not key.note:
        return [head]
    if width is None or len(head) + 4 + len(key.note) <= width:
        return [f"{head}    {key.note}"]
    indent = " " * 6
    return [head, *textwrap.wrap(key.note, max(width, 40), initial_indent=indent, subsequent_indent=indent)]
