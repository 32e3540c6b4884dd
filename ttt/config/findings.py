"""A finding: what is wrong with a config, where, what will happen and what to write instead.

Codes are stable and come in families: TTT0xx file and syntax, TTT1xx schema and shape, TTT2xx checkpointing,
TTT3xx causality and state, TTT4xx memory and disk, TTT5xx data and evaluation, TTT6xx environment, TTT7xx optimisation,
TTT8xx plugins, TTT9xx a law that the probe found broken, by its number.
A plugin's rules use a prefix of their own.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from ttt.printable import as_line, json_text, printable

CODES: dict[str, str] = {
    "TTT001": "not valid YAML",
    "TTT002": "a key is written twice",
    "TTT003": "the file is empty",
    "TTT004": "the file is no mapping of sections",
    "TTT005": "the file is too large",
    "TTT006": "nested too deeply",
    "TTT007": "too many values",
    "TTT008": "not UTF-8 text",
    "TTT009": "a character that text does not have",
    "TTT010": "a YAML tag",
    "TTT011": "a key that is not a word",
    "TTT012": "more than one document",
    "TTT013": "an anchor inside itself, or an alias without an anchor",
    "TTT101": "unknown key",
    "TTT102": "wrong type",
    "TTT103": "a value that is not allowed",
    "TTT104": "a required key is missing",
    "TTT105": "a key in the wrong section",
    "TTT106": "keys that do not fit together",
    "TTT107": "an option of another backbone",
    "TTT108": "an override that cannot be applied",
    "TTT111": "a layer that the backbone does not have",
    "TTT112": "a width that does not divide into heads",
    "TTT113": "rotary embedding on heads of odd width",
    "TTT114": "an inner model without hidden units",
    "TTT201": "one checkpoint per mini-batch",
    "TTT202": "checkpoints nested in checkpoints",
    "TTT203": "a group size far from the best",
    "TTT204": "a group larger than the sequence",
    "TTT205": "no rematerialisation where memory will not do",
    "TTT301": "a non-causal update in a causal backbone",
    "TTT302": "carried state with shuffled data",
    "TTT303": "a window shorter than one mini-batch",
    "TTT304": "carried state without a boundary",
    "TTT305": "carried state with nothing to carry",
    "TTT306": "windows that do not divide into mini-batches",
    "TTT401": "a run that does not fit in memory",
    "TTT402": "a run that may not fit in memory",
    "TTT403": "a checkpoint larger than the disk's free space",
    "TTT404": "checkpoints larger than the disk's free space",
    "TTT405": "what a run costs",
    "TTT501": "data that is not there",
    "TTT502": "evaluation on the training data",
    "TTT503": "an evaluation that never comes",
    "TTT504": "lines of data that are no JSON",
    "TTT505": "lines of data without their keys",
    "TTT506": "recordings that are not there",
    "TTT507": "recordings shorter than a window",
    "TTT508": "recordings without what lies beside them",
    "TTT509": "weights to start from that are not there",
    "TTT510": "weights to start from that belong to something else",
    "TTT511": "a run that goes on with other settings than what it starts from",
    "TTT601": "a run_dir that cannot be written",
    "TTT602": "one run in several processes",
    "TTT603": "an implementation of the scan that cannot be compiled",
    "TTT604": "compiling without a compiler",
    "TTT605": "a file of the backbone that cannot be read",
    "TTT701": "a warm-up longer than the run",
    "TTT702": "nothing that learns",
    "TTT703": "gates that can never open",
    "TTT704": "gates that hardly open within the run",
    "TTT705": "an inner learning rate outside the literature",
    "TTT706": "autocast on parameters that need none",
    "TTT801": "unknown backbone",
    "TTT802": "a broken plugin",
    "TTT803": "a plugin that failed while it was asked",
    "TTT901": "a forward pass that writes",
    "TTT902": "gradients that depend on rematerialisation",
    "TTT903": "the future reaches the past",
    "TTT904": "a stream in pieces is not the whole",
    "TTT905": "rows of a batch that see each other",
    "TTT906": "a closed gate that is not the plain backbone",
    "TTT910": "a TTT layer that does nothing",
}
"""Every code of the core, with its title."""

ENVIRONMENT_CODES = frozenset(
    {
        *("TTT403", "TTT501", "TTT504", "TTT505", "TTT506", "TTT508", "TTT509"),
        *("TTT601", "TTT602", "TTT603", "TTT604", "TTT605", "TTT802", "TTT803"),
    }
)
"""Codes that blame the machine that the config was read on, not the config."""


class Severity(str, Enum):
    """How bad it is."""

    ERROR = "error"
    """The run cannot start, or would not be what the config says."""
    WARNING = "warning"
    """The run starts, and most likely should not."""
    NOTE = "note"
    """Worth knowing."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Place:
    """Where something is written."""

    file: str
    """The file as the user named it, or the override, `--set ttt.layers=all`."""
    line: int | None = None
    """From 1; None for what is not in a file."""
    column: int | None = None
    """From 1, in characters."""
    text: str = ""
    """The line itself, to be quoted; empty where there is nothing to quote."""
    width: int = 1
    """How many characters from `column` on are meant."""

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found."""

    code: str
    """As in `CODES`, or of a plugin's own prefix."""
    severity: Severity
    path: str
    """The key, dotted: `ttt.layers.2`; empty for the file as a whole."""
    message: str
    """What is wrong and what will happen, one sentence without a full stop."""
    fix: str = ""
    """What to write instead."""
    value: Any = None
    """The value that was found, or the number that the finding rests on; plain data."""
    place: Place | None = None
    """Where; a rule leaves it out, and the key's place is filled in."""
    replacement: str | None = None
    """What `ttt check --fix` writes there instead, where that needs no thought: the key of TTT101, else the value."""
    moves_to: str | None = None
    """The section that `--fix` moves the key to, where there is one alone; empty is the top level."""
    of_environment: bool = False
    """For a plugin's code: whether it blames the machine that the config was read on, as `ENVIRONMENT_CODES` do."""


