"""Rules of `ttt check`: what the core's own and those of plugins are made of. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ttt.config.findings import Code, Finding

Subject = TypeVar("Subject", contravariant=True)
"""What a rule looks at: a `ttt.config.RunConfig` where a plugin brings it."""


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """A check of a resolved config: a function, the codes that it can find, and the keys that it rests on.

    A plugin's rule is made by the decorator `rule`, and gets the `ttt.config.RunConfig`, defaults included. It must
    work without torch, and be instant. What it raises, a finding of a code that it does not declare, or one that is
    no `ttt.config.Finding`, becomes the finding TTT803, which blames the plugin.
    """

    check: Callable[[Subject], Iterable[Finding]]
    """Gives the findings, in any order."""
    codes: tuple[Code, ...]
    """Every code that it can find."""
    reads: tuple[str, ...] | None = None
    """The keys, dotted, that must be as the user meant them for the rule to say anything: `train.lr`, or a section,
    `train`. None: all of them, so that the rule is asked only where the config is free of errors."""

    @property
    def name(self) -> str:
        """What the function is called."""
        return getattr(self.check, "__name__", repr(self.check))

    def __call__(self, subject: Subject) -> Iterable[Finding]:
        """What it finds."""
        return self.check(subject)


def rule(
    *codes: Code, reads: Sequence[str] | None = None
) -> Callable[[Callable[[Subject], Iterable[Finding]]], Rule[Subject]]:
    """Make a `Rule` of a function; `ttt.config.Code` shows how.

    Args:
        codes: every code that the function can find.
        reads: the keys that it rests on; see `Rule.reads`.

    Raises:
        TypeError: no code is given, or `reads` is a text.
    """
    if not codes or not all(isinstance(code, Code) for code in codes):
        raise TypeError("a rule declares its codes: write @rule(ABC101) or @rule(ABC101, reads=('train.lr',))")
    if isinstance(reads, str):
        raise TypeError(f"reads is a list of keys, not a text: write reads=({reads!r},)")
    keys = None if reads is None else tuple(reads)
    return lambda check: Rule(check, codes, keys)
