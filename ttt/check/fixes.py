"""Fixes that are certain, written into the text of a config. Comments, order and spacing stay as they are.

After each edit the text is read again. The edit is kept only if the new data is the old data with that one key renamed
or moved, or that one value replaced. So an edit inside a value that `*aliases` repeat, or one that would write a key
twice, is left to the user.
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ttt.check.codes import TTT101
from ttt.check.load import CheckedConfig
from ttt.config.findings import Finding, Place
from ttt.config.nodes import LINE_BREAK
from ttt.config.places import KeyPath, path_of
from ttt.config.scalars import resolve
from ttt.config.source import Source, parse_source
from ttt.printable import printable

MOST_TRIALS = 32
"""Most rounds of edits on one file, and most readings in each round. Anything left after that is left to the user."""
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Fixed:
    """The text of a config after all certain fixes."""

    text: str
    fixed: tuple[Finding, ...]
    """The findings that were fixed, in the order of fixing."""
    checked: CheckedConfig
    """The new text, checked."""


class _Splice(NamedTuple):
    """A range of characters, and the text that replaces it."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class _Edit:
    """The fix of one finding: the characters to change, and how the data changes."""

    finding: Finding
    path: KeyPath
    splices: tuple[_Splice, ...]
    """One for a new key or value; two for a key that moves, at its old and its new place."""

    @property
    def moves(self) -> bool:
        """Whether the key at `path` moves to another section."""
        return self.finding.moves_to is not None

    @property
    def renames(self) -> bool:
        """Whether the key at `path` gets another name. If not, and it does not move, it gets another value."""
        return self.finding.code == TTT101.number  # its replacement is a key; that of every other code is a value

    @property
    def new_path(self) -> KeyPath:
        """The path of the key after the edit."""
        if self.finding.moves_to is not None:
            return (*filter(None, self.finding.moves_to.split(".")), self.path[-1])
        return (*self.path[:-1], self.replacement) if self.renames else self.path

    @property
    def replacement(self) -> str:
        assert self.finding.replacement is not None
        return self.finding.replacement


def fix_text(text: str, check: Callable[[str], CheckedConfig]) -> Fixed:
    """Apply every certain fix, also those that become visible after an earlier one.

    The result is a fixed point: fixing it again changes nothing, unless it took more than `MOST_TRIALS` rounds.

    Args:
        text: a config.
        check: checks a text, as `check_config` does.
    """
    mark = _BYTE_ORDER_MARK if text.startswith(_BYTE_ORDER_MARK) else ""
    text = text.removeprefix(mark)
    checked = check(text)
    fixed: list[Finding] = []
    seen = {text}
    for _ in range(MOST_TRIALS):
        source = parse_source(text, file=checked.source.file)  # as written: overrides are not in the file
        edits = _edits(text, checked.findings, source)
        kept = _that_hold(text, edits, source, iter(range(MOST_TRIALS))) if edits else []
        new = _apply(text, kept)
        if new in seen:
            break
        seen.add(new)
        text, checked = new, check(new)
        fixed.extend(edit.finding for edit in kept)
    return Fixed(mark + text, tuple(fixed), checked)


def unified_diff(before: str, after: str, *, file: str) -> str:
    """What the fixes change, in the format of `diff -u`; empty if nothing changes."""
    shown: list[str] = []
    name = printable(file)
    for line in difflib.unified_diff(_lines(before), _lines(after), fromfile=name, tofile=f"{name} (fixed)"):
        text = LINE_BREAK.sub("", line)
        shown += [text] if text != line else [text, "\\ No newline at end of file"]
    return "\n".join(shown)


def _lines(text: str) -> list[str]:
    """The lines of the text, line breaks included."""
    ends = [match.end() for match in LINE_BREAK.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if start < end]


# --- edits ---


def _edits(text: str, findings: Sequence[Finding], source: Source) -> list[_Edit]:
    """The edits that the findings ask for, in the order of the text. No two overlap."""
    starts = [0, *(match.end() for match in LINE_BREAK.finditer(text))]
    taken = set(source.places)
    children: dict[KeyPath, list[Place]] = {}
    for place_path, located in source.places.items():
        children.setdefault(place_path[:-1], []).append(located.key)
    edits: list[_Edit] = []
    for finding in findings:
        path = path_of(finding.path)
        fixable = finding.replacement is not None or finding.moves_to is not None
        if not fixable or finding.place is None or finding.place.line is None:
            continue
        if path not in source.places:  # an override, or a default
            continue
        edit = _Edit(finding, path, ())
        if edit.new_path != path:
            if edit.new_path in taken:  # it would be written twice
                continue
            taken.add(edit.new_path)
        splices = (
            _move(text, starts, edit, source, children) if edit.moves else _write_instead(text, starts, edit, source)
        )
        if splices:
            edits.append(replace(edit, splices=splices))
    edits.sort(key=lambda edit: edit.splices)
    apart: list[_Edit] = []
    used: list[_Splice] = []  # in order, without overlap
    for edit in edits:
        if not any(_inside(splice, used) for splice in edit.splices):
            apart.append(edit)
            for splice in edit.splices:
                bisect.insort(used, splice)
    return apart


