"""pydantic's errors about plain data, one for each key, and the keys that they blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from ttt.check.model_keys import key_of, keys_of, section_at
from ttt.config.misfit import Misfit
from ttt.config.places import KeyPath

FROM_VALIDATORS = ("value_error", "assertion_error")
"""pydantic's error types for an error that a validator raised."""


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
    """The problem with each member of a union, if the value fits none of them."""

    @property
    def misfit(self) -> Misfit | None:
        """The error that a validator raised; None for pydantic's own errors.

        A plain `ValueError` becomes a `Misfit` without keys and fix.
        """
        if self.kind not in FROM_VALIDATORS:
            return None
        error = self.context.get("error")
        return error if isinstance(error, Misfit) else Misfit(str(error) if error is not None else self.message)


def problems_of(error: ValidationError, data: Any) -> Iterator[Problem]:
    """The errors of a validation, one for each key. Errors about the members of a union are joined into one."""
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
    """Join the problems of a union's members with one value.

    If a validator raised one of them, that one is kept: the value is of that member's type.
    """
    if len(members) == 1:
        return members[0]
    raised = next((member for member in members if member.misfit is not None), None)
    return raised or replace(members[0], members=tuple(members))


def _path_in(data: Any, loc: Sequence[str | int], *, missing: bool) -> tuple[KeyPath, KeyPath | None]:
    """The path of a key from pydantic's location, and the path of the first union on it, if any.

    pydantic's location also names the members of unions; the path does not.
    """
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
    """The keys to blame for a problem: those that a validator names, else the one where pydantic found it."""
    misfit = problem.misfit
    home = problem.path if section_at(model, problem.path) is not None else key_of(problem.path)[:-1]
    known = keys_of(section_at(model, home))
    named = [(*home, key) for key in misfit.keys if key in known] if misfit is not None else []
    return named or [problem.path]
