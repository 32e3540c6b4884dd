"""Rules of `ttt check`, the core's and those of plugins. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ttt.config.findings import Code, Finding

Subject = TypeVar("Subject", contravariant=True)
"""What a rule reads: for a plugin's rule, a `ttt.config.RunConfig`."""


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """A check of a resolved config: a function, the codes that it can find, and the keys that it reads.

    A plugin makes its rules with the decorator `rule`. They get the `ttt.config.RunConfig`, defaults included, must
    work without torch, and must be instant. If a rule raises, finds a code that it does not declare, or returns
    something other than `ttt.config.Finding`s, the finding TTT803 blames the plugin.
    """

    check: Callable[[Subject], Iterable[Finding]]
    """Gives the findings, in any order."""
    codes: tuple[Code, ...]
    """Every code that it can find."""
    reads: tuple[str, ...] | None = None
    """The keys that the rule reads, dotted: `train.lr`, or a section, `train`. If one of them has an error, the rule
    is left out. None means all keys: the rule runs only if the config has no errors."""

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
        reads: the keys that it reads; see `Rule.reads`.

    Raises:
        TypeError: no code is given, or `reads` is a text.
    """
    if not codes or not all(isinstance(code, Code) for code in codes):
        raise TypeError("a rule declares its codes: write @rule(ABC101) or @rule(ABC101, reads=('train.lr',))")
    if isinstance(reads, str):
        raise TypeError(f"reads is a list of keys, not a text: write reads=({reads!r},)")
    keys = None if reads is None else tuple(reads)
    return lambda check: Rule(check, codes, keys)
