"""The rules of `ttt check`: what the schema cannot say, one file for each family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any

from ttt.check.rules import (
    adapters,
    causality,
    checkpointing,
    compiling,
    data,
    environment,
    evaluation,
    layouts,
    loggers,
    memory,
    optimisation,
    optimizers,
    precision,
    shape,
)
from ttt.check.rules.rule import FACTS, NEEDED, Context
from ttt.config.findings import Finding
from ttt.config.places import KeyPath
from ttt.plugins.rules import Rule

_CORE = (shape, checkpointing, causality, memory, layouts, data)
_MODULES = (*_CORE, evaluation, environment, compiling, precision, loggers, optimizers, optimisation, adapters)
RULES: tuple[Rule[Context], ...] = tuple(
    each for module in _MODULES for each in vars(module).values() if isinstance(each, Rule)
)
"""Every rule of the core, in the order in which they run."""


def run_rules(context: Context, untrusted: Set[KeyPath]) -> list[Finding]:
    """The findings of the core's rules. Rules that depend on an untrusted key are left out.

    Args:
        context: the config and what is known about it.
        untrusted: keys whose value may not be what the user meant.
    """
    return [
        finding
        for rule in reliable(RULES, untrusted)
        if context.known_facts is not None or not _asks(rule, FACTS)
        if not _asks(rule, NEEDED) or context.can_be_built
        for finding in rule(context)
    ]


def reliable(rules: Iterable[Rule[Any]], untrusted: Set[KeyPath]) -> Iterator[Rule[Any]]:
    """The rules that depend on no untrusted key, that is, on none whose value may not be what the user meant."""
    above = {path[:depth] for path in untrusted for depth in range(1, len(path) + 1)}
    for rule in rules:
        doubtful = untrusted if rule.reads is None else [key for key in rule.reads if _touches(key, untrusted, above)]
        if not doubtful:
            yield rule


def _asks(rule: Rule[Any], what: str) -> bool:
    """Whether a rule reads `FACTS` or `NEEDED`, each of which depends on many keys."""
    return rule.reads is not None and what in rule.reads


def _touches(key: str, untrusted: Set[KeyPath], above: Set[KeyPath]) -> bool:
    """Whether a key is inside an untrusted one, or contains one. `above` has every key that contains one."""
    path = tuple(key.split("."))
    return path in above or any(path[:depth] in untrusted for depth in range(len(path)))
