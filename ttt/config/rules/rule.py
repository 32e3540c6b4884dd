"""What a rule is: a function of a resolved config that yields findings, and the keys that it rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ttt.config.diagnostics import Finding
from ttt.config.schema import RunConfig

if TYPE_CHECKING:
    from ttt.backbone import Backbone, BackboneFacts

FACTS = "facts"
"""In `reads`: the rule asks `Context.facts`, which rest on the sections `backbone` and `data`."""


@dataclass(frozen=True)
class Context:
    """What a rule may look at."""

    config: RunConfig
    """The resolved config, defaults included."""
    known_backbone: Backbone | None
    known_facts: BackboneFacts | None
    is_written: Callable[[str], bool]
    """Whether the user wrote a key, given dotted."""
    memory_bytes: int | None = None
    """Memory of the device that the run is for, where the caller knows it."""

    @property
    def backbone(self) -> Backbone:
        """The backbone; only for rules that read `backbone`."""
        assert self.known_backbone is not None
        return self.known_backbone

    @property
    def facts(self) -> BackboneFacts:
        """The backbone's facts; only for rules that read `FACTS`."""
        assert self.known_facts is not None
        return self.known_facts

    def first_written(self, *keys: str) -> str:
        """The first of the keys that the user wrote, to put a finding at; the first of all where none is."""
        return next(filter(self.is_written, keys), keys[0])


@dataclass(frozen=True)
class Rule:
    """A check of a resolved config."""

    check: Callable[[Context], Iterator[Finding]]
    reads: tuple[str, ...]
    """The keys, dotted, that must be as the user meant them for the rule to say anything."""


def rule(*reads: str) -> Callable[[Callable[[Context], Iterator[Finding]]], Rule]:
    """Make a rule of a function; it is asked only where every key of `reads` fits the schema."""
    return lambda check: Rule(check, reads)
