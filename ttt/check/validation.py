"""Plain data against the schema: every misfit as a finding at its key, in plain words, all of them at once.

A key that does not fit is reported, taken out, and the rest is checked again, so that what stands between several
keys is found in the same pass. What was taken out is remembered as not to be relied on: nothing is said about a
key because of a value that the user is going to change anyway.

A validator of the schema or of a plugin's options may end its message in `; write …` (or in a sentence that begins
with `Write`); that part becomes the finding's fix.
"""

from __future__ import annotations

import functools
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ttt.check.codes import BY_NUMBER
from ttt.check.render import MOST_OF_A_KIND
from ttt.config.findings import Finding
from ttt.config.places import KeyPath, dotted
from ttt.config.scalars import resolve
from ttt.config.schema import RunConfig
from ttt.config.section import descriptions
from ttt.config.source import Source
from ttt.config.spelling import nearest
from ttt.errors import NestedCheckpointWarning

_SHAPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "a section of `key: value`",
    "mapping": "a section of `key: value`",
    "model": "a section of `key: value`",
    "none": "null",
}
"""What an error type of pydantic, less its ending, asks for."""

_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}

_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")

_MOST_GUESSES = MOST_OF_A_KIND
"""As many as are shown, findings after which it is no longer asked what its unknown keys were meant to be."""

OtherOptions = Callable[[], Mapping[str, Sequence[type[BaseModel]]]]


@dataclass
class Validated:
    """What became of the data."""

    config: RunConfig | None
    """The config without the keys that did not fit; None where nothing could be made of it."""
    findings: list[Finding] = field(default_factory=list)
    untrusted: set[KeyPath] = field(default_factory=set)
    """Keys whose value in `config` is not what the user meant."""


@dataclass(frozen=True)
class _Misfit:
    """One complaint of pydantic about one key."""

    path: KeyPath
    kind: str
    """pydantic's error type."""
    value: Any
    context: Mapping[str, Any]
    message: str


def validate(
    model: type[RunConfig],
    data: Mapping[str, Any],
    source: Source,
    *,
    other_options: OtherOptions = dict,
) -> Validated:
    """Check data against a model of a run.

    Args:
        model: `RunConfig`, narrowed to a backbone.
        data: what the user wrote, defaults of the plugin filled in; it is not changed.
        source: where the user wrote it.
        other_options: gives the options of other backbones by name, to say whose a key is.

    Raises:
        Exception: whatever a validator of the plugin raises beside `ValueError`.
    """
    result = Validated(None)
    remaining = _copy(data)
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NestedCheckpointWarning)  # the rules make findings of them
                result.config = model.model_validate(remaining)
            return result
        except ValidationError as error:
            misfits = sorted(_misfits(error, remaining), key=lambda misfit: misfit.kind != "extra_forbidden")
        taken_out = False
        for misfit in misfits:
            _report(misfit, model, source, other_options, result)
            taken_out |= _take_out(remaining, misfit, model, source)
        if not taken_out:
            return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


# --- pydantic's errors ---


def _misfits(error: ValidationError, data: Any) -> Iterator[_Misfit]:
    """The errors of a validation, one for each key: those of a union's members become one."""
    groups: dict[KeyPath, list[tuple[int, _Misfit]]] = {}
    for problem in error.errors(include_url=False):
        path, union = _path_in(data, problem["loc"], missing=problem["type"] == "missing")
        misfit = _Misfit(path, problem["type"], problem["input"], problem.get("ctx", {}), problem["msg"])
        groups.setdefault(union if union is not None else path, []).append((len(path), misfit))
    for group in groups.values():
        deepest = max(depth for depth, _ in group)
        places: dict[KeyPath, list[_Misfit]] = {}
        for depth, misfit in group:
            if depth == deepest:
                places.setdefault(misfit.path, []).append(misfit)
        for members in places.values():
            first = members[0]
            if len(members) == 1:
                yield first
            else:  # the value fits no member of a union
                asked = " or ".join(dict.fromkeys(_asked(member) for member in members))
                yield _Misfit(first.path, "union", first.value, {"asked": asked}, first.message)


def _is_position(part: str | int, data: Any) -> bool:
    return isinstance(data, list) and isinstance(part, int) and 0 <= part < len(data)


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


