"""A finding: what is wrong with a config, where, what will happen and what to write instead; and its code.

A code is declared once, beside the rule that finds it, with its number, title and severity. Numbers are stable: if a
code is removed, its number is not used again. A plugin's codes have their own prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Severity(str, Enum):
    """How bad it is."""

    ERROR = "error"
    """The run cannot start, or would not do what the config says."""
    WARNING = "warning"
    """The run can start, but most likely should not."""
    NOTE = "note"
    """Worth knowing."""

    def __str__(self) -> str:
        return self.value


class Blame(Enum):
    """Who is to blame for a finding, that is, where to fix it."""

    CONFIG = "config"
    """The config. Its author fixes it."""
    MACHINE = "machine"
    """The machine on which the config was read: another one may have the file, the disk or the compiler."""
    EITHER = "either"
    """The config asks for more than this machine has: take a smaller run or a larger machine."""
    PLUGIN = "plugin"
    """The plugin. Its author fixes it."""


class Family(Enum):
    """The families of the core's codes, in the order in which they are listed."""

    SYNTAX = ("TTT0", "File and syntax")
    SCHEMA = ("TTT1", "Schema and shape")
    CHECKPOINTING = ("TTT2", "Checkpointing")
    CAUSALITY = ("TTT3", "Causality and state")
    MEMORY = ("TTT4", "Memory and disk")
    DATA = ("TTT5", "Data and evaluation")
    ENVIRONMENT = ("TTT6", "Environment")
    OPTIMISATION = ("TTT7", "Optimisation")
    PLUGINS = ("TTT8", "Plugins")
    LAWS = ("TTT9", "Laws, broken")

    def __init__(self, prefix: str, title: str) -> None:
        self.prefix = prefix
        """What its codes begin with. It is only printed; nothing depends on it."""
        self.title = title


@dataclass(frozen=True)
class Place:
    """The place where something is written."""

    file: str
    """The file as the user named it, or the override, `--set ttt.layers=all`."""
    line: int | None = None
    """From 1; None if it is not in a file."""
    column: int | None = None
    """From 1, in characters."""
    text: str = ""
    """The line itself, to be quoted; empty if there is nothing to quote."""
    width: int = 1
    """How many characters from `column` on are meant."""

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Code:
    """A kind of finding, declared once beside the rule that finds it.

    ```python
    ABC101 = Code("ABC101", "a batch of one", Severity.WARNING, home=__name__)


    @ttt.plugins.rule(ABC101, reads=("train.batch_size",))
    def batches_are_batches(config: RunConfig) -> Iterator[Finding]:
        if config.train.batch_size == 1:
            yield ABC101.at("train.batch_size", "a batch of one is noisy", "write batch_size: 8")
    ```

    Raises:
        ValueError: the number is not letters and digits, or the title is empty.
    """

    number: str
    """The code as users see it: letters, then digits."""
    title: str
    """What is found, in a few words."""
    severity: Severity
    """How bad it is, unless a finding says otherwise."""
    blames: Blame = Blame.CONFIG
    """Who is to blame."""
    of_training: bool = False
    """Whether it matters only for training. If so, it is not reported when a config is used to sample or precompute."""
    home: str = ""
    """`__name__` of the module that declares it. A YAML file of the same name beside that module explains it; see
    `ttt.config.explanation`."""
    family: Family | None = None
    """The family of a code of the core; None for a plugin's."""

    def __post_init__(self) -> None:
        if not is_code(self.number):
            raise ValueError(f"{self.number!r:.80} is no code; write letters and digits, as TOY101")
        if not isinstance(self.title, str) or not self.title:
            raise ValueError(f"the code {self.number} has no title; say in a few words what is found")

    def at(
        self,
        path: str,
        message: str,
        fix: str = "",
        *,
        value: Any = None,
        severity: Severity | None = None,
        place: Place | None = None,
        replacement: str | None = None,
        moves_to: str | None = None,
    ) -> Finding:
        """Make a finding with this code. The arguments are the fields of `Finding`."""
        return Finding(
            code=self.number,
            severity=self.severity if severity is None else severity,
            path=path,
            message=message,
            fix=fix,
            value=value,
            place=place,
            replacement=replacement,
            moves_to=moves_to,
            declared=self,
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found. Make it with `Code.at`, which fills in the code and the severity."""

    code: str
    """The number of its code."""
    severity: Severity
    path: str
    """The key, dotted: `ttt.layers.2`; empty for the file as a whole."""
    message: str
    """What is wrong and what will happen, one sentence without a full stop."""
    fix: str = ""
    """What to write instead."""
    value: Any = None
    """The wrong value, or the number that the finding is based on; plain data."""
    place: Place | None = None
    """Where it is written. A rule leaves it out; then the place of the key is filled in."""
    replacement: str | None = None
    """What `ttt check --fix` writes instead, if that is certain: for TTT101 a key, for other codes a value."""
    moves_to: str | None = None
    """The section that `--fix` moves the key to, if there is exactly one; empty for the top level."""
    of_environment: bool = False
    """Whether it blames the machine, even if its code does not say `Blame.MACHINE`."""
    of_training: bool = False
    """Whether it matters only for training, even if `Code.of_training` is false."""
    declared: Code | None = None
    """The declaration of its code; None if a plugin does not declare it."""

    @property
    def title(self) -> str:
        """The title of its code; empty if the code is not declared."""
        return "" if self.declared is None else self.declared.title

    @property
    def blames(self) -> Blame:
        """Who is to blame for it."""
        if self.of_environment:
            return Blame.MACHINE
        return Blame.CONFIG if self.declared is None else self.declared.blames

    @property
    def only_for_training(self) -> bool:
        """Whether it does not matter for a config that is not trained."""
        return self.of_training or (self.declared is not None and self.declared.of_training)


PREFIX = "TTT"
"""The prefix of the core's codes. Plugins use other letters."""


def is_code(text: object) -> bool:
    """Whether something can be a code: one short word, because it is printed inside a line."""
    if not isinstance(text, str) or len(text) > 40:
        return False
    letters = text.replace("-", "").replace("_", "")
    return text != "" and text.isascii() and (letters == "" or letters.isalnum())


def blames_environment(finding: Finding) -> bool:
    """Whether a finding blames what is installed, or stored, on this machine, so that the config may be right."""
    return finding.blames in (Blame.MACHINE, Blame.PLUGIN)


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether any of the findings is an error."""
    return any(finding.severity is Severity.ERROR for finding in findings)


def summary(findings: Sequence[Finding]) -> str:
    """The number of findings by severity, as `2 errors, 1 warning`, or `no findings`."""
    counts = []
    for severity in Severity:
        count = sum(finding.severity is severity for finding in findings)
        if count:
            counts.append(f"{count} {severity}{'s' if count > 1 else ''}")
    return ", ".join(counts) or "no findings"
