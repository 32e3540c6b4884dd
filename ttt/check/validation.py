"""Plain data, validated against the schema: a finding in plain words for everything that does not fit, all at once.

A key that does not fit is reported and removed, and the rest is validated again. So contradictions between keys are
found in the same pass. Removed keys are remembered as untrusted: no finding rests on a value that the user will change
anyway.

The keys to blame and the fix are never parsed out of a message: validators raise `ttt.config.Misfit`, and pydantic's
error types say the rest (`expected.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ttt.check.codes import TTT101, TTT102, TTT103, TTT104, TTT106, TTT803
from ttt.check.expected import expected, instead, listed, meant, show
from ttt.check.misfits import Problem, blamed, problems_of
from ttt.check.model_keys import described, field_at, section_at
from ttt.check.render import MOST_OF_A_KIND
from ttt.check.unknown_key import OtherOptions, unknown_key
from ttt.config.findings import Code, Finding
from ttt.config.misfit import Misfit
from ttt.config.places import KeyPath, dotted
from ttt.config.schema import RunConfig
from ttt.config.source import Source

_MOST_GUESSES = MOST_OF_A_KIND
"""After so many findings, no more guesses are made about unknown keys: no more findings are shown either."""


@dataclass
class Validated:
    """The result of a validation."""

    config: RunConfig | None
    """The config without the keys that did not fit; None if the rest is not a config either."""
    findings: list[Finding] = field(default_factory=list)
    untrusted: set[KeyPath] = field(default_factory=set)
    """Keys whose value in `config` may not be what the user meant."""


def validate(
    model: type[RunConfig], data: Mapping[str, Any], source: Source, *, other_options: OtherOptions = dict
) -> Validated:
    """Validate data against a model of a run.

    Args:
        model: `RunConfig`, with the options of a backbone.
        data: what the user wrote, with the plugin's defaults filled in. It is not changed.
        source: where the user wrote it.
        other_options: returns the options of other backbones by name, to find the backbone that has a key.

    Raises:
        Exception: a validator of the plugin raised something other than `ValueError`.
    """
    validation = _Validation(model, source, other_options, _copy(data))
    while validation.goes_on():
        pass
    return validation.result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


class _Validation:
    """Validates data repeatedly, each time without the keys that did not fit."""

    def __init__(
        self, model: type[RunConfig], source: Source, other_options: OtherOptions, remaining: dict[str, Any]
    ) -> None:
        self.model = model
        self.source = source
        self.other_options = other_options
        self.remaining = remaining
        self.result = Validated(None)

    def goes_on(self) -> bool:
        """Validate the remaining data; report and remove what does not fit. Returns whether anything was removed."""
        try:
            self.result.config = self.model.model_validate(self.remaining)
            return False
        except ValidationError as error:
            problems = list(problems_of(error, self.remaining))
        taken_out = False
        for problem in sorted(problems, key=lambda problem: problem.kind != "extra_forbidden"):
            if problem.kind == "extra_forbidden" and self.source.written(problem.path):
                self._report_unknown(problem)
            else:
                self._report(problem)
            taken_out |= self._take_out(problem)
        return taken_out

    def _report_unknown(self, problem: Problem) -> None:
        guess = len(self.result.findings) < _MOST_GUESSES
        finding, might_be = unknown_key(problem.path, self.model, self.source, self.other_options, guess=guess)
        self.result.findings.append(finding)
        self.result.untrusted |= {problem.path, *might_be}

    def _report(self, problem: Problem) -> None:
        """Turn a problem into a finding, unless it follows from another one, and mark its keys as untrusted."""
        keys = blamed(problem, self.model)
        between = keys != [problem.path] or self._of_a_section(problem)
        follows = (between or problem.kind == "missing") and any(map(self._is_doubtful, keys))
        self.result.untrusted.update(keys)
        if follows:
            return
        written = [key for key in keys if self.source.written(key)]
        path = written[0] if written else problem.path
        if problem.kind == "missing" and isinstance(path[-1], int):
            path = path[:-1]  # a value of a list is missing: report the list
        code, message, fix, replacement = self._in_words(problem, path, keys, between=between)
        if not written and path[:1] == ("ttt",) and problem.kind != "missing":
            code, message = TTT803, f"the plugin's own defaults do not fit: {message}"
            fix = "write the key yourself, and tell who made the plugin"
        value = problem.value
        self.result.findings.append(
            code.at(
                dotted(path),
                message,
                fix,
                value=value if isinstance(value, str | int | float | None) else None,
                place=self.source.place(path),
                replacement=replacement if self.source.written(path) else None,
            )
        )

    def _is_doubtful(self, key: KeyPath) -> bool:
        """Whether a key, or a key inside it, is untrusted."""
        return any(
            key[: len(doubtful)] == doubtful or (doubtful[: len(key)] == key and field_at(self.model, doubtful))
            for doubtful in self.result.untrusted
        )

    def _of_a_section(self, problem: Problem) -> bool:
        """Whether the problem is raised by a section's validator, about several of its keys."""
        return problem.misfit is not None and section_at(self.model, problem.path) is not None

    def _in_words(
        self, problem: Problem, path: KeyPath, keys: list[KeyPath], *, between: bool
    ) -> tuple[Code, str, str, str | None]:
        """Code, message, fix, and the new value if it is certain."""
        name = dotted(path)
        if problem.kind == "extra_forbidden":
            return TTT101, f"unknown key `{name}`", "", None
        if problem.kind == "missing":
            return (*self._missing(problem, path), None)
        if problem.misfit is not None:
            code = TTT106 if between else TTT103
            return code, _told(problem.misfit, problem.value, name, keys, between=between), problem.misfit.fix, None
        wanted = expected(problem, self.model)
        replacement = meant(problem.value, wanted, path, self.model)
        message = f"`{name}` must be {wanted.words}, not {show(problem.value)}"
        if not wanted.words:
            message = f"`{name}`: {problem.message}"
        fix = instead(problem.value, wanted, path, self.model, replacement)
        return TTT102 if wanted.wrong_type else TTT103, message, fix, replacement

    def _missing(self, problem: Problem, path: KeyPath) -> tuple[Code, str, str]:
        if isinstance(problem.path[-1], int):
            return TTT102, f"`{dotted(path)}` has too few values", "write every value of the list"
        text = described(self.model, path)
        return TTT104, f"`{dotted(path)}` is missing", f"write `{path[-1]}: …`" + (f" ({text})" if text else "")

    def _take_out(self, problem: Problem) -> bool:
        """Remove what does not fit from the data. Returns whether there was anything to remove."""
        if problem.kind == "missing" and not isinstance(problem.path[-1], int):
            return False
        keys = sorted(blamed(problem, self.model), key=lambda key: not self.source.written(key))
        return any(_remove(self.remaining, key) for key in keys)


def _told(misfit: Misfit, value: Any, name: str, keys: list[KeyPath], *, between: bool) -> str:
    """The message of a validator. If it is about a single key, the message begins with that key."""
    if between:
        return misfit.message or f"{listed(map(dotted, keys))} {'do' if len(keys) > 1 else 'does'} not fit"
    return f"`{name}`: {misfit.message}" if misfit.message else f"{show(value)} is no value of `{name}`"


def _remove(data: Any, path: KeyPath) -> bool:
    """Remove the key at a path; for a value in a list, the list's key. Returns whether it was there."""
    position = next((index for index, part in enumerate(path) if isinstance(part, int)), len(path))
    path = path[:position]
    for part in path[:-1]:
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    if not path or not isinstance(data, dict) or path[-1] not in data:
        return False
    del data[path[-1]]
    return True
