"""Findings about a key that its section does not have: where it belongs, or which key was probably meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ttt.check.codes import TTT101, TTT105, TTT107
from ttt.check.expected import listed
from ttt.check.model_keys import homes_of, keys_of, section_at, sections_of
from ttt.config.findings import Code, Finding
from ttt.config.places import KeyPath, dotted
from ttt.config.schema import RunConfig
from ttt.config.source import Source
from ttt.config.spelling import nearest

OtherOptions = Callable[[], Mapping[str, Sequence[type[BaseModel]]]]
"""Returns the options of other backbones by name, to find the backbone that has a key."""


def unknown_key(
    path: KeyPath, model: type[RunConfig], source: Source, other_options: OtherOptions, *, guess: bool
) -> tuple[Finding, list[KeyPath]]:
    """The finding about a key that its section does not have, and the keys that were possibly meant.

    Args:
        path: of the key.
        model: `RunConfig`, with the options of a backbone.
        source: where the user wrote it.
        other_options: the options of other backbones.
        guess: whether to look for a key with a similar spelling.
    """
    found = _in_another_place(path, model) or _of_another_backbone(path, other_options)
    code, message, fix, meant, more = found or _misspelt(path, model, guess=guess)
    finding = code.at(
        dotted(path),
        message,
        fix,
        value=str(path[-1]),
        place=source.place(path, key=True),
        **more,
    )
    return finding, meant


_Found = tuple[Code, str, str, list[KeyPath], dict[str, Any]]
"""Code, message, fix, the keys that were possibly meant, and what `--fix` does."""


def _in_another_place(path: KeyPath, model: type[RunConfig]) -> _Found | None:
    section, key = path[:-1], path[-1]
    if key in RunConfig.model_fields and section:
        message = f"`{key}` is no key of `{dotted(section)}`: it stands at the top level of a config"
        return TTT105, message, f"write `{key}:` at the left margin", [(key,)], {"moves_to": ""}
    homes = [home for home in homes_of(model).get(str(key), ()) if home != section]
    if not homes:
        return None
    belongs = " or ".join(f"`{dotted(home)}`" for home in homes)
    message = f"`{key}` stands {_in_section(section)}, but belongs to {belongs}"
    moves_to = dotted(homes[0]) if len(homes) == 1 else None
    return TTT105, message, f"move it to {belongs}", [(*home, key) for home in homes], {"moves_to": moves_to}


def _of_another_backbone(path: KeyPath, other_options: OtherOptions) -> _Found | None:
    others = other_options() if path[:-1] in (("backbone",), ("data",)) else {}
    owners = [name for name, options in others.items() if any(path[-1] in keys_of(option) for option in options)]
    if not owners:
        return None
    message = f"`{path[-1]}` is an option of the backbone {' and '.join(owners)}, not of this one"
    return TTT107, message, "remove it, or name that backbone", [], {}


def _misspelt(path: KeyPath, model: type[RunConfig], *, guess: bool) -> _Found:
    section, key = path[:-1], str(path[-1])
    here, known = _in_section(section), keys_of(section_at(model, section))
    message = f"unknown key `{key}` {here}"
    close = nearest(key, known) if guess else None
    if close:
        return TTT101, message, f"write `{close}`", [(*section, close)], {"replacement": close}
    far = _nearest_elsewhere(key, model, section) if guess else None
    if far:
        return TTT101, message, f"write `{far[-1]}`, and {_in_section(far[:-1])}", [far], {}
    return TTT101, message, f"remove it; the keys {here} are {listed(known)}", [], {}


def _nearest_elsewhere(key: str, model: type[RunConfig], section: KeyPath) -> KeyPath | None:
    places = {
        name: (*home, name)
        for home in sections_of(model)
        if home != section
        for name in keys_of(section_at(model, home))
    }
    close = nearest(key, places)
    return places[close] if close else None


def _in_section(section: KeyPath) -> str:
    return f"in `{dotted(section)}`" if section else "at the top level"