def _asked(misfit: _Misfit) -> str:
    """What the key takes, as the object of "must be"."""
    context = misfit.context
    if misfit.kind == "union":
        return str(context["asked"])
    if misfit.kind in _BOUNDS:
        bound, words = _BOUNDS[misfit.kind]
        return f"{words} {_show(context[bound])}"
    if misfit.kind in ("literal_error", "enum"):
        choices = _choices(misfit)
        return f"one of {_listed(choices)}" if len(choices) > 1 else _listed(choices)
    if misfit.kind == "finite_number":
        return "a finite number"
    if misfit.kind in ("too_short", "too_long"):
        bound = "at least" if misfit.kind == "too_short" else "at most"
        return f"a list of {bound} {context.get('min_length', context.get('max_length'))}"
    if misfit.kind in ("string_too_short", "string_too_long"):
        bound = "at least" if misfit.kind == "string_too_short" else "at most"
        return f"text of {bound} {context.get('min_length', context.get('max_length'))} characters"
    if misfit.kind.partition("_")[0] in _SHAPES and misfit.kind.endswith(("_type", "_parsing", "_required", "_float")):
        return _SHAPES[misfit.kind.partition("_")[0]]
    return re.sub(r"^(?:Input|Value) should be ", "", misfit.message)


def _choices(misfit: _Misfit) -> list[str]:
    return re.findall(r"'((?:[^'\\]|\\.)*)'", str(misfit.context.get("expected", "")))


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _show(value: Any) -> str:
    """A value in a sentence."""
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


# --- to findings ---


def _report(
    misfit: _Misfit,
    model: type[RunConfig],
    source: Source,
    other_options: OtherOptions,
    result: Validated,
) -> None:
    """Turn a misfit into a finding, unless it follows from another, and mark its key as not to be relied on."""
    path = misfit.path
    between = _between_keys(misfit, model)
    if misfit.kind == "extra_forbidden" and source.written(path):
        guess = len(result.findings) < _MOST_GUESSES
        finding, meant = _unknown_key(misfit, model, source, other_options, guess=guess)
        result.findings.append(finding)
        result.untrusted |= {path, *meant}
        return
    mentioned = list(_mentioned(misfit, model)) if between else [path]
    follows = (between or misfit.kind == "missing") and any(
        key[: len(doubtful)] == doubtful for key in mentioned for doubtful in result.untrusted
    )
    result.untrusted.update(mentioned)
    if follows:
        return
    written = [key for key in mentioned if source.written(key)]
    path = written[0] if written else path
    if misfit.kind == "missing" and isinstance(path[-1], int):
        path = path[:-1]  # what is missing is a value of the list
    code, message, fix, replacement = _in_words(misfit, path, model, between=between)
    if not written and path[:1] == ("ttt",) and misfit.kind != "missing":
        code, message = "TTT803", f"the plugin's own defaults do not fit: {message}"
        fix = "write the key yourself, and tell who made the plugin"
    result.findings.append(
        BY_NUMBER[code].at(
            dotted(path),
            message,
            fix,
            value=misfit.value if isinstance(misfit.value, str | int | float | None) else None,
            place=source.place(path),
            replacement=replacement if source.written(path) else None,
        )
    )


def _between_keys(misfit: _Misfit, model: type[BaseModel]) -> bool:
    """Whether a section's validator complains, about several of its keys."""
    return misfit.kind in ("value_error", "assertion_error") and _model_at(model, misfit.path) is not None


def _in_words(
    misfit: _Misfit, path: KeyPath, model: type[BaseModel], *, between: bool
) -> tuple[str, str, str, str | None]:
    """Code, message, fix, and what the value becomes where that needs no thought."""
    name = dotted(path)
    if misfit.kind == "extra_forbidden":
        return "TTT101", f"unknown key `{name}`", "", None
    if misfit.kind == "missing":
        if isinstance(misfit.path[-1], int):
            return "TTT102", f"`{name}` has too few values", "write every value of the list", None
        described = _described(model, path)
        fix = f"write `{path[-1]}: …`" + (f" ({described})" if described else "")
        return "TTT104", f"`{name}` is missing", fix, None
    if misfit.kind in ("value_error", "assertion_error"):
        text = str(misfit.context.get("error", misfit.message))
        message, fix = split_fix(text)
        if between:
            return "TTT106", message, fix, None
        if not message:
            message = f"{_show(misfit.value)} is no value of `{name}`"
        elif str(path[-1]) not in message:
            message = f"`{name}`: {message}"
        return "TTT103", message, fix, None
    asked = _asked(misfit)
    wrong_type = misfit.kind.endswith(("_type", "_parsing", "_required", "int_from_float")) or misfit.kind == "union"
    message = f"`{name}` must be {asked}, not {_show(misfit.value)}"
    replacement = _meant(misfit, path, model, asked)
    fix = _instead(misfit, path, model, asked, replacement)
    return "TTT102" if wrong_type else "TTT103", message, fix, replacement


