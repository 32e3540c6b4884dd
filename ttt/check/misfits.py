"""pydantic's errors about plain data, one for each key, and what its validators say is to blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from ttt.check.model_keys import key_of, keys_of, section_at
from ttt.config.misfit import Misfit
from ttt.config.places import KeyPath

FROM_VALIDATORS = ("value_error", "assertion_error")
"""pydantic's types for what a validator raises."""


@dataclass(frozen=True)
class Problem:
    """What pydantic says about one key."""

    path: KeyPath
    kind: str
    """pydantic's error type."""
    value: Any
    context: Mapping[str, Any]
    message: str
    members: tuple[Problem, ...] = ()
    """What each member of a union says, where the value fits none."""

    @property
    def misfit(self) -> Misfit | None:
        """What a validator raised; a plain `ValueError` as one without keys and fix. None is pydantic's own error."""
        if self.kind not in FROM_VALIDATORS:
            return None
        error = self.context.get("error")
        return error if isinstance(error, Misfit) else Misfit(str(error) if error is not None else self.message)


def problems_of(error: ValidationError, data: Any) -> Iterator[Problem]:
    """The errors of a validation, one for each key: those of a union's members become one."""
    groups: dict[KeyPath, list[Problem]] = {}
    for told in error.errors(include_url=False):
        path, union = _path_in(data, told["loc"], missing=told["type"] == "missing")
        problem = Problem(path, told["type"], told["input"], told.get("ctx", {}), told["msg"])
        groups.setdefault(union if union is not None else path, []).append(problem)
    for group in groups.values():
        deepest = max(len(problem.path) for problem in group)
        places: dict[KeyPath, list[Problem]] = {}
        for problem in group:
            if len(problem.path) == deepest:
                places.setdefault(problem.path, []).append(problem)
        yield from map(_as_one, places.values())


def _as_one(members: Sequence[Problem]) -> Problem:
    """What the members of a union say of one value: what a validator says of it, for it is of that member's type."""
    if len(members) == 1:
        return members[0]
    raised = next((member for member in members if member.misfit is not None), None)
    return raised or replace(members[0], members=tuple(members))


def _path_in(data: Any, loc: Sequence[str | int], *, missing: bool) -> tuple[KeyPath, KeyPath | None]:
    """The location that pydantic gives, less its names of union members, and the path of the first union on the way."""
    path: KeyPath = ()
    union: KeyPath | None = None
    for index, part in enumerate(loc):
        if part in data if isinstance(data, Mapping) else _is_position(part, data):
            data = data[part]
        elif missing and index == len(loc) - 1:
            return (*path, part), union
        else:
            union = path if union is None else union
            continue
        path = (*path, part)
    return path, union


def _is_position(part: str | int, data: Any) -> bool:
    return isinstance(data, list) and isinstance(part, int) and 0 <= part < len(data)


def blamed(problem: Problem, model: type[BaseModel]) -> list[KeyPath]:
    """The keys that a problem is about: those that a validator names, else where pydantic found it."""
    misfit = problem.misfit
    home = problem.path if section_at(model, problem.path) is not None else key_of(problem.path)[:-1]
    known = keys_of(section_at(model, home))
    named = [(*home, key) for key in misfit.keys if key in known] if misfit is not None else []
    return named or [problem.path]
