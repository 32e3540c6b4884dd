"""Run the rules that a plugin brings. A malformed answer is an error of the plugin, not a finding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ttt.config.evaluation import EvalConfig
from ttt.config.findings import Code, Finding, Place, Severity, is_code
from ttt.config.schema import LoraConfig, RunConfig, TrainConfig, TTTConfig
from ttt.config.spelling import nearest
from ttt.errors import PluginError
from ttt.plugins.asking import WAY_OUT, WrongAnswer, asked, owner
from ttt.plugins.hookspecs import RULES
from ttt.plugins.registry import Answers, ask
from ttt.plugins.rules import Rule

_KINDS = {
    **{"code": str, "severity": Severity, "path": str, "message": str, "fix": str},
    **{"of_environment": bool, "of_training": bool},
}
_KINDS_OR_NONE = {"place": Place, "replacement": str, "moves_to": str, "declared": Code}
"""The types of a finding's fields. Those in the second mapping may also be None."""


_KEYS = (
    *RunConfig.model_fields,
    *(f"ttt.{name}" for name in TTTConfig.model_fields),
    *(f"lora.{name}" for name in LoraConfig.model_fields),
    *(f"train.{name}" for name in TrainConfig.model_fields),
    *(f"eval.{name}" for name in EvalConfig.model_fields),
)
"""The sections and keys that every config has."""


def as_rule(brought: Callable[[RunConfig], Iterable[Any]]) -> Rule[RunConfig]:
    """What a plugin brings, as a rule. A plain function becomes a rule that declares no code and reads every key."""
    return brought if isinstance(brought, Rule) else Rule(brought, codes=())


def house_rules(backbone: str | None) -> Answers:
    """The answers of all plugins to the hook `ttt_rules`. None asks for the rules for every backbone."""
    return ask(RULES, backbone=backbone)


def found_by(rule: Rule[RunConfig], plugin: object, config: RunConfig) -> list[Finding]:
    """The findings of a plugin's rule.

    Raises:
        PluginError: the rule failed, its answer is malformed or has a code that it does not declare, or it reads a key
            that no config has.
    """
    require_keys(rule, plugin)
    with asked(plugin, f"its rule {rule.name}", rule.check):
        findings: list[Any] = list(rule(config))
        strange = [type(finding).__name__ for finding in findings if not isinstance(finding, Finding)]
        if strange:
            raise WrongAnswer(f"{strange[0]}, not Finding")
        for finding in findings:
            _require_wellformed(finding)
        return [_as_declared(finding, rule) for finding in findings] if rule.codes else findings


def require_keys(rule: Rule[RunConfig], plugin: object) -> None:
    """Refuse a rule that reads a key which no config has: a misspelt key never keeps the rule from being asked.

    Raises:
        PluginError: naming the key, and the nearest one.
    """
    for key in filter(_is_no_key, rule.reads or ()):
        close = nearest(key, _KEYS)
        hint = f"; did you mean {close}?" if close else ""
        told = f"{owner(plugin)} has the rule {rule.name}, which reads {key!r}, a key that no config has{hint}"
        raise PluginError(told, fix=WAY_OUT)


def _is_no_key(key: str) -> bool:
    """Whether no config can have a key. Which keys `backbone` and `data` have depends on the backbone."""
    return key not in _KEYS and not key.startswith(("backbone.", "data."))


def _require_wellformed(finding: Finding) -> None:
    """Refuse a plugin's finding that could not be shown.

    Raises:
        WrongAnswer: a field has the wrong type, or the code is not letters and digits.
    """
    for name, kind in (*_KINDS.items(), *_KINDS_OR_NONE.items()):
        value = getattr(finding, name)
        if not isinstance(value, kind) and not (name in _KINDS_OR_NONE and value is None):
            raise WrongAnswer(f"a Finding whose {name} is of type {type(value).__name__}, not {kind.__name__}")
    if not is_code(finding.code):
        raise WrongAnswer(f"a Finding whose code is {finding.code!r:.80}; write letters and digits, as TOY101")


def _as_declared(finding: Finding, rule: Rule[RunConfig]) -> Finding:
    """The finding, with the declaration of its code.

    Raises:
        WrongAnswer: the rule does not declare it.
    """
    declared = next((code for code in rule.codes if code.number == finding.code), None)
    if declared is None:
        codes = ", ".join(code.number for code in rule.codes)
        raise WrongAnswer(f"a Finding of the code {finding.code}, and declares {codes} alone")
    return finding if finding.declared is declared else replace(finding, declared=declared)