def split_fix(text: str) -> tuple[str, str]:
    """A message that ends in what to write, as the message and its fix, `write …`."""
    match = re.search(r"(?:^|; |\. )[Ww]rite (?=\S)", text)
    if match is None:
        return text, ""
    return text[: match.start()], f"write {text[match.end() :]}"


def _meant(misfit: _Misfit, path: KeyPath, model: type[BaseModel], asked: str) -> str | None:
    """What a text that does not fit was meant to be, as it is written without quotes."""
    value = misfit.value
    if not isinstance(value, str):
        return None
    close = nearest(value, _choices(misfit))
    if close:
        return close
    if "true or false" in asked and value.casefold() in ("yes", "on", "no", "off", "y", "n"):
        return "true" if value.casefold() in ("yes", "on", "y") else "false"
    plain = value.strip().replace("_", "")
    if _THOUSANDS.fullmatch(plain):
        plain = plain.replace(",", "")
    number = resolve(plain)
    if "number" in asked and isinstance(number, int | float) and not isinstance(number, bool):
        return plain
    return "null" if value in ("None", "none") and _optional(model, path) else None


def _instead(misfit: _Misfit, path: KeyPath, model: type[BaseModel], asked: str, meant: str | None) -> str:
    """What to write instead of a value that does not fit."""
    value = misfit.value
    if meant is not None:
        unquoted = isinstance(value, str) and meant == value.strip() and meant not in _choices(misfit)
        return f"write `{meant}`, without quotes" if unquoted else f"write `{meant}`"
    section = _model_at(model, path)
    if section is not None:
        return f"write its keys below it, indented: {_listed(_keys(section))}"
    info = _field_at(model, path)
    if misfit.kind in _BOUNDS:
        kind = "number" if isinstance(value, float) or (info is not None and _takes(info, float)) else "whole number"
        asked = f"a {kind} {'of ' if asked.startswith('at ') else ''}{asked}"
    default = info.default if info is not None and not isinstance(path[-1], int) else PydanticUndefined
    has_default = isinstance(default, str | int | float) or (default is None and _optional(model, path))
    return f"write {asked}" + (f" (default: {_plain(default)})" if has_default else "")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _show(value)


def _unknown_key(
    misfit: _Misfit, model: type[RunConfig], source: Source, other_options: OtherOptions, *, guess: bool
) -> tuple[Finding, list[KeyPath]]:
    """The finding about a key that its section does not have, and the keys that may have been meant."""
    section, key = misfit.path[:-1], misfit.path[-1]
    here = _in_section(section)
    known = _keys(_model_at(model, section))
    homes = [home for home in _homes(model).get(str(key), ()) if home != section]
    others = other_options() if section[:1] in (("backbone",), ("data",)) else {}
    owners = [name for name, options in others.items() if any(key in _keys(option) for option in options)]
    code = "TTT101"
    close = moves_to = None
    meant: list[KeyPath] = []
    if key in RunConfig.model_fields and section:
        code, meant, moves_to = "TTT105", [(key,)], ""
        message = f"`{key}` is no key of `{dotted(section)}`: it stands at the top level of a config"
        fix = f"write `{key}:` at the left margin"
    elif homes:
        code, meant = "TTT105", [(*home, key) for home in homes]
        belongs = " or ".join(f"`{dotted(home)}`" for home in homes)
        message = f"`{key}` stands {here}, but belongs to {belongs}"
        fix = f"move it to {belongs}"
        moves_to = dotted(homes[0]) if len(homes) == 1 else None
    elif owners:
        code = "TTT107"
        message = f"`{key}` is an option of the backbone {' and '.join(owners)}, not of this one"
        fix = "remove it, or name that backbone"
    else:
        message = f"unknown key `{key}` {here}"
        close = nearest(str(key), known) if guess else None
        far = None if close or not guess else _nearest_elsewhere(str(key), model, section)
        if close:
            meant = [(*section, close)]
            fix = f"write `{close}`"
        elif far:
            meant = [far]
            fix = f"write `{far[-1]}`, and {_in_section(far[:-1])}"
        else:
            fix = f"remove it; the keys {here} are {_listed(known)}"
    finding = BY_NUMBER[code].at(
        dotted(misfit.path),
        message,
        fix,
        value=str(key),
        place=source.place(misfit.path, key=True),
        replacement=close,
        moves_to=moves_to,
    )
    return finding, meant


