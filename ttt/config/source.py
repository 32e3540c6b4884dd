"""YAML in: plain data, and the place of every key and value.

The reading is bounded (bytes, levels, values with every alias expanded), so that a hostile file costs no more
than a good one, and it knows only what a config needs: mappings with words as keys, lists, and the scalars of
YAML 1.2's core schema. `1e-5` is a number; `on`, `off`, `yes` and `no` are text.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from ttt.config.findings import Finding, Place, Severity

MAX_BYTES = 1 << 20
MAX_LEVELS = 32
MAX_VALUES = 10_000
_TOO_DEEP = f"nested more than {MAX_LEVELS} levels deep", "a config has two or three"
MAX_OVERRIDES = 256
MAX_IN_OVERRIDES = 1 << 17  # characters, of all together; Linux passes no more in one argument

KeyPath = tuple[str | int, ...]
"""Where a value is in the data: keys of mappings, positions in lists."""


def dotted(path: KeyPath) -> str:
    """A path as people write it, `ttt.layers.2`."""
    return ".".join(map(str, path))


def path_of(text: str) -> KeyPath:
    """The path that `dotted` wrote; a word of digits is a position in a list."""
    words = text.split(".") if text else []
    return tuple(int(word) if word.isdecimal() and len(word) < 10 else word for word in words)


LINE_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")
"""What ends a line, to YAML."""
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both give the same events; libyaml is the fast one

NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
BOOLEAN = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
INTEGER = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_MAX_DIGITS = 400  # Python refuses to read numbers of thousands of digits; nobody writes them


def resolve(text: str) -> Any:
    """The value of a scalar written without quotes: null, a boolean, a number, else the text itself."""
    if NULL.match(text):
        return None
    if BOOLEAN.match(text):
        return text[0] in "tT"
    if len(text) <= _MAX_DIGITS:
        if INTEGER.match(text):
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if FLOAT.match(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


@dataclass(frozen=True)
class Located:
    """Where a key and its value are written; in a list, both are the value's."""

    key: Place
    value: Place


@dataclass(frozen=True)
class Source:
    """A config as it was written."""

    file: str
    """Its name, as the user gave it."""
    data: Mapping[str, Any]
    """Plain data: dicts, lists, str, int, float, bool, None."""
    places: Mapping[KeyPath, Located]
    """The place of every key and value of `data`."""
    findings: tuple[Finding, ...] = ()
    """What is wrong with the file itself."""
    complete: bool = True
    """False where one of the findings ended the reading; then `data` is empty."""

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """The place of a value, or of its key; where it is not written, that of the nearest section that is.

        A value on other lines than its key is placed at its key, so that the line quoted says what it is about.
        """
        while path and path not in self.places:
            path = path[:-1]
        if not path:
            return Place(self.file, 1, 1)
        located = self.places[path]
        elsewhere = located.value.line != located.key.line or located.value.width == 0
        return located.key if key or elsewhere else located.value

    def written(self, path: KeyPath) -> bool:
        """Whether the file, or an override, says something there."""
        return path in self.places

    def with_overrides(self, overrides: Sequence[str]) -> Source:
        """This source with `section.key=value` written over it, each value read as YAML; the last one wins."""
        data: dict[str, Any] = _copy(self.data)
        places, findings = dict(self.places), list(self.findings)
        refused = _too_many(overrides)
        if refused is not None:
            return replace(self, findings=(*findings, refused))
        for override in overrides:
            problem = _override(data, places, override)
            if problem:
                findings.append(problem)
        return replace(self, data=data, places=places, findings=tuple(findings))


def parse_source(content: str | bytes, *, file: str) -> Source:
    """Read a config from text or bytes; what is wrong with it becomes findings, never an exception."""
    try:
        text = _decode(content, file)
        reading = _Reading(file, text)
        return reading.source()
    except _SourceError as stop:
        return Source(file, {}, {}, (stop.finding,), complete=False)


class _SourceError(Exception):
    """The reading ends here."""

    def __init__(self, code: str, place: Place, message: str, fix: str, value: Any = None) -> None:
        super().__init__(message)
        self.finding = Finding(
            code=code, severity=Severity.ERROR, path="", message=message, fix=fix, value=value, place=place
        )


# --- bytes to text ---


def _lines(text: str) -> list[str]:
    return LINE_BREAK.split(text)


def _place_at(file: str, text: str, offset: int) -> Place:
    before = _lines(text[:offset])
    line = _lines(text)[len(before) - 1]
    return Place(file, len(before), len(before[-1]) + 1, line)


