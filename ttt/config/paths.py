"""Which fields of a config are paths, and how a config is written so that they hold in every folder.

A relative path in a config means the folder in which a command runs. A run's own config is read again by commands in
other folders, so it is written with absolute paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

ModelT = TypeVar("ModelT", bound=BaseModel)
_NOTE = "# it is in this folder, from which files that move along with it are found: "


@dataclass(frozen=True)
class LocalPath:
    """Marks a field whose texts are paths, or may be: `train_data: Annotated[str | None, LocalPath()] = None`.

    A text that also may be something else, such as a repository, counts as a path if something is there. In a list of
    sources each entry's `path` is one. A subclass that describes the field anew need not mark it again.

    Args:
        not_paths: values that are no paths, whatever lies in the folder.
    """

    not_paths: tuple[str, ...] = ()


def with_absolute_paths(section: ModelT) -> ModelT:
    """A config or section whose marked fields hold absolute paths, those of sections in it and of lists too.

    A path at which nothing is stays as it was written.
    """
    return _changed(
        section, lambda path: os.path.abspath(path) if not os.path.isabs(path) and _is_there(path) else path
    )


def moved_along(section: ModelT, *, before: str, now: str) -> ModelT:
    """A config or section after a folder was moved: marked paths at which nothing is any more, if they moved along.

    Args:
        section: with absolute paths.
        before: the folder, absolute.
        now: the same folder, where it is now.
    """

    def found(path: str) -> str:
        if not os.path.isabs(path) or _is_there(path):
            return path
        there = moved_path(path, before=before, now=now)
        return there if _is_there(there) else path

    return _changed(section, found)


def moved_path(path: str, *, before: str, now: str) -> str:
    """Where a path is, absolute, if it has moved along with a folder."""
    return os.path.normpath(os.path.join(os.path.abspath(now), os.path.relpath(path, before)))


def folder_note(folder: str | os.PathLike[str]) -> str:
    """The line of a stored config that says where it is, so that it shows later whether its folder was moved."""
    return f"{_NOTE}{json.dumps(os.path.abspath(folder))}\n"


def noted_folder(text: str) -> str | None:
    """The folder of a stored config's note; None if it has none."""
    for line in text.splitlines():
        if line.startswith(_NOTE):
            try:
                folder = json.loads(line.removeprefix(_NOTE))
            except ValueError:  # somebody wrote into it
                return None
            return folder if isinstance(folder, str) and os.path.isabs(folder) else None
    return None


def without_note(text: str) -> str:
    """The text of a stored config without its note."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(_NOTE))


def _changed(section: ModelT, change: Callable[[str], str], *, is_source: bool = False) -> ModelT:
    """The section with another text in every marked field for which the function gives one.

    Args:
        section: a config, or a part of it.
        change: gives another path, or the same.
        is_source: whether the section stands in a marked field, as an entry of a list of sources: then its `path` is
            a path.
    """
    changed = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        mark = LocalPath() if is_source and name == "path" else _mark_of(type(section), name)
        new = _value(value, mark, change)
        if new is not value:
            changed[name] = new
    return section.model_copy(update=changed) if changed else section


def _mark_of(kind: type[BaseModel], name: str) -> LocalPath | None:
    """The mark of a field, its own or that of a base class whose field it replaces."""
    for each in kind.__mro__:
        info = each.model_fields.get(name) if issubclass(each, BaseModel) and each is not BaseModel else None
        marks = [] if info is None else [mark for mark in info.metadata if isinstance(mark, LocalPath)]
        if marks:
            return marks[0]
    return None


def _value(value: Any, mark: LocalPath | None, change: Callable[[str], str]) -> Any:
    """The value itself, or another one if a path in it changes."""
    if isinstance(value, BaseModel):
        return _changed(value, change, is_source=mark is not None)
    if isinstance(value, (tuple, list)):
        new = type(value)(_value(each, mark, change) for each in value)
        return new if any(one is not other for one, other in zip(new, value, strict=True)) else value
    if mark is None or not isinstance(value, str) or value in mark.not_paths:
        return value
    return change(value)


def _is_there(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # no file can have such a name
        return False
