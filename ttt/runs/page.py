"""The table and the curves as one HTML file that needs no network.

It sorts itself, and is dark where its reader wants it dark.
"""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

from ttt.drawing import GRID, INK
from ttt.runs.differing import ABSENT
from ttt.runs.table import Column, Table, sorting_key
from ttt.runs.text import as_csv, as_text

_STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --paper: #ffffff; --line: #d8dee4; --faint: #57606a; --band: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --faint: #9198a1; --band: #161b22 }
}
body { color: var(--ink); background: var(--paper); font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem }
h1 { font-size: 1.2rem } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
thead th { background: var(--band); border-bottom: 2px solid var(--line) }
thead th:first-child { background: var(--band) }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid currentColor }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
tbody tr:hover td { background: var(--band) }
.failed { color: #d55e00 } .running { color: #009e73 } .faint { color: var(--faint) } ul { padding-left: 1.2rem }
svg { max-width: 100%; height: auto; color: var(--ink); --grid: var(--line) }
"""
_SCRIPT = """
const body = document.querySelector("tbody");
const compare = new Intl.Collator(undefined, {numeric: true}).compare;
for (const [place, head] of [...document.querySelectorAll("thead th")].entries()) {
  head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of document.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keyed = [...body.rows].map((row) => [JSON.parse(row.cells[place].dataset.key), row]);
    keyed.sort(([[a, x]], [[b, y]]) => {
      if (a > 1 || b > 1) return a - b;
      const order = a !== b ? a - b : a === 0 ? x - y : compare(x, y);
      return up ? order : -order;
    });
    body.append(...keyed.map(([, row]) => row));
  });
}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page_of(table: Table, *, title: str, picture: bytes | None) -> str:
    """The table as an HTML page.

    Args:
        table: the runs.
        title: of the page.
        picture: the curves as SVG; None if there are none.
    """
    left_out = [str(each) for each in table.left_out]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escaped(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{_escaped(title)}</h1>",
            '<p class="faint">A click on a column sorts by it. “closed” is the plain backbone, without what was '
            "trained; keys of the config stand here where runs differ in them.</p>",
            f'<div class="wide"><table><thead><tr>{_heads(table)}</tr></thead>',
            f"<tbody>{_rows(table)}</tbody></table></div>",
            _listed("What to know", table.notes),
            _listed("Left out", left_out),
            _inline(picture) if picture else "",
            f"<script>{_SCRIPT}</script></body></html>",
            "",
        ]
    )


def _heads(table: Table) -> str:
    return "".join(
        f'<th scope="col" title="{_escaped(column.key)}"><button type="button">'
        f"{_escaped(column.head if column.main else column.key)}</button></th>"
        for column in table.columns
    )


def _rows(table: Table) -> str:
    rows = ("".join(_cell(column, column.values[row]) for column in table.columns) for row in range(len(table.runs)))
    return "\n".join(f"<tr>{row}</tr>" for row in rows)


def _cell(column: Column, value: Any) -> str:
    key = json.dumps(_key(value))
    of_state = f' class="{_escaped(value)}"' if column.key == "state" else ""
    return (
        f'<td data-key="{_escaped(key)}" title="{_escaped(as_csv(column, value))}"{of_state}>'
        f"{_escaped(as_text(column, value))}</td>"
    )


def _key(value: Any) -> list[Any]:
    """What the script sorts by: a class, then a value; the order is `sorting_key`'s."""
    if value is ABSENT:
        return [3, 0]
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return [2, 0]
    return [sorting_key(value)[0], value if isinstance(value, (int, float)) else str(value)]


def _listed(title: str, lines: Any) -> str:
    if not lines:
        return ""
    return f"<h2>{title}</h2><ul>{''.join(f'<li>{_escaped(line)}</li>' for line in lines)}</ul>"


def _inline(picture: bytes) -> str:
    """The SVG as a part of the page, in its colours of ink, grid and paper."""
    text = picture.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace("#000000", "currentColor")
    text = re.sub("#ffffff", "none", text).replace(GRID, "var(--grid)")
    return f'<h2>Curves</h2><div role="img" aria-label="Curves of the runs">{text}</div>'


def _escaped(text: str) -> str:
    plain = text.encode("utf-8", "backslashreplace").decode()
    return html.escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in plain))
