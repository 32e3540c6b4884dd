"""The keys of a run's model: their names, sections, types and descriptions."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ttt.config.places import KeyPath
from ttt.config.section import descriptions

_UNIONS = (typing.Union, types.UnionType)


@functools.cache
def keys_of(model: type[BaseModel] | None) -> tuple[str, ...]:
    """The keys of a section; empty if `model` is None."""
    return tuple(model.model_fields) if model is not None else ()


@functools.cache
def sections_of(model: type[BaseModel]) -> list[KeyPath]:
    """The paths of the top level and of each section."""
    return [(), *((name,) for name in model.model_fields if section_at(model, (name,)) is not None)]


@functools.cache
def homes_of(model: type[BaseModel]) -> dict[str, list[KeyPath]]:
    """For each key, the sections that have it."""
    homes: dict[str, list[KeyPath]] = {}
    for section in sections_of(model):
        for key in keys_of(section_at(model, section)):
            homes.setdefault(key, []).append(section)
    return homes


@functools.lru_cache(maxsize=256)
def section_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model of the section at a path; None if there is a plain value or no such key."""
    return next(filter(None, map(_as_section, types_at(model, path))), None)


def field_at(model: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    """The field of a key. For a value in a list, the field of the list's key."""
    path = key_of(path)
    section = section_at(model, path[:-1]) if path else None
    return section.model_fields.get(str(path[-1])) if section is not None else None


def key_of(path: KeyPath) -> KeyPath:
    """The path of a key. For a value in a list, the path of the list's key."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    return path


def types_at(model: type[BaseModel], path: KeyPath) -> list[Any]:
    """The types that a value may have, each member of a union by itself; empty if there is no such key."""
    found: list[Any] = [model]
    for part in path:
        found = [member for annotation in found for member in _members_of(_part_of(annotation, part))]
    return found


def choices_at(model: type[BaseModel], path: KeyPath) -> list[Any]:
    """The values that a key's literal and enum types allow."""
    found: list[Any] = []
    for annotation in types_at(model, path):
        if typing.get_origin(annotation) is typing.Literal:
            found += typing.get_args(annotation)
        elif isinstance(annotation, type) and issubclass(annotation, Enum):
            found += [member.value for member in annotation]
    return found


def described(model: type[BaseModel], path: KeyPath) -> str:
    """The first line of a key's description, without its full stop."""
    section = section_at(model, path[:-1]) if path else None
    text = descriptions(section).get(str(path[-1]), "") if section is not None else ""
    return text.split("\n")[0].rstrip(".")


def _members_of(annotation: Any) -> Iterator[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _members_of(arguments[0])
    elif origin in _UNIONS:
        for argument in arguments:
            yield from _members_of(argument)
    elif isinstance(annotation, typing.TypeVar):  # a section of `RunConfig` where the backbone is not known
        yield from _members_of(annotation.__bound__)
    elif annotation is not None:
        yield annotation


def _as_section(annotation: Any) -> type[BaseModel] | None:
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return annotation if plain and issubclass(annotation, BaseModel) else None


def _part_of(annotation: Any, part: str | int) -> Any:
    """The type of a section's key, or of a value in a list or a mapping; None if there is none."""
    section = _as_section(annotation)
    if section is not None:
        info = section.model_fields.get(str(part))
        return info.annotation if info is not None else None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if not isinstance(origin, type) or not arguments:
        return None
    if isinstance(part, str):
        return arguments[-1] if issubclass(origin, Mapping) else None
    if origin is tuple and Ellipsis not in arguments:
        return arguments[part] if part < len(arguments) else None
    return arguments[0]
