"""Every code of the core and of installed plugins, and what it means. A plain check does not need it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ttt.check import codes, data_codes
from ttt.check.probe_codes import LAWS
from ttt.check.rules import RULES
from ttt.check.rules.of_plugins import house_rules
from ttt.config import nodes, source
from ttt.config.explanation import Explanation, read_explanations
from ttt.config.findings import PREFIX, Code
from ttt.config.schema import RunConfig
from ttt.errors import PluginError
from ttt.plugins import Backbone
from ttt.plugins.asking import WAY_OUT, owner
from ttt.plugins.rules import Rule

_ALL = (
    *(
        each
        for module in (nodes, source, codes, data_codes)
        for each in vars(module).values()
        if isinstance(each, Code)
    ),
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
    """What the codes of a backbone's plugin mean, by number: from its `explanations` and from its rules' files.

    Raises:
        PluginError: the plugin fails when it is asked, or a rule declares a code that has no explanation.
    """
    rules = [rule for rule in backbone.rules if isinstance(rule, Rule)]
    return explanations_of_rules(backbone, rules, backbone.explanations)


def house_explanations() -> dict[str, Mapping[str, Explanation]]:
    """What the codes of house rules mean, by plugin. A plugin that fails when it is asked is left out."""
    found: dict[str, Mapping[str, Explanation]] = {}
    for answer in house_rules(None).given:
        with contextlib.suppress(PluginError):  # `ttt plugins` says what is wrong
            told = explanations_of_rules(answer.plugin, answer.value)
            found[answer.plugin.name] = {**found.get(answer.plugin.name, {}), **told}  # two may have one name
    return found


def explanations_of_rules(
    plugin: object, rules: Iterable[Rule[RunConfig]], own: Callable[[], Mapping[str, Explanation]] = dict
) -> Mapping[str, Explanation]:
    """What the codes of a plugin mean, by number: from `own`, and from the files beside its rules.

    Args:
        plugin: whose they are, for messages.
        rules: its rules; each declares the codes that it may find.
        own: gives explanations beyond those of the rules' files.

    Raises:
        PluginError: a rule declares a code that has no explanation, or one with the core's prefix.
    """
    declared = {code.number: code for rule in rules for code in rule.codes}
    for number in declared:
        if number.startswith(PREFIX):
            raise PluginError(f"{owner(plugin)} declares the code {number}, which is the core's", fix=WAY_OUT)
    try:
        found = {**own(), **read_explanations(declared.values())}
    except ValueError as error:
        raise PluginError(f"{owner(plugin)} does not explain its codes: {error}", fix=WAY_OUT) from error
    for number, code in declared.items():
        if number not in found:
            told = f"{owner(plugin)} does not explain its code {number}: it is declared without home=__name__"
            raise PluginError(told, fix=WAY_OUT)
        found[number] = replace(found[number], severity=code.severity.value, title=code.title)
    return found
