"""The rules that a plugin brings, asked: what one answers wrongly is the plugin's failure, and no finding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ttt.config.findings import Code, Finding, Place, Severity, is_code
from ttt.config.schema import RunConfig
from ttt.plugins.asking import WrongAnswer, asked
from ttt.plugins.hookspecs import RULES
from ttt.plugins.registry import Answers, ask
from ttt.plugins.rules import Rule

_KINDS = {
    **{"code": str, "severity": Severity, "path": str, "message": str, "fix": str},
    **{"of_environment": bool, "of_training": bool},
}
_KINDS_OR_NONE = {"place": Place, "replacement": str, "moves_to": str, "declared": Code}
"""What a finding's fields are; those of the second may be None."""


def as_rule(brought: Callable[[RunConfig], Iterable[Any]]) -> Rule[RunConfig]:
    """What a plugin brings as a rule: a plain function declares no code, and rests on the whole config."""
    return brought if isinstance(brought, Rule) else Rule(brought, codes=())


def house_rules(backbone: str | None) -> Answers:
    """What plugins answer to `ttt_rules`, which need bring no backbone; None asks for the rules of every backbone."""
    return ask(RULES, backbone=backbone)


def found_by(rule: Rule[RunConfig], plugin: object, config: RunConfig) -> list[Finding]:
    """What a plugin's rule finds.

    Raises:
        PluginError: it failed, or found what it does not declare.
    """
    with asked(plugin, f"its rule {rule.name}", rule.check):
        findings: list[Any] = list(rule(config))
        strange = [type(finding).__name__ for finding in findings if not isinstance(finding, Finding)]
        if strange:
            raise WrongAnswer(f"{strange[0]}, not Finding")
        for finding in findings:
            _require_wellformed(finding)
        return [_as_declared(finding, rule) for finding in findings] if rule.codes else findings


def _require_wellformed(finding: Finding) -> None:
    """Refuse a plugin's finding that could not be shown.

    Raises:
        WrongAnswer: a field of it is of another type, or its code is no word.
    """
    for name, kind in (*_KINDS.items(), *_KINDS_OR_NONE.items()):
        value = getattr(finding, name)
        if not isinstance(value, kind) and not (name in _KINDS_OR_NONE and value is None):
            raise WrongAnswer(f"a Finding whose {name} is of type {type(value).__name__}, not {kind.__name__}")
    if not is_code(finding.code):
        raise WrongAnswer(f"a Finding whose code is {finding.code!r:.80}; write letters and digits, as TOY101")


def _as_declared(finding: Finding, rule: Rule[RunConfig]) -> Finding:
    """The finding, with what the rule declares of its code.

    Raises:
        WrongAnswer: the rule does not declare it.
    """
    declared = next((code for code in rule.codes if code.number == finding.code), None)
    if declared is None:
        codes = ", ".join(code.number for code in rule.codes)
        raise WrongAnswer(f"a Finding of the code {finding.code}, and declares {codes} alone")
    return finding if finding.declared is declared else replace(finding, declared=declared)