def _in_section(section: KeyPath) -> str:
    return f"in `{dotted(section)}`" if section else "at the top level"


def _nearest_elsewhere(key: str, model: type[RunConfig], section: KeyPath) -> KeyPath | None:
    places = {
        name: (*home, name) for home in _sections(model) if home != section for name in _keys(_model_at(model, home))
    }
    close = nearest(key, places)
    return places[close] if close else None


def _mentioned(misfit: _Misfit, model: type[BaseModel]) -> Iterator[KeyPath]:
    """The keys that a section's validator names in its message, in order."""
    known = set(_keys(_model_at(model, misfit.path)))
    for word in re.findall(r"\w+", misfit.message):
        if word in known:
            yield (*misfit.path, word)


def _take_out(data: Any, misfit: _Misfit, model: type[BaseModel], source: Source) -> bool:
    """Remove what does not fit from the data; whether there was anything to remove."""
    path = misfit.path
    if _between_keys(misfit, model):
        mentioned = sorted(_mentioned(misfit, model), key=lambda key: not source.written(key))
        return any(_remove(data, key) for key in mentioned)
    if misfit.kind == "missing":
        return isinstance(path[-1], int) and _remove(data, path[:-1])
    return _remove(data, path)


def _remove(data: Any, path: KeyPath) -> bool:
    """Remove the key at a path; for a value in a list, the key of the list."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    for part in path[:-1]:
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    if not path or not isinstance(data, dict) or path[-1] not in data:
        return False
    del data[path[-1]]
    return True


# --- the schema ---


@functools.cache
def _keys(model: type[BaseModel] | None) -> tuple[str, ...]:
    return tuple(model.model_fields) if model is not None else ()


@functools.cache
def _sections(model: type[BaseModel]) -> list[KeyPath]:
    """The top level and its sections."""
    return [(), *((name,) for name in model.model_fields if _model_at(model, (name,)) is not None)]


@functools.cache
def _homes(model: type[BaseModel]) -> dict[str, list[KeyPath]]:
    """The sections that have a key, for each key."""
    homes: dict[str, list[KeyPath]] = {}
    for section in _sections(model):
        for key in _keys(_model_at(model, section)):
            homes.setdefault(key, []).append(section)
    return homes


def _field_at(model: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    while path and isinstance(path[-1], int):
        path = path[:-1]
    section = _model_at(model, path[:-1]) if path else None
    return section.model_fields.get(str(path[-1])) if section is not None else None


@functools.lru_cache(maxsize=256)
def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model of the section at a path, None where there is a plain value or no such key."""
    section: type[BaseModel] | None = model
    for part in path:
        info = section.model_fields.get(str(part)) if section is not None else None
        section = _model_in(info.annotation) if info is not None else None
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return next(filter(None, map(_model_in, typing.get_args(annotation))), None)
    return None


def _optional(model: type[BaseModel], path: KeyPath) -> bool:
    info = _field_at(model, path)
    return info is not None and type(None) in typing.get_args(info.annotation)


def _takes(info: FieldInfo, kind: type) -> bool:
    """Whether a field's type names `kind` somewhere."""
    pending = [info.annotation]
    while pending:
        annotation = pending.pop()
        if annotation is kind:
            return True
        pending.extend(typing.get_args(annotation))
    return False


def _described(model: type[BaseModel], path: KeyPath) -> str:
    section = _model_at(model, path[:-1]) if path else None
    text = descriptions(section).get(str(path[-1]), "") if section is not None else ""
    return text.split("\n")[0].rstrip(".")
