"""A config as it was written: plain data, the place of every key and value, and overrides of `--set`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttt.config.findings import Code, Family, Finding, Place, Severity
from ttt.config.nodes import MAX_LEVELS, Node, Reading, SourceError, decode, flatten
from ttt.config.places import KeyPath, Located, dotted

TTT108 = Code("TTT108", "an override that cannot be applied", Severity.ERROR, family=Family.SCHEMA, home=__name__)

MAX_OVERRIDES = 256
MAX_IN_OVERRIDES = 1 << 17  # characters of all overrides together; Linux passes no more in one argument


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
    """False if the text could not be read to its end; then `data` is empty."""

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """The place of a value, or of its key. If it is not written, the place of the nearest section that is.

        If a value is on another line than its key, its place is the key, so that the quoted line shows the key.
        """
        while path and path not in self.places:
            path = path[:-1]
        if not path:
            return Place(self.file, 1, 1)
        located = self.places[path]
        elsewhere = located.value.line != located.key.line or located.value.width == 0
        return located.key if key or elsewhere else located.value

    def written(self, path: KeyPath) -> bool:
        """Whether the file, or an override, writes a value at this path."""
        return path in self.places

    def with_overrides(self, overrides: Sequence[str]) -> Source:
        """This source with overrides `section.key=value` applied. Values are read as YAML; the last one wins."""
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
    """Read a config from text or bytes. Errors in it become findings, never an exception."""
    try:
        text = decode(content, file)
        reading = Reading(file, text)
        data, places = reading.mapping()
        return Source(file, data, places, tuple(reading.findings))
    except SourceError as stop:
        return Source(file, {}, {}, (stop.finding,), complete=False)


_QUOTED = 80


def _too_many(overrides: Sequence[str]) -> Finding | None:
    """The finding if there are too many overrides, or too long ones; then none is read."""
    length = sum(map(len, overrides))
    if len(overrides) > MAX_OVERRIDES:
        message = f"{len(overrides):,} overrides are more than {MAX_OVERRIDES}, so none is read"
    elif length > MAX_IN_OVERRIDES:
        message = f"overrides of {length:,} characters are longer than {MAX_IN_OVERRIDES:,}, so none is read"
    else:
        return None
    return TTT108.at("", message, "write a config", place=Place("--set"))


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _override(data: dict[str, Any], places: dict[KeyPath, Located], override: str) -> Finding | None:
    """Write one override into `data` and `places`. Returns a finding if that is not possible."""
    place = Place(f"--set {override}")

    def refuse(message: str, fix: str) -> Finding:
        return TTT108.at(key, message, fix, place=place)

    key, equals, written = override.partition("=")
    key = key.strip()
    if any("\ud800" <= letter <= "\udfff" for letter in override):  # bytes of the command line that are not UTF-8
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
        reading = Reading(place.file, decode(written, place.file))
        node = reading.document() or Node(None, place)
        reading.check_levels(len(path) + node.levels)
        problems = reading.findings
    except SourceError as stop:
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
    section[path[-1]] = flatten(node, path, nested)
    if isinstance(before, dict | list):
        for old in [old for old in places if old[: len(path)] == path]:
            del places[old]
    for new in (path, *nested):
        places[new] = Located(place, place)
    return None
