"""What a code means, told at length: `ttt check --explain`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Explanation:
    """What a code means."""

    severity: str
    """error, warning or note."""
    what: str
    """What was found, and what will happen."""
    why: str
    """Why that costs a run."""
    bad: str
    """A whole config that triggers it."""
    good: str
    """One near it that triggers nothing."""
    source: str
    """Who says so."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files that the configs speak of, by name, beside them."""
    options: tuple[str, ...] = ()
    """Options of `ttt check` that the bad config needs; the good one too, unless `good_options` says others."""
    good_options: tuple[str, ...] | None = None
    environment: tuple[str, ...] = ()
    """Variables of the process, `NAME=value`, with which the bad config is checked, and the good one without."""
    bad_bytes: bytes | None = None
    """The bad config itself, where `bad` can only describe it."""
    needs: str = ""
    """What must be installed for it."""
    title: str = ""
    """For a plugin's code: what it is, in a few words; those of the core are in `ttt.config.CODES`."""
