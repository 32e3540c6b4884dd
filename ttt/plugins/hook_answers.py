"""Checks of what the hooks return, so that a wrong answer is reported at once and not where it fails later.

Each check takes what a plugin returned, and raises `WrongAnswer` if it is wrong. The answer of `ttt_backbone` is
checked in `ttt.plugins.discovery`, which knows its entry point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ttt.plugins.asking import WrongAnswer, with_its_type

_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _require_sequence(answer: Any, of: str) -> None:
    if not isinstance(answer, Sequence) or isinstance(answer, str | bytes):
        raise WrongAnswer(f"{with_its_type(answer)}, not a sequence of {of}")


def _require_all(answer: Any, kind: type) -> None:
    _require_sequence(answer, kind.__name__)
    for number, entry in enumerate(answer):
        if not isinstance(entry, kind):
            raise WrongAnswer(f"{with_its_type(entry)} as number {number}, not of type {kind.__name__}")


def _rules(answer: Any) -> None:
    from ttt.config.findings import PREFIX
    from ttt.plugins.rules import Rule

    _require_all(answer, Rule)
    for rule in answer:
        if not rule.codes:
            raise WrongAnswer(f"the rule {rule.name} without a code; make it with ttt.plugins.rule")
        for number in (code.number for code in rule.codes if code.number.startswith(PREFIX)):
            raise WrongAnswer(
                f"the rule {rule.name} with the core's code {number}; write letters of its own, as LAB101"
            )


def _imported(answer: Any) -> None:
    from ttt.plugins.imported import ImportedConfig, ImportedKey

    if not isinstance(answer, ImportedConfig):
        raise WrongAnswer(f"{with_its_type(answer)}, not an ImportedConfig, or None where it does not know the file")
    if not isinstance(answer.format, str):
        raise WrongAnswer(f"an ImportedConfig whose format is {with_its_type(answer.format)}, not a text")
    if not isinstance(answer.values, Mapping):
        raise WrongAnswer(f"an ImportedConfig whose values are {with_its_type(answer.values)}, not a mapping")
    _require_all(answer.keys, ImportedKey)
    _require_accounted(answer.values, [key.new for key in answer.keys])


def _require_accounted(values: Mapping[Any, Any], told: Sequence[str | None]) -> None:
    """Hold an import to keys that a config can have, each told where it comes from, so that no value is lost."""
    from ttt.config.schema import RunConfig

    for key in values:
        if not isinstance(key, str) or key.partition(".")[0] not in RunConfig.model_fields:
            raise WrongAnswer(f"an ImportedConfig with the key {key!r:.80}, whose section no config has")
        if key not in told:
            raise WrongAnswer(f"an ImportedConfig with the value {key}, and no ImportedKey says where it is from")
    for key in told:
        if key is not None and key not in values:
            raise WrongAnswer(f"an ImportedConfig with an ImportedKey for {key!r:.80}, which has no value")


def _logger(answer: Any) -> None:
    for method in ("log", "close"):
        if not callable(getattr(answer, method, None)) or isinstance(answer, type):
            told = f"the class {answer.__name__}" if isinstance(answer, type) else with_its_type(answer)
            raise WrongAnswer(f"{told}, not a Logger, which has `log(line)` and `close()`")


def _tasks(answer: Any) -> None:
    from ttt.config.tasks import TaskOptions
    from ttt.plugins.eval_tasks import AnyEvalTask

    _require_all(answer, AnyEvalTask)
    for task in answer:
        name, options = getattr(task, "name", None), task.options
        if not isinstance(name, str) or not _TASK.fullmatch(name):
            raise WrongAnswer(f"a task whose name is {name!r:.80}; write letters, digits, `_`, `-` and `.`")
        if not (isinstance(options, type) and issubclass(options, TaskOptions)):
            raise WrongAnswer(f"the task {name} whose options are {options!r:.80}, not a subclass of TaskOptions")


HOOK_ANSWERS: Mapping[str, Callable[[Any], None]] = {
    "ttt_backbone": lambda answer: None,
    "ttt_rules": _rules,
    "ttt_import_config": _imported,
    "ttt_loggers": _logger,
    "ttt_eval_tasks": _tasks,
}
"""The check of each hook's answer. None is not checked: it means no answer."""
