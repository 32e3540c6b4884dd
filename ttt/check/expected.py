"""What a key accepts, from pydantic's error type and the model's types, and what to write instead of a wrong value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ttt.check.misfits import Problem
from ttt.check.model_keys import choices_at, field_at, keys_of, section_at, types_at
from ttt.config.places import KeyPath
from ttt.config.scalars import resolve
from ttt.config.spelling import nearest


class Kind(Enum):
    """A sort of value that a key may accept. Each member's text completes "must be …"."""

    WHOLE_NUMBER = "a whole number"
    NUMBER = "a number"
    BOOL = "true or false"
    TEXT = "text"
    LIST = "a list"
    SECTION = "a section of `key: value`"
    NULL = "null"
    CHOICE = "one of some words"
    OTHER = "another value"


_KINDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), Kind.WHOLE_NUMBER),
    **dict.fromkeys(("float_type", "float_parsing"), Kind.NUMBER),
    **dict.fromkeys(("bool_type", "bool_parsing"), Kind.BOOL),
    **dict.fromkeys(("list_type", "tuple_type", "set_type"), Kind.LIST),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type"), Kind.SECTION),
    "string_type": Kind.TEXT,
    "none_required": Kind.NULL,
}
"""The kind of value that pydantic wants, by error type; these are the errors about a value's type."""

_LIMITS = {
    "finite_number": (Kind.NUMBER, "a finite number"),
    "multiple_of": (Kind.NUMBER, "a multiple of {multiple_of}"),
    "too_short": (Kind.LIST, "a list of at least {min_length}"),
    "too_long": (Kind.LIST, "a list of at most {max_length}"),
    "string_too_short": (Kind.TEXT, "text of at least {min_length} characters"),
    "string_too_long": (Kind.TEXT, "text of at most {max_length} characters"),
    "string_pattern_mismatch": (Kind.TEXT, "text that matches `{pattern}`"),
    "is_instance_of": (Kind.OTHER, "an instance of {class}"),
}
"""The kind and the words for each error about a value of the right type."""

_BOUNDS = {
    "greater_than": ("gt", "greater than", "greater than"),
    "greater_than_equal": ("ge", "at least", "of at least"),
    "less_than": ("lt", "less than", "less than"),
    "less_than_equal": ("le", "at most", "of at most"),
}
"""Bounds by pydantic's error type: the key of the limit in its context, words after "must be", words after "a number".
"""

_YES = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


@dataclass(frozen=True)
class Expected:
    """What a key accepts. The words are only printed; decisions depend on the other fields."""

    kinds: frozenset[Kind]
    words: str
    """Completes "must be …"; empty if only pydantic's own sentence can say it."""
    to_write: str
    """Completes "write …"."""
    choices: tuple[str, ...] = ()
    wrong_type: bool = False
    """Whether the value has the wrong type; else it has the right type but is not allowed."""


def expected(problem: Problem, model: type[BaseModel]) -> Expected:
    """What a key accepts, if pydantic reports that its value does not fit."""
    if problem.members:
        members = [expected(member, model) for member in problem.members]
        says_yes_or_no = isinstance(problem.value, str) and problem.value.casefold() in _YES
        return next((each for each in members if says_yes_or_no and Kind.BOOL in each.kinds), _any_of(members))
    kind, context = problem.kind, problem.context
    choices = tuple(map(plain, choices_at(model, problem.path))) if kind in ("literal_error", "enum") else ()
    if choices:
        words = f"one of {listed(choices)}" if len(choices) > 1 else listed(choices)
        return Expected(frozenset((Kind.CHOICE,)), words, words, choices)
    if kind in _KINDS:
        words = _KINDS[kind].value
        return Expected(frozenset((_KINDS[kind],)), words, words, wrong_type=True)
    if kind in _LIMITS:
        limited, words = _LIMITS[kind]
        words = words.format(**context)
        return Expected(frozenset((limited,)), words, words)
    if kind in _BOUNDS:
        bound, words, after = _BOUNDS[kind]
        number = Kind.NUMBER if _takes_fractions(problem, model) else Kind.WHOLE_NUMBER
        limit = show(context[bound])
        return Expected(frozenset((number,)), f"{words} {limit}", f"{number.value} {after} {limit}")
    return Expected(frozenset((Kind.OTHER,)), "", Kind.OTHER.value, wrong_type=kind.endswith(("_type", "_parsing")))


def _any_of(members: Iterable[Expected]) -> Expected:
    found = list(members)
    words = " or ".join(dict.fromkeys(member.words for member in found if member.words))
    choices = tuple(choice for member in found for choice in member.choices)
    return Expected(frozenset().union(*(member.kinds for member in found)), words, words, choices, wrong_type=True)


def _takes_fractions(problem: Problem, model: type[BaseModel]) -> bool:
    return isinstance(problem.value, float) or float in types_at(model, problem.path)


# --- what was meant ---


def meant(value: Any, wanted: Expected, path: KeyPath, model: type[BaseModel]) -> str | None:
    """The value that a text was probably meant to be, as YAML without quotes; None if that is not clear."""
    if not isinstance(value, str):
        return None
    close = nearest(value, wanted.choices)
    if close:
        return close
    if Kind.BOOL in wanted.kinds and value.casefold() in _YES:
        return show(_YES[value.casefold()])
    if wanted.kinds & {Kind.NUMBER, Kind.WHOLE_NUMBER}:
        digits = value.strip().replace("_", "")
        if _THOUSANDS.fullmatch(digits):
            digits = digits.replace(",", "")
        number = resolve(digits)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return digits
    return "null" if value in ("None", "none") and type(None) in types_at(model, path) else None


def instead(value: Any, wanted: Expected, path: KeyPath, model: type[BaseModel], replacement: str | None) -> str:
    """The fix for a value that does not fit: what to write instead."""
    if replacement is not None:
        unquoted = isinstance(value, str) and replacement == value.strip() and replacement not in wanted.choices
        return f"write `{replacement}`, without quotes" if unquoted else f"write `{replacement}`"
    section = section_at(model, path)
    if section is not None:
        return f"write its keys below it, indented: {listed(keys_of(section))}"
    info = field_at(model, path)
    default = info.default if info is not None and not isinstance(path[-1], int) else PydanticUndefined
    has_default = isinstance(default, str | int | float) or (default is None and type(None) in types_at(model, path))
    return f"write {wanted.to_write}" + (f" (default: {plain(default)})" if has_default else "")


# --- in a sentence ---


def listed(words: Iterable[str]) -> str:
    """The words in backticks, joined by commas."""
    return ", ".join(f"`{word}`" for word in words)


def plain(value: Any) -> str:
    """A value as YAML writes it, text without quotes."""
    return value if isinstance(value, str) else show(value)


def show(value: Any) -> str:
    """A value for a sentence: text is quoted and shortened, a section or list is only named."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:39] + "…")
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    return f"{value:g}" if isinstance(value, float) else str(value)[:40]