def _inside(splice: _Splice, used: Sequence[_Splice]) -> bool:
    """Whether a splice overlaps one of `used`, which are in order."""
    before = bisect.bisect_left(used, splice.end, key=lambda other: other.start) - 1  # the last that begins before
    return before >= 0 and used[before].end > splice.start


def _write_instead(text: str, starts: Sequence[int], edit: _Edit, source: Source) -> tuple[_Splice, ...]:
    """The splice that replaces a key or value; empty if the text already says it."""
    place = source.places[edit.path].key if edit.renames else source.places[edit.path].value
    assert place.line is not None
    assert place.column is not None
    start = starts[place.line - 1] + place.column - 1
    splice = _Splice(start, start + place.width, edit.replacement)
    return () if text[splice.start : splice.end] == splice.text else (splice,)


def _move(
    text: str, starts: Sequence[int], edit: _Edit, source: Source, children_of: Mapping[KeyPath, Sequence[Place]]
) -> tuple[_Splice, ...]:
    """The splices that move a key's line, with its comment, from its section to the top of another.

    Empty if the key shares its line with another key, or if either section is written in braces: then moving the line
    would not do.
    """
    located, home = source.places[edit.path], edit.new_path[:-1]
    line = located.key.line
    assert line is not None
    ends = [*starts[1:], len(text)]
    whole = text[starts[line - 1] : ends[line - 1]]
    content = LINE_BREAK.sub("", whole)
    if located.value.line != line or content[: (located.key.column or 1) - 1].strip(" -"):
        return ()
    newline = whole[len(content) :] or _newline_of(text)
    out = _Splice(starts[line - 1], ends[line - 1], "")
    if home and home in source.places:
        header = source.places[home].key.line
        children = children_of.get(home, ())
        if header is None or any(child.line == header for child in children):
            return ()
        indent = min((child.column or 1) - 1 for child in children) if children else 2
        at, lead = ends[header - 1], "" if LINE_BREAK.search(text[starts[header - 1] : ends[header - 1]]) else newline
        return _in_order(out, _Splice(at, at, f"{lead}{' ' * indent}{content.lstrip(' ')}{newline}"))
    lead = "" if out.end == len(text) or LINE_BREAK.search(text[-1]) else newline
    section = f"{home[0]}:{newline}  " if home else ""
    return _in_order(out, _Splice(len(text), len(text), f"{lead}{section}{content.lstrip(' ')}{newline}"))


def _in_order(*splices: _Splice) -> tuple[_Splice, ...]:
    return tuple(sorted(splices))


def _newline_of(text: str) -> str:
    found = LINE_BREAK.search(text)
    return found[0] if found else "\n"


def _apply(text: str, edits: Sequence[_Edit]) -> str:
    pieces: list[str] = []
    at = 0
    for splice in sorted(splice for edit in edits for splice in edit.splices):
        pieces += text[at : splice.start], splice.text
        at = splice.end
    return "".join(pieces) + text[at:]


def _that_hold(text: str, edits: Sequence[_Edit], source: Source, trials: Iterator[int]) -> list[_Edit]:
    """The edits that do what they say: all of them, else the good ones of each half; none once `trials` are used up."""
    if next(trials, None) is None:
        return []
    if _does_what_it_says(text, edits, source):
        return list(edits)
    if len(edits) == 1:
        return []
    half = len(edits) // 2
    first = _that_hold(text, edits[:half], source, trials)
    second = _that_hold(text, edits[half:], source, trials)
    if not (first and second):
        return first or second
    together = [*first, *second]
    return together if _does_what_it_says(text, together, source) else first


def _does_what_it_says(text: str, edits: Sequence[_Edit], source: Source) -> bool:
    expected = _copy(source.data)
    # Values first, then moves: renaming a section would move what is in it.
    for edit in sorted(edits, key=lambda edit: (edit.renames, edit.moves, -len(edit.path))):
        if not _edit_data(expected, edit):
            return False
    after = parse_source(_apply(text, edits), file=source.file)
    return after.complete and after.data == expected and len(after.findings) <= len(source.findings)


def _edit_data(data: dict[str, Any], edit: _Edit) -> bool:
    """Make the edit in plain data. Returns whether that is possible."""
    section: Any = data
    for part in edit.path[:-1]:
        section = section[part]
    last = edit.path[-1]
    if not edit.renames and not edit.moves:
        section[last] = resolve(edit.replacement)
        return True
    home: Any = section
    if edit.moves:
        home = data
        for part in edit.new_path[:-1]:
            home[part] = home.get(part) or {}
            home = home[part]
    if not isinstance(home, dict) or edit.new_path[-1] in home:
        return False
    home[edit.new_path[-1]] = section.pop(last)
    if not section and edit.path[:-1]:  # a section without keys is written as null
        _set(data, edit.path[:-1], None)
    return True


def _set(data: Any, path: KeyPath, value: Any) -> None:
    for part in path[:-1]:
        data = data[part]
    data[path[-1]] = value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