def blames_environment(finding: Finding) -> bool:
    """Whether a finding is about the machine that the config was read on, not about the config."""
    return finding.of_environment or finding.code in ENVIRONMENT_CODES


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether one of them is an error."""
    return any(finding.severity is Severity.ERROR for finding in findings)


def summary(findings: Sequence[Finding]) -> str:
    """How many of each: `2 errors, 1 warning`; `no findings` for none."""
    counts = []
    for severity in Severity:
        count = sum(finding.severity is severity for finding in findings)
        if count:
            counts.append(f"{count} {severity}{'s' if count > 1 else ''}")
    return ", ".join(counts) or "no findings"


# --- what is shown ---

MOST_OF_A_KIND = 100
"""Findings of one code in one file that are shown; the others are counted."""
MOST_CHARACTERS = 1000
"""Of a message, a fix, a value or a quoted line that are shown."""


def shown(findings: Iterable[Finding]) -> list[Finding]:
    """The findings as they are shown: of each code in each file the first hundred, then how many more there are.

    A text of theirs that is longer than a screen is shortened in its middle.
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
    """What stands for the findings of a kind that are not shown."""
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
    )


def _shortened(finding: Finding) -> Finding:
    """The finding with nothing in it longer than a screen."""
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
    """The part of a place's line around its column, at most so many characters, and how many are left out before."""
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
        width: columns to wrap at; None leaves every message on one line, for logs and `grep`.
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
    """Lines of a text whose first begins after `used` columns and whose others after `indent`."""
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
    """Columns that a text takes on a terminal."""
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
        "title": CODES.get(finding.code, ""),
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
    """Findings as workflow commands of GitHub Actions, which shows them beside the lines of a pull request."""
    return "\n".join(_workflow_command(finding) for finding in shown(findings))


def _workflow_command(finding: Finding) -> str:
    place = finding.place or Place("")
    title = f"{finding.code} {CODES.get(finding.code, finding.path)}".strip()
    properties: dict[str, object] = {"title": title}
    if place.line is not None and place.column is not None:
        end = place.column + max(place.width, 1)
        properties = {"file": place.file, "line": place.line, "col": place.column, "endColumn": end, **properties}
    message = finding.message if place.line is not None or not place.file else f"{place}: {finding.message}"
    text = message + (f"\nfix: {finding.fix}" if finding.fix else "")
    written = ",".join(f"{key}={_escaped(str(value), property=True)}" for key, value in properties.items())
    return f"::{_GITHUB_LEVELS[finding.severity]} {written}::{_escaped(text)}".replace("##[", "##(")


def _escaped(text: str, *, property: bool = False) -> str:
    """The text as a workflow command carries it, in one line."""
    text = "%0A".join(printable(line) for line in text.replace("%", "%25").replace("\r", "%0D").split("\n"))
    return text.replace(":", "%3A").replace(",", "%2C") if property else text
