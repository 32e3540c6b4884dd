"""Read a YAML text into a tree of nodes, each with its place, and report what is wrong with it as findings.

Bytes, levels and values (with every alias expanded) are limited, so that a hostile file costs no more than a good one.
Only what a config needs is accepted: mappings with words as keys, lists, and scalars.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import yaml

from ttt.config.findings import Code, Family, Finding, Place, Severity
from ttt.config.places import KeyPath, Located, dotted
from ttt.config.scalars import resolve
from ttt.foreign import ENOUGH, foreign

_code = partial(Code, severity=Severity.ERROR, family=Family.SYNTAX, home=__name__)
TTT001 = _code("TTT001", "not valid YAML")
TTT002 = _code("TTT002", "a key is written twice")
TTT003 = _code("TTT003", "the file is empty")
TTT004 = _code("TTT004", "the file is not a mapping of sections")
TTT005 = _code("TTT005", "the file is too large")
TTT006 = _code("TTT006", "nested too deeply")
TTT007 = _code("TTT007", "too many values")
TTT008 = _code("TTT008", "not UTF-8 text")
TTT009 = _code("TTT009", "a character that text does not have")
TTT010 = _code("TTT010", "a YAML tag")
TTT011 = _code("TTT011", "a key that is not a word")
TTT012 = _code("TTT012", "more than one document")
TTT013 = _code("TTT013", "an anchor inside itself, or an alias without an anchor")

MAX_BYTES = 1 << 20
MAX_LEVELS = 32
MAX_VALUES = 10_000
_TOO_DEEP = f"nested more than {MAX_LEVELS} levels deep", "a config has two or three"
LINE_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")
"""What ends a line in YAML."""
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both give the same events; libyaml is the fast one


class SourceError(Exception):
    """Reading cannot go on; has the parts of a finding."""

    def __init__(self, code: Code, place: Place, message: str, fix: str, value: Any = None) -> None:
        super().__init__(message)
        self.finding = code.at("", message, fix, value=value, place=place)


def _lines(text: str) -> list[str]:
    return LINE_BREAK.split(text)


def _place_at(file: str, text: str, offset: int) -> Place:
    before = _lines(text[:offset])
    line = _lines(text)[len(before) - 1]
    return Place(file, len(before), len(before[-1]) + 1, line)


def decode(content: str | bytes, file: str) -> str:
    """The text of a file.

    Raises:
        SourceError: it is too large, not UTF-8, or has characters that do not belong in a text.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    if len(content) > MAX_BYTES:
        raise SourceError(
            TTT005,
            Place(file, 1, 1),
            f"the file is larger than {MAX_BYTES >> 20} MiB",
            "name a config; they are short",
        )
    kind = foreign(content[:ENOUGH], file)
    if kind is not None:
        raise SourceError(TTT008, Place(file, 1, 1), f"the file is {kind.words}, not a config", kind.way_to_text)
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place_at(file, content.decode("utf-8", "replace"), len(content[: error.start].decode("utf-8")))
        raise SourceError(
            TTT008,
            place,
            f"the byte 0x{content[error.start]:02x} is not UTF-8: this is another encoding, or no text at all",
            "save the file as UTF-8",
        ) from None
    odd = _NOT_TEXT.search(text)
    offset = odd.start() if odd else max(text.find("\ufffe"), text.find("\uffff"))
    if offset >= 0:
        character = text[offset]
        raise SourceError(
            TTT009,
            _place_at(file, text, offset),
            f"the character U+{ord(character):04X} is not text" + (": a NUL" if character == "\0" else ""),
            "remove it; if the file is binary, name another",
        )
    return text


def _events(text: str) -> Generator[Any, None, None]:
    yield from yaml.parse(text, Loader=_LOADER)


@dataclass
class Node:
    """A value with its place. `children` are the parts of a mapping or list, in order."""

    value: Any
    place: Place
    children: list[tuple[str | int, Place, Node]] = field(default_factory=list)
    size: int = 1
    """The number of values in it, itself included, every alias expanded."""
    levels: int = 0
    """How deep mappings and lists are nested in it."""


