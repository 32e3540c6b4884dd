"""Rules that plugins bring, asked: those of a backbone, and house rules that come without one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ttt.config.findings import Finding, Place, Severity
from ttt.config.schema import RunConfig
from ttt.plugins.asking import WrongAnswer, asked
from ttt.plugins.hookspecs import RULES
from ttt.plugins.registry import Answers, ask

if TYPE_CHECKING:
    from ttt.config.explanation import Explanation

_CODE = re.compile(r"[A-Za-z0-9_-]{1,40}")
"""What a plugin may call a finding: a word, for it is shown between others."""


def house_rules(backbone: str | None) -> Answers:
    """What the plugins answer to `ttt_rules`; None asks for the rules of every backbone."""
    return ask(RULES, backbone=backbone)


def found_by(rule: Callable[[RunConfig], Sequence[Any]], plugin: object, config: RunConfig) -> list[Finding]:
    """What a plugin's rule finds in a config.

    Raises:
        PluginError: it failed.
    """
    with asked(plugin, f"its rule {getattr(rule, '__name__', repr(rule))}", rule):
        findings = list(rule(config))
        strange = [type(finding).__name__ for finding in findings if not isinstance(finding, Finding)]
        if strange:
            raise WrongAnswer(f"{strange[0]}, not Finding")
        for finding in findings:
            _require_wellformed(finding)
    return findings


def _require_wellformed(finding: Finding) -> None:
    """Refuse a plugin's finding that could not be shown.

    Raises:
        WrongAnswer: a field of it is of another type, or its code is no word.
    """
    kinds = {"code": str, "severity": Severity, "path": str, "message": str, "fix": str, "of_environment": bool}
    maybe = {"place": Place, "replacement": str, "moves_to": str}
    for name, kind in (*kinds.items(), *maybe.items()):
        value = getattr(finding, name)
        if not isinstance(value, kind) and not (name in maybe and value is None):
            raise WrongAnswer(f"a Finding whose {name} is of type {type(value).__name__}, not {kind.__name__}")
    if not _CODE.fullmatch(finding.code):
        raise WrongAnswer(f"a Finding whose code is {finding.code!r:.80}; write letters and digits, as TOY101")


def house_explanations() -> dict[str, Mapping[str, Explanation]]:
    """What the codes of house rules mean, by plugin; one that fails when it is asked explains nothing."""
    found: dict[str, dict[str, Explanation]] = {}
    for answer in house_rules(None).given:
        for rule in answer.value:
            found.setdefault(answer.plugin.name, {}).update(rule.explanations)
    return dict(found)