def _decode(content: str | bytes, file: str) -> str:
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    if len(content) > MAX_BYTES:
        raise _SourceError(
            "TTT005",
            Place(file, 1, 1),
            f"the file is larger than {MAX_BYTES >> 20} MiB",
            "name a config; they are short",
        )
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            raise _SourceError("TTT008", Place(file, 1, 1), f"the file is {encoding}, not UTF-8", "save it as UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place_at(file, content.decode("utf-8", "replace"), len(content[: error.start].decode("utf-8")))
        raise _SourceError(
            "TTT008",
            place,
            f"the byte 0x{content[error.start]:02x} is not UTF-8: this is another encoding, or no text at all",
            "save the file as UTF-8",
        ) from None
    odd = _NOT_TEXT.search(text)
    offset = odd.start() if odd else max(text.find("\ufffe"), text.find("\uffff"))
    if offset >= 0:
        character = text[offset]
        raise _SourceError(
            "TTT009",
            _place_at(file, text, offset),
            f"the character U+{ord(character):04X} is not text" + (": a NUL" if character == "\0" else ""),
            "remove it; if the file is binary, name another",
        )
    return text


# --- text to a tree of nodes ---


def _events(text: str) -> Generator[Any, None, None]:
    yield from yaml.parse(text, Loader=_LOADER)


@dataclass
class _Node:
    """A value with its place; `children` holds the parts of a mapping or list in order."""

    value: Any
    place: Place
    children: list[tuple[str | int, Place, _Node]] = field(default_factory=list)
    size: int = 1
    """Values in it, itself included, every alias expanded."""
    levels: int = 0
    """How deep mappings and lists nest in it."""


class _Reading:
    """One document, composed from the parser's events and checked on the way."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.text = text
        self.lines = _lines(text)
        self.findings: list[Finding] = []
        self.anchors: dict[str, _Node | None] = {}  # None while the node is being read
        self.values = 0

    def source(self) -> Source:
        root = self.document()
        if root is None or root.value is None:
            raise _SourceError(
                "TTT003",
                Place(self.file, 1, 1),
                "the file is empty",
                "write a config; `ttt init --backbone NAME` makes one",
            )
        if not isinstance(root.value, dict):
            kind = "list" if isinstance(root.value, list) else "text"
            raise _SourceError(
                "TTT004",
                root.place,
                f"a config is sections of `key: value`, but this is a {kind}",
                "write `backbone:` and the other sections at the left margin, with a space after each colon",
            )
        places: dict[KeyPath, Located] = {}
        data = _flatten(root, (), places)
        return Source(self.file, data, places, tuple(self.findings))

    def document(self) -> _Node | None:
        """The root of the only document, or None where there is none."""
        with contextlib.closing(_events(self.text)) as events:
            try:
                root = None
                for event in events:
                    if isinstance(event, yaml.DocumentStartEvent):
                        if root is not None:
                            raise _SourceError(
                                "TTT012",
                                self._place(event),
                                "a second document begins here; a config is one",
                                "remove the line `---` and what belongs to the other run",
                            )
                        root = self._node(next(events), events, ())
                return root
            except yaml.MarkedYAMLError as error:
                raise self._syntax(error) from None
            except yaml.YAMLError as error:
                raise _SourceError(
                    "TTT001", Place(self.file, 1, 1), f"not YAML: {error}", "write `key: value` lines"
                ) from None

    def _place(self, event: Any) -> Place:
        start, end = event.start_mark, event.end_mark
        width = end.column - start.column if end.line == start.line else len(self._line(start.line)) - start.column
        return Place(self.file, start.line + 1, start.column + 1, self._line(start.line), max(width, 0))

    def _line(self, index: int) -> str:
        return self.lines[index] if index < len(self.lines) else ""

    def _count(self, size: int, place: Place) -> None:
        self.values += size
        if self.values > MAX_VALUES:
            raise _SourceError(
                "TTT007",
                place,
                f"more than {MAX_VALUES:,} values, aliases expanded: no config, or one that is meant to exhaust memory",
                "write the values out where they are needed",
            )

    def check_levels(self, levels: int, place: Place | None = None) -> None:
        if levels > MAX_LEVELS:
            raise _SourceError(
                "TTT006",
                place or Place(self.file),
                *_TOO_DEEP,
            )

    def _node(self, event: Any, events: Iterator[Any], path: KeyPath) -> _Node:
        """The node that begins with `event`, the rest of it taken from `events`."""
        place = self._place(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), place, len(path))
        self._count(1, place)
        if event.tag is not None:
            raise _SourceError(
                "TTT010",
                place,
                f"the tag {_short_tag(event.tag)}: a config holds plain values only, and nothing in it is run",
                "remove the tag",
            )
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = _Node(resolve(event.value) if event.implicit[0] else event.value, place)
        else:
            self.check_levels(len(path) + 1, place)
            read = self._list if isinstance(event, yaml.SequenceStartEvent) else self._mapping
            node = read(events, place, path)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _alias(self, anchor: str, place: Place, level: int) -> _Node:
        target = self.anchors.get(anchor)
        if target is None:
            inside = anchor in self.anchors
            raise _SourceError(
                "TTT013",
                place,
                f"`*{anchor}` stands inside what `&{anchor}` names, without end"
                if inside
                else f"`*{anchor}` repeats a value, but no `&{anchor}` before it names one",
                "write the value out, or quote a text that begins with `*`",
            )
        self._count(target.size, place)
        self.check_levels(level + target.levels, place)
        return target

    def _list(self, events: Iterator[Any], place: Place, path: KeyPath) -> _Node:
        node = _Node([], place)
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            child = self._node(event, events, (*path, len(node.children)))
            self._add(node, len(node.children), child.place, child)
        return node

    def _mapping(self, events: Iterator[Any], place: Place, path: KeyPath) -> _Node:
        node = _Node({}, place)
        written: dict[str, Place] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key, key_place = self._key(event)
            child = self._node(next(events), events, (*path, key))
            if key in written:
                first = written[key]
                self.findings.append(
                    Finding(
                        code="TTT002",
                        severity=Severity.ERROR,
                        path=dotted((*path, key)),
                        message=f"`{key}` is written twice: first in line {first.line}, and again here",
                        fix="keep one of the two",
                        place=key_place,
                    )
                )
                continue
            written[key] = key_place
            self._add(node, key, key_place, child)
        return node

    def _key(self, event: Any) -> tuple[str, Place]:
        place = self._place(event)
        if isinstance(event, yaml.ScalarEvent) and event.tag is None:
            if event.value == "<<" and event.implicit[0]:
                raise _SourceError("TTT011", place, "`<<` merges mappings in old YAML only", "write the keys out")
            return event.value, place
        raise _SourceError(
            "TTT011", place, "a key is a word, not a list, a mapping, an alias or a tag", "write `key: value`"
        )

    def _add(self, node: _Node, key: str | int, key_place: Place, child: _Node) -> None:
        node.children.append((key, key_place, child))
        node.size += child.size
        node.levels = max(node.levels, child.levels + 1)

    def _syntax(self, error: yaml.MarkedYAMLError) -> _SourceError:
        mark, opened = error.problem_mark or error.context_mark, error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        problem = str(error.problem or "")
        if "nesting depth" in problem:  # libyaml's own limit, met where it looks ahead
            place = Place(self.file, line + 1, column + 1, self._line(line))
            return _SourceError("TTT006", place, *_TOO_DEEP)
        message, fix, at_opening = _explain(problem, str(error.context or ""), self._line(line), column)
        if at_opening and opened is not None:
            line, column = opened.line, opened.column
        while line > 0 and line >= len(self.lines) - 1 and not self._line(line).strip():  # past the end
            line -= 1
            column = max(len(self._line(line)) - 1, 0)
        return _SourceError("TTT001", Place(self.file, line + 1, column + 1, self._line(line)), message, fix)


def _flatten(node: _Node, path: KeyPath, places: dict[KeyPath, Located]) -> Any:
    """The plain data of a node, with nothing shared, and its places."""
    values: dict[str | int, Any] = {}
    for key, key_place, child in node.children:
        here = (*path, key)
        places[here] = Located(key_place, child.place)
        values[key] = _flatten(child, here, places)
    if isinstance(node.value, dict):
        return values
    return list(values.values()) if isinstance(node.value, list) else node.value


def _explain(problem: str, context: str, line: str, column: int) -> tuple[str, str, bool]:
    """A parser's complaint in words for who wrote the file, the way out, and whether its cause is where it began."""
    if "mapping values are not allowed" in problem:
        if ": " in line[:column]:
            return "a second `:` in one line", "quote a text with `: ` in it, or begin a new line", False
        return (
            "a key where none can be: it is indented deeper than the keys above, or the line above lacks its `:`",
            "give the keys of one section the same indentation, and each a `:`",
            False,
        )
    if "cannot start any token" in problem:
        character = line[column : column + 1]
        if character == "\t":
            return "a tab; YAML is indented with spaces only", "write spaces", False
        return f"a value cannot begin with {character!r}", "quote the text", False
    if "',' or" in problem:
        bracket = "[" if "]" in problem else "{"
        return (
            f"a `{bracket}` that is never closed, or a comma missing after it",
            "close it, commas between values",
            True,
        )
    if "quoted scalar" in context and "end of stream" in problem:
        return "a quotation mark that is never closed", "close it on the same line", True
    if "escape character" in problem:
        return "an unknown escape in double quotes", "use single quotes, in which a backslash is a backslash", False
    if "could not find expected ':'" in problem:
        return "a line without a `:` after its key", "write `key: value`, with a space after the colon", True
    if "alphabetic or numeric" in problem:
        return "a `*` or `&` begins an alias or anchor, but no name follows", "quote the text", True
    if any(words in problem for words in ("expected key", "<block end>", "'-' indicator", "block sequence entries")):
        return (
            "this line does not continue what is above it: its indentation fits no section, or a list and keys mix",
            "give the keys of one section the same indentation",
            False,
        )
    if "document start" in problem:
        return "something follows the end of the document", "remove the line `...` or what follows it", False
    return f"not YAML: {problem}" + (f" {context}" if context else ""), "write `key: value` lines", False


def _short_tag(tag: str) -> str:
    standard = "tag:yaml.org,2002:"
    return f"!!{tag.removeprefix(standard)}" if tag.startswith(standard) else tag


# --- overrides ---

_QUOTED = 80


def _too_many(overrides: Sequence[str]) -> Finding | None:
    """What is said of more overrides than anybody writes, of which none is read."""
    length = sum(map(len, overrides))
    if len(overrides) > MAX_OVERRIDES:
        message = f"{len(overrides):,} overrides are more than {MAX_OVERRIDES}, so none is read"
    elif length > MAX_IN_OVERRIDES:
        message = f"overrides of {length:,} characters are longer than {MAX_IN_OVERRIDES:,}, so none is read"
    else:
        return None
    return Finding(
        code="TTT108", severity=Severity.ERROR, path="", message=message, fix="write a config", place=Place("--set")
    )


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _override(data: dict[str, Any], places: dict[KeyPath, Located], override: str) -> Finding | None:
    """Write one override into `data` and `places`, or say why that cannot be."""
    place = Place(f"--set {override}")

    def refuse(message: str, fix: str) -> Finding:
        return Finding(code="TTT108", severity=Severity.ERROR, path=key, message=message, fix=fix, place=place)

    key, equals, written = override.partition("=")
    key = key.strip()
    if any("\ud800" <= letter <= "\udfff" for letter in override):  # bytes of the command line that are no text
        key = ""
        return refuse("an override is text, and this one is not UTF-8", "write it as UTF-8")
    if key.count(".") >= MAX_LEVELS:
        place = Place(f"--set {override[:_QUOTED]}…")
        levels, key = key.count(".") + 1, key[:_QUOTED]
        return refuse(f"its key is nested {levels:,} levels deep", "name a key of the config, as `train.lr`")
    path = tuple(key.split("."))
    if not equals or not all(path):
        return refuse("an override is `section.key=value`", "write it as `--set train.lr=1e-4`")
    try:
        reading = _Reading(place.file, _decode(written, place.file))
        node = reading.document() or _Node(None, place)
        reading.check_levels(len(path) + node.levels)
        problems = reading.findings
    except _SourceError as stop:
        problems = [stop.finding]
    if problems:
        return refuse(f"the value cannot be read: {problems[0].message}", problems[0].fix)
    section: Any = data
    for depth, part in enumerate(path[:-1], 1):
        if section.get(part) is None:
            section[part] = {}
            places.setdefault(path[:depth], Located(place, place))
        section = section[part]
        if not isinstance(section, dict):
            outer = dotted(path[:depth])
            return refuse(f"`{outer}` is a value, so nothing can be set in it", f"set `{outer}` itself")
    nested: dict[KeyPath, Located] = {}
    before = section.get(path[-1])
    section[path[-1]] = _flatten(node, path, nested)
    if isinstance(before, dict | list):
        for old in [old for old in places if old[: len(path)] == path]:
            del places[old]
    for new in (path, *nested):
        places[new] = Located(place, place)
    return None
