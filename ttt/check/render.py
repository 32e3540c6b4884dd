"""Findings as text, as JSON and as GitHub's workflow commands.

SARIF, the format of code scanning, is in `ttt.check.sarif`.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ttt.config.findings import Finding, Place, Severity
from ttt.printable import as_line, json_text, printable

# --- what is shown ---

MOST_OF_A_KIND = 100
"""Most findings of one code in one file that are shown; the others are counted."""
MOST_CHARACTERS = 1000
"""Most characters that are shown of a message, a fix, a value or a quoted line."""


def shown(findings: Iterable[Finding]) -> list[Finding]:
    """The findings to show: the first `MOST_OF_A_KIND` of each code in each file, then how many more there are.

    A text of more than `MOST_CHARACTERS` is shortened in its middle.
    """
    listed: list[Finding] = []
    counts: dict[tuple[str, str], int] = {}
    left: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        kind = finding.code, finding.place.file if finding.place and finding.place.line is not None else ""
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= MOST_OF_A_KIND:
            listed.append(_shortened(finding))
        else:
            left.setdefault(kind, []).append(finding)
    return [*listed, *(_and_more(*kind, findings) for kind, findings in left.items())]


def _and_more(code: str, file: str, findings: Sequence[Finding]) -> Finding:
    """One finding that counts those of a code and file that are not shown."""
    severities = [finding.severity for finding in findings]
    return Finding(
        code=code,
        severity=next(severity for severity in Severity if severity in severities),
        path="",
        message=f"and {len(findings):,} more of {code}",
        fix=f"mend the first {MOST_OF_A_KIND}, and check again",
        value=len(findings),
        place=Place(file or (findings[0].place.file.partition("=")[0] if findings[0].place else "")),
        of_environment=findings[0].of_environment,
        of_training=findings[0].of_training,
        declared=findings[0].declared,
    )


def _shortened(finding: Finding) -> Finding:
    """The finding with its long texts shortened."""
    texts = {name: getattr(finding, name) for name in ("path", "message", "fix", "value", "replacement")}
    long: dict[str, Any] = {
        name: _short(text) for name, text in texts.items() if isinstance(text, str) and len(text) > MOST_CHARACTERS
    }
    place = finding.place
    if place is not None and len(place.file) > MOST_CHARACTERS:
        place = replace(place, file=_short(place.file))
    if place is not finding.place or long:
        return replace(finding, place=place, **long)
    return finding


def _short(text: str) -> str:
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}…{text[1 - half :]}"


def around(place: Place, room: int) -> tuple[str, int]:
    """At most `room` characters of a place's line around its column, and how many are left out before them."""
    start = max((place.column or 1) - 1 - room // 2, 0)
    return place.text[start : start + room], start


# --- text ---

_COLORS = {Severity.ERROR: "31", Severity.WARNING: "33", Severity.NOTE: "36"}
_QUOTE_WIDTH = 100
_INDENT = "    "


def render_text(findings: Iterable[Finding], *, color: bool = False, width: int | None = None) -> str:
    """Findings for people: place, severity, code and message, the line quoted with a caret, the fix.

    Args:
        findings: in the order to be shown.
        color: with ANSI colours.
        width: columns to wrap at; None writes every message on one line, for logs and `grep`.
    """
    return "\n".join(_render_one(finding, color=color, width=width) for finding in shown(findings))


def _render_one(finding: Finding, *, color: bool, width: int | None) -> str:
    def paint(text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if color else text

    place = finding.place or Place(finding.path or "config")
    tint = _COLORS[finding.severity]
    plain = f"{as_line(str(place))}  {finding.severity} {finding.code}  "
    painted = (
        f"{paint(as_line(str(place)), '1')}  {paint(str(finding.severity), f'1;{tint}')} {paint(finding.code, tint)}  "
    )
    first, *rest = _wrap(as_line(finding.message), width, used=len(plain), indent=len(_INDENT))
    lines = [(painted + first).rstrip(), *(_INDENT + line for line in rest)]
    if place.line is not None and around(place, 8 * _QUOTE_WIDTH)[0].strip():
        quoted, before, marked = _quote(place, width)
        number = str(place.line)
        lines.append(f"{paint(f'{number:>5} |', '2')} {quoted}")
        lines.append(f"{paint('      |', '2')} {' ' * before}{paint('^' * marked, f'1;{tint}')}")
    if finding.fix:
        hanging = len(f"{_INDENT}fix: ")
        first, *rest = _wrap(as_line(finding.fix), width, used=hanging, indent=hanging)
        lines.append(f"{_INDENT}{paint('fix:', '1')} {first}")
        lines.extend(" " * hanging + line for line in rest)
    return "\n".join(lines)


def _wrap(text: str, width: int | None, *, used: int, indent: int) -> list[str]:
    """Wrap a text into lines. The first begins after `used` columns, the others after `indent` columns."""
    if width is None:
        return [text]
    room = max(width - indent, 40)
    if width - used < 20:  # a long path leaves no room beside it
        return ["", *textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)]
    lines = textwrap.wrap(
        text, room, initial_indent=" " * (used - indent), break_long_words=False, break_on_hyphens=False
    )
    return [lines[0].lstrip(), *lines[1:]] if lines else [""]


def _cells(text: str) -> int:
    """The number of columns that a text takes on a terminal."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _quote(place: Place, width: int | None) -> tuple[str, int, int]:
    """The part of the line around the place, the columns before its caret, and the caret's columns."""
    room = min(_QUOTE_WIDTH, max((width or _QUOTE_WIDTH) - 9, 20))
    whole = len(place.text.rstrip())
    line, cut = around(place, 8 * _QUOTE_WIDTH)  # a line may be a whole file
    line = as_line(line)
    if cut + len(line) >= whole:
        line = line.rstrip()
    column = (place.column or 1) - 1 - cut
    start = 0
    if len(line) > room:
        start = max(0, min(column - room // 3, len(line) - room))
        line = line[start : start + room]
        if cut + start:
            line = "…" + line[1:]
        if cut + start + room < whole:
            line = line[:-1] + "…"
    before = max(column - start, 0)
    marked = max(_cells(line[before : before + max(place.width, 1)]), 1)
    return line, _cells(line[:before]) + max(before - len(line), 0), marked


# --- data ---


def to_dict(finding: Finding) -> dict[str, Any]:
    """A finding as plain data."""
    place = finding.place or Place("")
    return {
        "code": finding.code,
        "title": finding.title,
        "severity": finding.severity.value,
        "file": place.file,
        "line": place.line,
        "column": place.column,
        "path": finding.path,
        "message": finding.message,
        "fix": finding.fix,
        "value": finding.value,
        "replacement": finding.replacement,
        "moves_to": finding.moves_to,
    }


def render_json(findings: Iterable[Finding]) -> str:
    """Findings as a JSON list of objects."""
    return json_text([to_dict(finding) for finding in shown(findings)])


_GITHUB_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "notice"}


def render_github(findings: Iterable[Finding]) -> str:
    """Findings as workflow commands. GitHub Actions shows them beside the lines of a pull request."""
    return "\n".join(_workflow_command(finding) for finding in shown(findings))


def _workflow_command(finding: Finding) -> str:
    place = finding.place or Place("")
    title = f"{finding.code} {finding.title or finding.path}".strip()
    properties: dict[str, object] = {"title": title}
    if place.line is not None and place.column is not None:
        end = place.column + max(place.width, 1)
        properties = {"file": place.file, "line": place.line, "col": place.column, "endColumn": end, **properties}
    message = finding.message if place.line is not None or not place.file else f"{place}: {finding.message}"
    text = message + (f"\nfix: {finding.fix}" if finding.fix else "")
    written = ",".join(f"{key}={_escaped(str(value), property=True)}" for key, value in properties.items())
    return f"::{_GITHUB_LEVELS[finding.severity]} {written}::{_escaped(text)}".replace("##[", "##(")


def _escaped(text: str, *, property: bool = False) -> str:
    """The text, escaped for a workflow command, on one line."""
    text = "%0A".join(printable(line) for line in text.replace("%", "%25").replace("\r", "%0D").split("\n"))
    return text.replace(":", "%3A").replace(",", "%2C") if property else text
