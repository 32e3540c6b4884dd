"""What a run needs in each layout of several devices as a table, and the lines to write, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ttt.amounts import show_bytes
from ttt.check.rules.layouts import TTT406, TTT407, in_yaml
from ttt.config.findings import Finding

_HEAD = ("replicate", "shard", "tensor", "rows × passes", "memory of one device", "sends in a step", "")


def layout_tables(findings: Iterable[Finding]) -> Iterator[list[str]]:
    """The lines of a table for each finding about layouts."""
    for finding in findings:
        if finding.code in (TTT406.number, TTT407.number):
            yield _lines(finding.value)


def _lines(value: Mapping[str, Any]) -> list[str]:
    rows = [_HEAD, *(_row(each) for each in value["layouts"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    table = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    larger = any(each["larger_step"] for each in value["layouts"])
    return [*table, *(["+ more windows in a step than the config's"] if larger else []), *_to_write(value.get("write"))]


def _row(each: Mapping[str, Any]) -> tuple[str, ...]:
    memory, sizes = each["memory_bytes"], each["layout"]
    low, high = show_bytes(memory["low"]), show_bytes(memory["high"])
    return (
        *(str(sizes[name]) for name in ("replicate", "shard", "tensor")),
        f"{each['batch_size']} × {each['num_microbatches']}{' +' if each['larger_step'] else ''}",
        f"{low} – {high}" if memory["whole_run"] else f"{low} or more",
        show_bytes(each["sent_bytes_per_step"]["total"]),
        {None: "", "no": "does not fit"}.get(each["fits"], each["fits"]),
    )


def _to_write(keys: Mapping[str, Any] | None) -> list[str]:
    """The keys of a proposal as lines of YAML."""
    if not keys:
        return []
    lines: dict[str, list[str]] = {}
    for name, value in keys.items():
        section, key = name.split(".")
        lines.setdefault(section, [f"{section}:"]).append(f"  {key}: {in_yaml(value)}")
    return ["", *(line for written in lines.values() for line in written), ""]
