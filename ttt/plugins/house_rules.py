"""Rules for `ttt check` that a plugin brings without a backbone, as a lab's house rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt.config.explanation import Explanation
    from ttt.config.findings import Finding


@dataclass(frozen=True)
class HouseRule:
    """A rule, and what the codes of its findings mean."""

    check: Callable[[Any], Sequence[Finding]]
    """A function of the resolved `RunConfig`. It is asked if every key of the config is what the user meant."""
    explanations: Mapping[str, Explanation] = field(default_factory=dict)
    """By code: for `ttt check --explain` and `--list`. A code has a prefix of its own, not TTT."""

    @property
    def name(self) -> str:
        """What the rule is called in a message about it."""
        return getattr(self.check, "__name__", repr(self.check))
