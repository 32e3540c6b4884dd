"""A finding: what is wrong with a config, where, what will happen and what to write instead; and its code.

A code is declared once, beside what finds it: its number, title and severity, and what follows from it. Numbers are
stable: one that goes is never given to anything else. A plugin's codes use a prefix of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Severity(str, Enum):
    """How bad it is."""

    ERROR = "error"
    """The run cannot start, or would not be what the config says."""
    WARNING = "warning"
    """The run starts, and most likely should not."""
    NOTE = "note"
    """Worth knowing."""

    def __str__(self) -> str:
        return self.value


class Blame(Enum):
    """Who is to blame for a finding, and so where it is mended."""

    CONFIG = "config"
    """The config, which its author changes."""
    MACHINE = "machine"
    """The machine that the config was read on: another one may have the file, the disk or the compiler."""
    EITHER = "either"
    """The config asks for more than this machine has; a smaller run or a larger machine mends it."""
    PLUGIN = "plugin"
    """The plugin, which its author changes."""


class Family(Enum):
    """The families of the core's codes, in the order that they are listed in."""

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
        """What its codes begin with, as people say it; nothing is decided by it."""
        self.title = title


@dataclass(frozen=True)
class Place:
    """Where something is written."""

    file: str
    """The file as the user named it, or the override, `--set ttt.layers=all`."""
    line: int | None = None
    """From 1; None for what is not in a file."""
    column: int | None = None
    """From 1, in characters."""
    text: str = ""
    """The line itself, to be quoted; empty where there is nothing to quote."""
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
        ValueError: the number is no word, or the title is empty.
    """

    number: str
    """As users see it: letters, then digits."""
    title: str
    """What is found, in a few words."""
    severity: Severity
    """How bad it is, where a finding does not say otherwise."""
    blames: Blame = Blame.CONFIG
    """Who is to blame."""
    of_training: bool = False
    """Whether only training minds: then it is not found where a config is only sampled from, or its data are made."""
    home: str = ""
    """`__name__` of the module that declares it. It is explained in a YAML file beside that module, of the same name;
    see `ttt.config.explanation`."""
    family: Family | None = None
    """For the core's own codes."""

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
        """A finding of this code; the arguments are the fields of `Finding`."""
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
    """One thing that a check found. Make it with `Code.at`, which knows the code and the severity."""

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
    """The value that was found, or the number that the finding rests on; plain data."""
    place: Place | None = None
    """Where; a rule leaves it out, and the key's place is filled in."""
    replacement: str | None = None
    """What `ttt check --fix` writes there instead, where that needs no thought: the key of TTT101, else the value."""
    moves_to: str | None = None
    """The section that `--fix` moves the key to, where there is one alone; empty is the top level."""
    of_environment: bool = False
    """Whether it blames the machine, where its code does not say so: `Blame.MACHINE`."""
    of_training: bool = False
    """Whether only training minds, where its code does not say so: `Code.of_training`."""
    declared: Code | None = None
    """What its code was declared as; None for a plugin's that is not declared."""

    @property
    def title(self) -> str:
        """The title of its code; empty where the code is not declared."""
        return "" if self.declared is None else self.declared.title

    @property
    def blames(self) -> Blame:
        """Who is to blame for it."""
        if self.of_environment:
            return Blame.MACHINE
        return Blame.CONFIG if self.declared is None else self.declared.blames

    @property
    def only_for_training(self) -> bool:
        """Whether it is nothing to a config that is not trained."""
        return self.of_training or (self.declared is not None and self.declared.of_training)


PREFIX = "TTT"
"""What the core's codes begin with; a plugin's begin with letters of its own."""


def is_code(text: object) -> bool:
    """Whether something may be a code: one short word, for it is shown between others."""
    if not isinstance(text, str) or len(text) > 40:
        return False
    letters = text.replace("-", "").replace("_", "")
    return text != "" and text.isascii() and (letters == "" or letters.isalnum())


def blames_environment(finding: Finding) -> bool:
    """Whether a finding is about what is installed or lies on this machine, so that the config may be right."""
    return finding.blames in (Blame.MACHINE, Blame.PLUGIN)


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether one of them is an error."""
    return any(finding.severity is Severity.ERROR for finding in findings)


def summary(findings: Sequence[Finding]) -> str:
    """How many of each: `2 errors, 1 warning`; `no findings` for none."""
    counts = []
    for severity in Severity:
        count = sum(finding.severity is severity for finding in findings)
        if count:
            counts.append(f"{count} {severity}{'s' if count > 1 else ''}")
    return ", ".join(counts) or "no findings"
