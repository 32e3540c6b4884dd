"""Configs of other programs, translated: where each key went, or why it has no counterpart.

Plugins know the formats and implement the hook `ttt_import_config`. This file asks them, writes the new config, and
renders an account that names every key of the old file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from ttt.config.dumping import dump_value
from ttt.config.findings import summary
from ttt.config.schema import RunConfig
from ttt.config.source import parse_source
from ttt.errors import ConfigError, PluginError, UsageError
from ttt.plugins.asking import WAY_OUT
from ttt.plugins.hookspecs import CONFIG_IMPORTS
from ttt.plugins.imported import ImportedConfig, ImportedKey
from ttt.plugins.registry import ask, entry_points
from ttt.printable import printable, shell_word

_COMMENT = 500
"""Most characters of foreign text in a comment or in an account."""
MOST_LISTED = 200
"""Most keys of one kind that an account lists; the others are counted."""


def import_config(
    text: str, *, file: str, backbone: str | None = None, tell: Callable[[str], None] = lambda sentence: None
) -> ImportedConfig | None:
    """Ask the plugins, one by one, to read a foreign config. Returns None if no plugin knows its format.

    Args:
        text: the old file.
        file: its name.
        backbone: accept only configs for this backbone; None accepts any.
        tell: called with a sentence for each plugin that is broken or fails, if another one reads the file.

    Raises:
        ConfigError: the file is named as YAML but is not YAML, or writes a key twice.
        PluginError: a plugin is broken or fails, and no other reads the file.
        UsageError: the file is a config of this project already, or a plugin knows its format and finds it damaged.
    """
    source = parse_source(text, file=file)
    if file.casefold().endswith((".yaml", ".yml")) and source.findings:
        raise ConfigError(f"{file}: {summary(source.findings)}", source.findings)
    if isinstance(source.data.get("backbone"), Mapping):
        raise UsageError(f"{file}: is a config of this project already; check it with `ttt check {shell_word(file)}`")
    answers = ask(CONFIG_IMPORTS, accepts=lambda found: _is_for(found, backbone), text=text, file=file)
    if not answers.given and answers.failures:
        raise PluginError("; ".join(failure.told for failure in answers.failures), fix=WAY_OUT)
    for failure in answers.failures:
        tell(failure.told)
    return answers.given[0].value if answers.given else None


def _is_for(imported: ImportedConfig, backbone: str | None) -> bool:
    return backbone is None or imported.values.get("backbone.name") == backbone


def readers() -> tuple[str, ...]:
    """The names of the plugins that read other programs' configs, broken ones included. Loads none of them."""
    return tuple(dict.fromkeys(point.name for point in entry_points(CONFIG_IMPORTS)))


# --- the new file, and the account of it ---


def write_imported(imported: ImportedConfig, *, origin: str) -> str:
    """The new config as YAML. A comment beside each key names the old key that it comes from."""
    origins = {key.new: key for key in imported.keys if key.new is not None}
    lines = [f"# Imported from {_in_a_comment(origin)} ({_in_a_comment(imported.format)}) by `ttt import-config`."]
    tree = _tree(imported.values)
    for section in RunConfig.model_fields:
        if section in tree:
            lines += ["", *_written({section: tree[section]}, "", imported, origins)]
    return "\n".join(lines) + "\n"


_Tree: TypeAlias = "dict[str, str | _Tree]"
"""Names of keys, each with the dotted key whose value stands there, or with what lies below it."""


def _tree(values: Mapping[str, Any]) -> _Tree:
    """The keys as they are nested."""
    tree: _Tree = {}
    for key in values:
        *above, name = key.split(".")
        place = tree
        for part in above:
            below = place.setdefault(part, {})
            if isinstance(below, str):  # a section that has a value as well: what is wrong with that, a check tells
                below = place[part] = {part: below}
            place = below
        place[name] = key
    return tree


def _written(tree: _Tree, indent: str, imported: ImportedConfig, origins: Mapping[str, ImportedKey]) -> list[str]:
    """The lines of keys and of what lies below them."""
    lines: list[str] = []
    for name, node in tree.items():
        label = f"{indent}{dump_value(name)}:"
        if isinstance(node, str):
            lines.append(_with_comment(label, node, imported, origins))
        elif all(part.isdecimal() for part in node):
            lines.append(label)
            for entry in node.values():
                lines += _entry(entry, f"{indent}  ", imported, origins)
        else:
            lines += [label, *_written(node, f"{indent}  ", imported, origins)]
    return lines


def _entry(entry: str | _Tree, indent: str, imported: ImportedConfig, origins: Mapping[str, ImportedKey]) -> list[str]:
    """The lines of an entry of a list."""
    if isinstance(entry, str):
        return [_with_comment(f"{indent}-", entry, imported, origins)]
    first, *others = _written(entry, f"{indent}  ", imported, origins)
    return [f"{indent}- {first.lstrip()}", *others]


def _with_comment(label: str, key: str, imported: ImportedConfig, origins: Mapping[str, ImportedKey]) -> str:
    written, comment = f"{label} {dump_value(imported.values[key])}", _comment(origins[key], key)
    return f"{written:36} # {comment}" if comment else written


def _comment(origin: ImportedKey, key: str) -> str:
    named = origin.old if origin.old.rpartition(".")[2] != key.rpartition(".")[2] else ""
    return _in_a_comment("; ".join(part for part in (named, origin.note) if part))


def _in_a_comment(text: str) -> str:
    """Foreign text that is safe in a YAML comment: on one line, and shortened to `_COMMENT` characters."""
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
