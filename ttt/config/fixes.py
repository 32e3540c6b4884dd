"""Fixes that need no thought, written into the text of a config: comments, order and spacing stay as they are.

An edit is kept only where it does what it says and nothing else: the edited text is read again, and its data must be
the old data with that one key renamed or that one value replaced. So an edit inside a value that `*aliases` repeat,
or one that would write a key twice, is left to the user.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ttt.config.diagnostics import Finding
from ttt.config.load import CheckedConfig
from ttt.config.source import LINE_BREAK, KeyPath, Source, parse_source, resolve

UNKNOWN_KEY = "TTT101"
"""The code whose replacement is the key's; every other's is the value's."""

_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Fixed:
    """A config's text, mended as far as that can be done without its author."""

    text: str
    fixed: tuple[Finding, ...]
    """What is no longer wrong, in the order of the fixing."""
    checked: CheckedConfig
    """What is found in the new text."""


@dataclass(frozen=True)
class _Edit:
    """One finding's replacement: where the characters are, and what the data says afterwards."""

    finding: Finding
    start: int
    end: int
    path: KeyPath
    renames: bool
    """Whether the characters are the key at `path`; else they are its value."""

    @property
    def replacement(self) -> str:
        assert self.finding.replacement is not None
        return self.finding.replacement


def fix_text(text: str, check: Callable[[str], CheckedConfig]) -> Fixed:
    """Apply every fix that needs no thought, those that an earlier one brings to light included.

    What comes out is a fixed point: fixing it again changes nothing.

    Args:
        text: a config.
        check: says what is wrong with a text, as `check_config` does.
    """
    mark = _BYTE_ORDER_MARK if text.startswith(_BYTE_ORDER_MARK) else ""
    text = text.removeprefix(mark)
    checked = check(text)
    fixed: list[Finding] = []
    seen = {text}
    while True:
        source = parse_source(text, file=checked.source.file)  # as written: overrides are not in the file
        edits = _edits(text, checked.findings, source)
        kept = _that_hold(text, edits, source) if edits else []
        new = _apply(text, kept)
        if new in seen:
            return Fixed(mark + text, tuple(fixed), checked)
        seen.add(new)
        text, checked = new, check(new)
        fixed.extend(edit.finding for edit in kept)


def unified_diff(before: str, after: str, *, file: str) -> str:
    """What the fixes change, as `diff -u` shows it; empty where that is nothing."""
    shown: list[str] = []
    for line in difflib.unified_diff(_lines(before), _lines(after), fromfile=file, tofile=f"{file} (fixed)"):
        text = LINE_BREAK.sub("", line)
        shown += [text] if text != line else [text, "\\ No newline at end of file"]
    return "\n".join(shown)


def _lines(text: str) -> list[str]:
    """The lines with what ends them."""
    ends = [match.end() for match in LINE_BREAK.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if start < end]


# --- edits ---


def _edits(text: str, findings: Sequence[Finding], source: Source) -> list[_Edit]:
    """The edits that the findings ask for, in the order of the text, none inside another."""
    starts = [0, *(match.end() for match in LINE_BREAK.finditer(text))]
    taken = set(source.places)
    edits: list[_Edit] = []
    for finding in findings:
        path: KeyPath = tuple(int(word) if word.isdecimal() else word for word in finding.path.split("."))
        if finding.replacement is None or finding.place is None or finding.place.line is None:
            continue
        if path not in source.places:  # an override, or a default
            continue
        renames = finding.code == UNKNOWN_KEY
        new_path = (*path[:-1], finding.replacement)
        if renames and new_path in taken:  # it would be written twice
            continue
        taken.add(new_path)
        place = source.places[path].key if renames else source.places[path].value
        assert place.line is not None
        assert place.column is not None
        start = starts[place.line - 1] + place.column - 1
        edits.append(_Edit(finding, start, start + place.width, path, renames))
    edits.sort(key=lambda edit: (edit.start, edit.end))
    apart: list[_Edit] = []
    for edit in edits:
        overlaps = apart and edit.start < apart[-1].end
        if not overlaps and text[edit.start : edit.end] != edit.replacement:
            apart.append(edit)
    return apart


def _apply(text: str, edits: Sequence[_Edit]) -> str:
    pieces: list[str] = []
    at = 0
    for edit in edits:
        pieces += text[at : edit.start], edit.replacement
        at = edit.end
    return "".join(pieces) + text[at:]


def _that_hold(text: str, edits: Sequence[_Edit], source: Source) -> list[_Edit]:
    """The edits that do what they say: all of them, else those of each half."""
    if _does_what_it_says(text, edits, source):
        return list(edits)
    if len(edits) == 1:
        return []
    half = len(edits) // 2
    first = _that_hold(text, edits[:half], source)
    second = _that_hold(text, edits[half:], source)
    together = [*first, *second]
    return together if _does_what_it_says(text, together, source) else first or second


def _does_what_it_says(text: str, edits: Sequence[_Edit], source: Source) -> bool:
    expected = _copy(source.data)
    # Values first: renaming a section would move what is in it.
    for edit in sorted(edits, key=lambda edit: (edit.renames, -len(edit.path))):
        if not _edit_data(expected, edit):
            return False
    after = parse_source(_apply(text, edits), file=source.file)
    return after.complete and after.data == expected and len(after.findings) <= len(source.findings)


def _edit_data(data: Any, edit: _Edit) -> bool:
    """Make the edit in plain data; whether that can be done."""
    for part in edit.path[:-1]:
        data = data[part]
    last = edit.path[-1]
    if not edit.renames:
        data[last] = resolve(edit.replacement)
        return True
    if edit.replacement in data:
        return False
    data[edit.replacement] = data.pop(last)
    return True


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
