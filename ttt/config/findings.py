"""A finding: what is wrong with a config, where, what will happen and what to write instead.

Codes are stable and come in families: TTT0xx file and syntax, TTT1xx schema and shape, TTT2xx checkpointing,
TTT3xx causality and state, TTT4xx memory and disk, TTT5xx data and evaluation, TTT6xx environment, TTT7xx optimisation,
TTT8xx plugins, TTT9xx a law that the probe found broken, by its number.
A plugin's rules use a prefix of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

CODES: dict[str, str] = {
    "TTT001": "not valid YAML",
    "TTT002": "a key is written twice",
    "TTT003": "the file is empty",
    "TTT004": "the file is no mapping of sections",
    "TTT005": "the file is too large",
    "TTT006": "nested too deeply",
    "TTT007": "too many values",
    "TTT008": "not UTF-8 text",
    "TTT009": "a character that text does not have",
    "TTT010": "a YAML tag",
    "TTT011": "a key that is not a word",
    "TTT012": "more than one document",
    "TTT013": "an anchor inside itself, or an alias without an anchor",
    "TTT101": "unknown key",
    "TTT102": "wrong type",
    "TTT103": "a value that is not allowed",
    "TTT104": "a required key is missing",
    "TTT105": "a key in the wrong section",
    "TTT106": "keys that do not fit together",
    "TTT107": "an option of another backbone",
    "TTT108": "an override that cannot be applied",
    "TTT111": "a layer that the backbone does not have",
    "TTT112": "a width that does not divide into heads",
    "TTT113": "rotary embedding on heads of odd width",
    "TTT114": "an inner model without hidden units",
    "TTT201": "one checkpoint per mini-batch",
    "TTT202": "checkpoints nested in checkpoints",
    "TTT203": "a group size far from the best",
    "TTT204": "a group larger than the sequence",
    "TTT205": "no rematerialisation where memory will not do",
    "TTT301": "a non-causal update in a causal backbone",
    "TTT302": "carried state with shuffled data",
    "TTT303": "a window shorter than one mini-batch",
    "TTT304": "carried state without a boundary",
    "TTT305": "carried state with nothing to carry",
    "TTT306": "windows that do not divide into mini-batches",
    "TTT401": "a run that does not fit in memory",
    "TTT402": "a run that may not fit in memory",
    "TTT403": "a checkpoint larger than the disk's free space",
    "TTT404": "checkpoints larger than the disk's free space",
    "TTT405": "what a run costs",
    "TTT501": "data that is not there",
    "TTT502": "evaluation on the training data",
    "TTT503": "an evaluation that never comes",
    "TTT504": "lines of data that are no JSON",
    "TTT505": "lines of data without their keys",
    "TTT506": "recordings that are not there",
    "TTT507": "recordings shorter than a window",
    "TTT508": "recordings without what lies beside them",
    "TTT509": "weights to start from that are not there",
    "TTT510": "weights to start from that belong to something else",
    "TTT511": "a run that goes on with other settings than what it starts from",
    "TTT601": "a run_dir that cannot be written",
    "TTT602": "one run in several processes",
    "TTT603": "an implementation of the scan that cannot be compiled",
    "TTT604": "compiling without a compiler",
    "TTT605": "a file of the backbone that cannot be read",
    "TTT701": "a warm-up longer than the run",
    "TTT702": "nothing that learns",
    "TTT703": "gates that can never open",
    "TTT704": "gates that hardly open within the run",
    "TTT705": "an inner learning rate outside the literature",
    "TTT706": "autocast on parameters that need none",
    "TTT801": "unknown backbone",
    "TTT802": "a broken plugin",
    "TTT803": "a plugin that failed while it was asked",
    "TTT901": "a forward pass that writes",
    "TTT902": "gradients that depend on rematerialisation",
    "TTT903": "the future reaches the past",
    "TTT904": "a stream in pieces is not the whole",
    "TTT905": "rows of a batch that see each other",
    "TTT906": "a closed gate that is not the plain backbone",
    "TTT910": "a TTT layer that does nothing",
}
"""Every code of the core, with its title."""

ENVIRONMENT_CODES = frozenset(
    {
        *("TTT403", "TTT501", "TTT504", "TTT505", "TTT506", "TTT508", "TTT509"),
        *("TTT601", "TTT602", "TTT603", "TTT604", "TTT605", "TTT802", "TTT803"),
    }
)
"""Codes that blame the machine that the config was read on, not the config."""


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


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found."""

    code: str
    """As in `CODES`, or of a plugin's own prefix."""
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
    """For a plugin's code: whether it blames the machine that the config was read on, as `ENVIRONMENT_CODES` do."""


def blames_environment(finding: Finding) -> bool:
    """Whether a finding is about the machine that the config was read on, not about the config."""
    return finding.of_environment or finding.code in ENVIRONMENT_CODES


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
