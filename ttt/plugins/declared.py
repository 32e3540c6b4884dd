"""Checks of a plugin's class attributes, and of the defaults in its options, when it is loaded. Imports no torch.

Without them an invalid default would only show when a user leaves its key out, and would look like the user's mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from pydantic import BaseModel, ValidationError

from ttt.config.schema import BackboneOptions, DataOptions, TTTConfig
from ttt.errors import PluginError
from ttt.plugins.backbone import Backbone
from ttt.plugins.capabilities import CAPABILITIES, Streaming
from ttt.plugins.capability_base import has_capability, kinds_of, members_of
from ttt.plugins.guarding import methods_of


def require_declared(backbone: Backbone) -> None:
    """Refuse a backbone whose class attributes are not as `Backbone` describes them.

    Raises:
        PluginError: an attribute is wrong; the message names the first one and what it must be.
    """
    problem = next(_problems(backbone), None)
    if problem is not None:
        raise PluginError(f"{type(backbone).__name__}.{problem}")


def require_options(backbone: Backbone) -> None:
    """Refuse a backbone whose options have the wrong base class.

    Raises:
        PluginError: they have; the message says which, and what base they need.
    """
    problem = next(_options(backbone), None)
    if problem is not None:
        raise PluginError(f"{type(backbone).__name__}.{problem}")


def _problems(backbone: Backbone) -> Iterator[str]:
    """What is wrong, each as `attribute is …`. Later checks rely on earlier ones."""
    yield from _name(backbone)
    if not isinstance(getattr(backbone, "causal", None), bool):
        yield f"causal {_is(backbone, 'causal')}, not True or False"
    yield from _capabilities(backbone)
    yield from _methods(backbone)
    yield from _options(backbone)
    yield from _option_names(backbone)
    yield from _ttt_defaults(backbone)
    yield from _rules(backbone)
    for attribute in ("options", "data_options"):
        yield from _defaults(getattr(backbone, attribute), attribute, backbone.name)


def _is(backbone: Backbone, attribute: str) -> str:
    missing = object()
    value = getattr(backbone, attribute, missing)
    return "is missing" if value is missing else f"is {value!r:.80}"


def _name(backbone: Backbone) -> Iterator[str]:
    name = getattr(backbone, "name", None)
    if not isinstance(name, str) or not name:
        yield f"name {_is(backbone, 'name')}, not the name that its entry point has"


def _capabilities(backbone: Backbone) -> Iterator[str]:
    """Members of a capability that the class does not inherit, and wrong attributes of capabilities that it does."""
    for kind in CAPABILITIES:
        name = next((name for name in members_of(kind) if hasattr(type(backbone), name)), None)
        if name is not None and not has_capability(backbone, kind):
            yield f"{name}: the class has `{name}`, but does not inherit ttt.plugins.{kind.__name__}; inherit it"
    streams, said = has_capability(backbone, Streaming), getattr(backbone, "streaming", None)  # an old attribute
    if said is True and not streams:
        yield "streaming is True, but the class does not inherit ttt.plugins.Streaming; inherit it"
    if said is False and streams:
        yield "streaming is False, but the class inherits ttt.plugins.Streaming; leave streaming out"
    suffix: object = getattr(backbone, "sample_suffix", "")
    if not isinstance(suffix, str) or (suffix and not re.fullmatch(r"\.\w+", suffix)):
        yield f"sample_suffix is {suffix!r:.80}, not what a file's name ends in, as '.mp4'"


def _methods(backbone: Backbone) -> Iterator[str]:
    if hasattr(backbone, "import_config"):
        yield (
            "import_config is a hook of its own now; write `ttt_import_config(text, file)` beside `ttt_backbone`, and "
            "an entry point for it in the group ttt.config_imports"
        )
    bases: list[type] = [Backbone, *kinds_of(type(backbone))]
    for base in bases:
        for name in methods_of(base):
            if not callable(getattr(type(backbone), name)):
                yield f"{name} {_is(backbone, name)}, not a method"


def _options(backbone: Backbone) -> Iterator[str]:
    for attribute, base in (("options", BackboneOptions), ("data_options", DataOptions)):
        given = getattr(backbone, attribute, None)
        if not (isinstance(given, type) and issubclass(given, base)):
            yield f"{attribute} {_is(backbone, attribute)}, not a subclass of {base.__name__}"


def _option_names(backbone: Backbone) -> Iterator[str]:
    if hasattr(backbone, "location_options"):
        yield "location_options is what non_identity_options was called; rename it"
    given: Any = backbone.non_identity_options
    if not isinstance(given, AbstractSet):
        yield f"non_identity_options is {given!r:.80}, not a set of names of options"
        return
    for name in sorted(map(str, given)):
        if name not in backbone.options.model_fields:
            yield f"non_identity_options names {name!r}, which is not an option of {backbone.options.__name__}"


def _ttt_defaults(backbone: Backbone) -> Iterator[str]:
    given: Any = backbone.ttt_defaults
    if not isinstance(given, Mapping):
        yield f"ttt_defaults is {given!r:.80}, not a mapping"
        return
    try:
        TTTConfig.model_validate(dict(given))
    except ValidationError as error:
        yield f"ttt_defaults: {_in_words(error)}"


def _rules(backbone: Backbone) -> Iterator[str]:
    given: Any = backbone.rules
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        yield f"rules is {given!r:.80}, not a sequence of functions"
        return
    for number, rule in enumerate(given):
        if not callable(rule):
            yield f"rules has {rule!r:.80} as number {number}, not a function"


def _defaults(model: type[BaseModel], attribute: str, name: str) -> Iterator[str]:
    """Validate each default like a value that a user writes.

    Validators of the whole section are left out: a section may need a key that has no default.
    """
    given = {
        key: info.get_default(call_default_factory=True)
        for key, info in model.model_fields.items()
        if not info.is_required()
    }
    if attribute == "options":
        if given.get("name", name) != name:
            yield f"options: the default of {model.__name__}.name is {given['name']!r}, not {name!r}"
        given["name"] = name
    try:
        model.model_validate(given)
    except ValidationError as error:
        if any(problem["loc"] and problem["type"] != "missing" for problem in error.errors()):
            yield f"{attribute}: a default of {model.__name__} is not valid: {_in_words(error)}"


def _in_words(error: ValidationError) -> str:
    """The first error of pydantic: the key, what is wrong with it, and its value."""
    problem: Any = next((found for found in error.errors() if found["loc"]), error.errors()[0])
    key = ".".join(map(str, problem["loc"]))
    shown = f", not {problem['input']!r:.80}" if key and problem["type"] != "extra_forbidden" else ""
    return f"{key}: {problem['msg']}{shown}" if key else str(problem["msg"])