class Reading:
    """Reads one document from the parser's events, and checks it while reading."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.text = text
        self.lines = _lines(text)
        self.findings: list[Finding] = []
        self.anchors: dict[str, Node | None] = {}  # None while the node is being read
        self.values = 0

    def mapping(self) -> tuple[dict[str, Any], dict[KeyPath, Located]]:
        """The data of the document, a mapping, and the places of its keys and values.

        Raises:
            SourceError: the document is empty, not a mapping, or cannot be read.
        """
        root = self.document()
        if root is None or root.value is None:
            raise SourceError(
                TTT003,
                Place(self.file, 1, 1),
                "the file is empty",
                "write a config; `ttt init --backbone NAME` makes one",
            )
        if not isinstance(root.value, dict):
            kind = "list" if isinstance(root.value, list) else "text"
            raise SourceError(
                TTT004,
                root.place,
                f"a config is sections of `key: value`, but this is a {kind}",
                "write `backbone:` and the other sections at the left margin, with a space after each colon",
            )
        places: dict[KeyPath, Located] = {}
        data = flatten(root, (), places)
        return data, places

    def document(self) -> Node | None:
        """The root of the only document; None if there is none."""
        with contextlib.closing(_events(self.text)) as events:
            try:
                root = None
                for event in events:
                    if isinstance(event, yaml.DocumentStartEvent):
                        if root is not None:
                            raise SourceError(
                                TTT012,
                                self._place(event),
                                "a second document begins here; a config is one",
                                "remove the line `---` and what belongs to the other run",
                            )
                        root = self._node(next(events), events, ())
                return root
            except yaml.MarkedYAMLError as error:
                raise self._syntax(error) from None
            except yaml.YAMLError as error:
                raise SourceError(
                    TTT001, Place(self.file, 1, 1), f"not YAML: {error}", "write `key: value` lines"
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
            raise SourceError(
                TTT007,
                place,
                f"more than {MAX_VALUES:,} values, aliases expanded: no config, or one that is meant to exhaust memory",
                "write the values out where they are needed",
            )

    def check_levels(self, levels: int, place: Place | None = None) -> None:
        """Refuse values that are nested too deep.

        Raises:
            SourceError: there are more than `MAX_LEVELS` levels.
        """
        if levels > MAX_LEVELS:
            raise SourceError(
                TTT006,
                place or Place(self.file),
                *_TOO_DEEP,
            )

    def _node(self, event: Any, events: Iterator[Any], path: KeyPath) -> Node:
        """Read the node that begins with `event`; take the rest of it from `events`."""
        place = self._place(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), place, len(path))
        self._count(1, place)
        if event.tag is not None:
            raise SourceError(
                TTT010,
                place,
                f"the tag {_short_tag(event.tag)}: a config holds plain values only, and nothing in it is run",
                "remove the tag",
            )
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = Node(resolve(event.value) if event.implicit[0] else event.value, place)
        else:
            self.check_levels(len(path) + 1, place)
            read = self._list if isinstance(event, yaml.SequenceStartEvent) else self._mapping
            node = read(events, place, path)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _alias(self, anchor: str, place: Place, level: int) -> Node:
        target = self.anchors.get(anchor)
        if target is None:
            inside = anchor in self.anchors
            raise SourceError(
                TTT013,
                place,
                f"`*{anchor}` stands inside what `&{anchor}` names, without end"
                if inside
                else f"`*{anchor}` repeats a value, but no `&{anchor}` before it names one",
                "write the value out, or quote a text that begins with `*`",
            )
        self._count(target.size, place)
        self.check_levels(level + target.levels, place)
        return target

    def _list(self, events: Iterator[Any], place: Place, path: KeyPath) -> Node:
        node = Node([], place)
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            child = self._node(event, events, (*path, len(node.children)))
            self._add(node, len(node.children), child.place, child)
        return node

    def _mapping(self, events: Iterator[Any], place: Place, path: KeyPath) -> Node:
        node = Node({}, place)
        written: dict[str, Place] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key, key_place = self._key(event)
            child = self._node(next(events), events, (*path, key))
            if key in written:
                first = written[key]
                self.findings.append(
                    TTT002.at(
                        dotted((*path, key)),
                        f"`{key}` is written twice: first in line {first.line}, and again here",
                        "keep one of the two",
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
                raise SourceError(TTT011, place, "`<<` merges mappings in old YAML only", "write the keys out")
            return event.value, place
        raise SourceError(
            TTT011, place, "a key is a word, not a list, a mapping, an alias or a tag", "write `key: value`"
        )

    def _add(self, node: Node, key: str | int, key_place: Place, child: Node) -> None:
        node.children.append((key, key_place, child))
        node.size += child.size
        node.levels = max(node.levels, child.levels + 1)

    def _syntax(self, error: yaml.MarkedYAMLError) -> SourceError:
        from ttt.config.complaints import explain_complaint

        mark, opened = error.problem_mark or error.context_mark, error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        problem = str(error.problem or "")
        if "nesting depth" in problem:  # libyaml has its own limit, and reads ahead
            place = Place(self.file, line + 1, column + 1, self._line(line))
            return SourceError(TTT006, place, *_TOO_DEEP)
        message, fix, at_opening = explain_complaint(problem, str(error.context or ""), self._line(line), column)
        if at_opening and opened is not None:
            line, column = opened.line, opened.column
        while line > 0 and line >= len(self.lines) - 1 and not self._line(line).strip():  # past the end
            line -= 1
            column = max(len(self._line(line)) - 1, 0)
        return SourceError(TTT001, Place(self.file, line + 1, column + 1, self._line(line)), message, fix)


def flatten(node: Node, path: KeyPath, places: dict[KeyPath, Located]) -> Any:
    """The plain data of a node, without shared parts. Fills in `places`."""
    values: dict[str | int, Any] = {}
    for key, key_place, child in node.children:
        here = (*path, key)
        places[here] = Located(key_place, child.place)
        values[key] = flatten(child, here, places)
    if isinstance(node.value, dict):
        return values
    return list(values.values()) if isinstance(node.value, list) else node.value


def _short_tag(tag: str) -> str:
    standard = "tag:yaml.org,2002:"
    return f"!!{tag.removeprefix(standard)}" if tag.startswith(standard) else tag
