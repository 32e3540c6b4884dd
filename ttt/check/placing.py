"""Where a finding stands: the place of its key in the file, and the order of the file."""

from __future__ import annotations

from dataclasses import replace

from ttt.config.findings import Finding, Place
from ttt.config.places import path_of
from ttt.config.source import Source


def placed(finding: Finding, source: Source) -> Finding:
    """The finding with the place of its key."""
    if finding.place is not None:
        return finding
    return replace(finding, place=source.place(path_of(finding.path)))


def in_order(finding: Finding) -> tuple[bool, int, int]:
    """Sort key: the order of the file, overrides last."""
    place = finding.place or Place("")
    return place.line is None, place.line or 0, place.column or 0
