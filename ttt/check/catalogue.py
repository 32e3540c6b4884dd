"""Every code, and what it means: of the core, and of what an installed plugin brings. No plain check asks for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

from ttt.check import codes
from ttt.check.probe_codes import LAWS
from ttt.check.rules import RULES
from ttt.config import nodes, source
from ttt.config.explanation import Explanation, read_explanations
from ttt.config.findings import Code
from ttt.errors import PluginError
from ttt.plugins import Backbone
from ttt.plugins.asking import WAY_OUT, owner
from ttt.plugins.rules import Rule

PREFIX = "TTT"
"""What the core's codes begin with; a plugin's begin with letters of its own."""

_ALL = (
    *(each for module in (nodes, source, codes) for each in vars(module).values() if isinstance(each, Code)),
    *(code for rule in RULES for code in rule.codes),
    *LAWS.values(),
)
DECLARED: Mapping[str, Code] = {code.number: code for code in sorted(_ALL, key=lambda code: code.number)}
"""Every code of the core, by number."""
CODES: dict[str, str] = {number: code.title for number, code in DECLARED.items()}
"""Every code of the core, with its title."""


@functools.cache
def explanations() -> Mapping[str, Explanation]:
    """What each code of the core means, by number."""
    found = read_explanations(DECLARED.values())
    return {number: found[number] for number in DECLARED}


def explanations_of(backbone: Backbone) -> Mapping[str, Explanation]:
    """What the codes of a plugin mean: those of its `explanations`, and those that its rules declare.

    Raises:
        PluginError: it fails when it is asked, or a rule declares a code that nothing explains.
    """
    declared = {code.number: code for rule in backbone.rules if isinstance(rule, Rule) for code in rule.codes}
    for number in declared:
        if number.startswith(PREFIX):
            raise PluginError(f"{owner(backbone)} declares the code {number}, which is the core's{WAY_OUT}")
    try:
        told = {**backbone.explanations(), **read_explanations(declared.values())}
    except ValueError as error:
        raise PluginError(f"{owner(backbone)} does not explain its codes: {error}{WAY_OUT}") from error
    for number, code in declared.items():
        if number not in told:
            raise PluginError(f"{owner(backbone)} does not explain its code {number}{WAY_OUT}")
        told[number] = replace(told[number], severity=code.severity.value, title=code.title)
    return told
