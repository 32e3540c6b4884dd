"""The items of an evaluation task, and what was measured of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Item:
    """The smallest part of a task: what is measured, succeeds or fails by itself."""

    id: str
    """Its own name in the task."""
    unit: str
    """What is averaged first: a pair over its voices, a story, a book. `limit` draws units."""
    cluster: str
    """What its outcomes are not independent within; standard errors are clustered by it. It holds whole units."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """For results of parts of the task, as `{"type": "agreement"}`."""
    files: tuple[Path, ...] = ()
    """What it is read from."""


def made_by(folder: Path, task: str) -> Path:
    """Where the files that a task makes are kept in the folder of an evaluation."""
    return folder / f"{task}_made"


def key_of(raters: Path) -> Path:
    """Where the key to a folder for raters is: beside it, so that raters do not get it."""
    return raters.with_name(f"{raters.name}.key.csv")


@dataclass(frozen=True)
class Measured:
    """What one arm gave for one item."""

    numbers: Mapping[str, float]
    """By name; finite. They stand in `samples/TASK.jsonl`."""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What is too long for that, as losses by position: written to `positions/TASK/`."""


@dataclass(frozen=True)
class Row:
    """An item with what every arm gave for it, a line of `samples/TASK.jsonl`."""

    item: Item
    arms: Mapping[str, Mapping[str, float]]
    """Numbers by arm; empty if the item failed."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each of its files, by path."""
    error: str | None = None
    """Why it could not be measured. Such an item counts in no result."""

    def as_line(self) -> dict[str, Any]:
        """The row as JSON."""
        item = self.item
        told = {"item": item.id, "unit": item.unit, "cluster": item.cluster, "tags": dict(item.tags)}
        numbers = {arm: dict(numbers) for arm, numbers in self.arms.items()}
        return {**told, "files": dict(self.digests), "arms": numbers, "error": self.error}
