"""The rules of `ttt check`: what the schema cannot say, one file for each family."""

from __future__ import annotations

from collections.abc import Set

from ttt.check.rules import causality, checkpointing, compiling, data, environment, memory, optimisation, shape
from ttt.check.rules.rule import FACTS, NEEDED, Context, Rule
from ttt.config.findings import Finding
from ttt.config.places import KeyPath

RULES: tuple[Rule, ...] = (
    *shape.RULES,
    *checkpointing.RULES,
    *causality.RULES,
    *memory.RULES,
    *data.RULES,
    *environment.RULES,
    *compiling.RULES,
    *optimisation.RULES,
)
"""Every rule of the core."""


def run_rules(context: Context, untrusted: Set[KeyPath]) -> list[Finding]:
    """What the rules find in a config, without those that rest on keys which are not what the user meant."""
    doubtful = {path[:depth] for path in untrusted for depth in range(1, len(path) + 1)}
    reliable = [rule for rule in RULES if not any(_touches(key, untrusted, doubtful) for key in rule.reads)]
    return [
        finding
        for rule in reliable
        if context.known_facts is not None or FACTS not in rule.reads
        if NEEDED not in rule.reads or context.can_be_built
        for finding in rule.check(context)
    ]


def _touches(key: str, untrusted: Set[KeyPath], above: Set[KeyPath]) -> bool:
    """Whether a key is inside an untrusted one, or has one inside: then it is one of those `above` an untrusted one."""
    path = tuple(key.split("."))
    return path in above or any(path[:depth] in untrusted for depth in range(len(path)))
