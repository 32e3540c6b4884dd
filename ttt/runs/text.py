"""The table for people, and as CSV for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from ttt.amounts import show_bytes
from ttt.printable import as_line, json_text, shortened
from ttt.runs.differing import ABSENT
from ttt.runs.table import Column, Table
from ttt.words import duration_in_words

_WIDEST = 28
"""Letters of a value of a config."""
NOT_FINITE, MISSING = "nan", "–"


def text_of(table: Table, *, width: int | None = None) -> str:
    """The table in lines of text. What does not fit beside each other stands in blocks below each other.

    Args:
        table: the runs.
        width: columns of the terminal; None puts each run into one line.
    """
    columns = [(column.head, _cells(table, column)) for column in _told(table)]
    widths = [max(len(head), *map(len, cells)) for head, cells in columns]
    blocks: list[list[int]] = [[]]
    for place in range(1, len(columns)):
        taken = widths[0] + sum(widths[other] + 2 for other in blocks[-1])
        if width is not None and blocks[-1] and taken + widths[place] + 2 > width:
            blocks.append([])
        blocks[-1].append(place)
    return "\n\n".join("\n".join(_block([0, *block], columns, widths, len(table.runs))) for block in blocks)


def _told(table: Table) -> list[Column]:
    """The columns of the narrow table that say something of one run at least."""
    return [
        column
        for column in table.columns
        if column.main and (column.is_config or any(value is not ABSENT for value in column.values))
    ]


def _cells(table: Table, column: Column) -> list[str]:
    """A column's values; of a run that is not at its end also how many steps it shall have: `40/100`."""
    cells = [as_text(column, value) for value in column.values]
    if column.key != "steps":
        return cells
    totals = [run.numbers.get("max_steps") for run in table.runs]
    return [
        f"{cell}/{total:,}" if isinstance(total, int) and total != value else cell
        for cell, value, total in zip(cells, column.values, totals, strict=True)
    ]


def _block(
    block: Sequence[int], columns: Sequence[tuple[str, list[str]]], widths: Sequence[int], count: int
) -> list[str]:
    lines = []
    for row in range(-1, count):
        cells = [columns[place][0] if row < 0 else columns[place][1][row] for place in block]
        justified = [
            f"{cell:<{widths[place]}}" if place < 2 else f"{cell:>{widths[place]}}"
            for place, cell in zip(block, cells, strict=True)
        ]
        lines.append("  ".join(justified).rstrip())
    return lines


def as_text(column: Column, value: Any) -> str:
    """A value for people."""
    if value is ABSENT:
        return MISSING
    if column.is_config:
        told = value if isinstance(value, str) else json_text(value, indent=None)
        told = f"{value:.6g}" if isinstance(value, float) else told  # 0.0003, not 0.00030000000000000003
        return shortened(as_line(told), _WIDEST)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOT_FINITE
    if not isinstance(value, (int, float)):
        return as_line(str(value))
    return _number(column.key, value)


def _number(key: str, value: float) -> str:
    if key == "eval_gain":
        return f"{value:+.2%}"
    if key == "seconds":
        return duration_in_words(value)
    if key.endswith("_bytes"):
        return show_bytes(value)
    if isinstance(value, int) or key == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 else f"{value:.4g}"


def csv_of(table: Table) -> str:
    """The table as CSV (RFC 4180, with line feeds), every column under its whole name, numbers in full.

    What is not there is empty; a number that is not finite is `nan`; a config's null is `null`, its lists are JSON.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_plain(column.key) for column in table.columns])
    for row in range(len(table.runs)):
        writer.writerow([as_csv(column, column.values[row]) for column in table.columns])
    return out.getvalue()


def as_csv(column: Column, value: Any) -> str:
    """A value for a program."""
    if value is ABSENT:
        return ""
    if value is None:
        return "null" if column.is_config else NOT_FINITE
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value)
    return _plain(json_text(value, indent=None))


def _plain(text: str) -> str:
    """Text that can be written as UTF-8: a file's name may hold bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode()
