"""The differences between two resolved configs, defaults included, and between what is found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttt.check.load import CheckedConfig
from ttt.check.render import shown, to_dict
from ttt.config.findings import Finding
from ttt.config.schema import RunConfig
from ttt.printable import json_text


class _Absent:
    """Stands for the value of a key that only the other config's backbone has."""

    def __repr__(self) -> str:
        return "-"


ABSENT = _Absent()


@dataclass(frozen=True)
class Difference:
    """One key with two values."""

    section: str
    """The name of the section; empty for `run_dir`."""
    key: str
    left: Any
    """Plain data, or `ABSENT`."""
    right: Any
    left_written: bool
    """Whether the file writes it; else it is a default."""
    right_written: bool


@dataclass(frozen=True)
class ConfigDiff:
    """Two configs compared."""

    left: str
    """The files' names."""
    right: str
    values: tuple[Difference, ...]
    """In the order of the schema."""
    only_left: tuple[Finding, ...]
    """Findings of the left config. The right one has no finding with the same code at the same key."""
    only_right: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return bool(self.values or self.only_left or self.only_right)


def diff_configs(left: CheckedConfig, right: CheckedConfig) -> ConfigDiff:
    """Compare two configs as a run would read them, whatever their spelling and order.

    Args:
        left: a checked config whose `config` is not None.
        right: the same.
    """
    assert left.config is not None
    assert right.config is not None
    one, other = left.config.model_dump(mode="json"), right.config.model_dump(mode="json")
    values: list[Difference] = []
    for name in RunConfig.model_fields:
        pairs = [("", name, one[name], other[name])]
        if isinstance(one[name], Mapping):
            keys = dict.fromkeys([*one[name], *other[name]])
            pairs = [(name, key, one[name].get(key, ABSENT), other[name].get(key, ABSENT)) for key in keys]
        for section, key, before, after in pairs:
            if before != after:
                path = (section, key) if section else (key,)
                written = left.source.written(path), right.source.written(path)
                values.append(Difference(section, key, before, after, *written))
    return ConfigDiff(
        left.source.file,
        right.source.file,
        tuple(values),
        _only(left.findings, right.findings),
        _only(right.findings, left.findings),
    )


def _only(findings: Sequence[Finding], others: Sequence[Finding]) -> tuple[Finding, ...]:
    known = {(other.code, other.path) for other in others}
    return tuple(finding for finding in findings if (finding.code, finding.path) not in known)


def render_values(diff: ConfigDiff, *, width: int | None = None) -> str:
    """The differing keys, grouped by section, for people.

    Args:
        diff: two configs compared.
        width: columns; if a line would be longer, its values stand below the key.
    """
    rows = [
        (
            each,
            f"{_show(each.left)}{'' if each.left_written or each.left is ABSENT else ' (default)'}",
            f"{_show(each.right)}{'' if each.right_written or each.right is ABSENT else ' (default)'}",
        )
        for each in diff.values
    ]
    key_width = max((len(each.key) for each, _, _ in rows), default=0)
    left_width = min(max((len(left) for _, left, _ in rows), default=0), 24)
    lines: list[str] = []
    section = None
    for each, left, right in rows:
        if each.section != section:
            section = each.section
            lines += [*([""] if lines else []), f"{section}:" if section else "top level:"]
        line = f"  {each.key:{key_width}}  {left:{left_width}}  →  {right}"
        if width is not None and len(line) > width:
            lines += [f"  {each.key}", f"    {left}", f"    →  {right}"]
        else:
            lines.append(line)
    return "\n".join(lines)


def _show(value: Any) -> str:
    return repr(value) if value is ABSENT else value if _is_plain(value) else json_text(value, indent=None)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value.strip() == value != ""


def render_json(diff: ConfigDiff) -> str:
    """The comparison as a JSON object. If a config's backbone does not have a key, its side is left out."""
    values = []
    for each in diff.values:
        sides = {}
        for side, value, written in (("left", each.left, each.left_written), ("right", each.right, each.right_written)):
            if value is not ABSENT:
                sides[side] = {"value": value, "written": written}
        values.append({"key": f"{each.section}.{each.key}" if each.section else each.key, **sides})
    whole = {
        "left": diff.left,
        "right": diff.right,
        "values": values,
        "only_left": [to_dict(finding) for finding in shown(diff.only_left)],
        "only_right": [to_dict(finding) for finding in shown(diff.only_right)],
    }
    return json_text(whole)
