"""The items of a task before a model is built: listed, drawn, counted. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ttt.errors import PluginError, UsageError
from ttt.eval.items import Item
from ttt.eval.statistics import draw
from ttt.eval.tasks import ItemTask, Setup


@dataclass(frozen=True)
class Listing:
    """The items that a task's options choose."""

    items: tuple[Item, ...]
    units: int
    """How many units the task's data have; `limit` may have drawn fewer."""

    @property
    def drawn(self) -> int:
        """How many units the items are of."""
        return len({item.unit for item in self.items})

    def in_words(self) -> str:
        """How many there are, as `120 items of 30 units, drawn from 5,000`."""
        drawn, count = self.drawn, len(self.items)
        told = _counted(count, "item") + (f" of {_counted(drawn, 'unit')}" if drawn != count else "")
        return told if drawn == self.units else f"{told}, drawn from {self.units:,}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def listed(task: ItemTask, setup: Setup) -> Listing:
    """The items of a task that its options choose.

    Raises:
        TTTError: the data does not fit the task.
    """
    items = list(task.items(setup))
    _require_distinct(task, items)
    if not items:
        raise UsageError(f"eval.tasks: the task {task.name} has no items", fix="name other data")
    units = {item.unit for item in items}
    limit = getattr(setup.options, "limit", None)
    if limit is not None:
        drawn = draw(sorted(units), limit, setup.options.seed)
        items = [item for item in items if item.unit in drawn]
    return Listing(tuple(items), len(units))


def lacking(task: ItemTask, setup: Setup) -> str | None:
    """What the backbone lacks for a task, as a sentence; None if it lacks nothing."""
    told = task.lacks(setup)
    return None if told is None else f"the task {task.name}: the backbone {setup.backbone.name} {told}"


def chosen_items(task: ItemTask, setup: Setup) -> Listing:
    """The items of a task that its options choose, if the backbone can do it.

    Raises:
        TTTError: the backbone or the data does not fit the task.
    """
    told = lacking(task, setup)
    if told is not None:
        raise UsageError(told)
    return listed(task, setup)


def _require_distinct(task: ItemTask, items: Sequence[Item]) -> None:
    """Refuse a task that gives two items one name, or puts a unit into two clusters.

    Raises:
        PluginError: it does.
    """
    seen: set[str] = set()
    clusters: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            raise PluginError(f"the task {task.name} has two items of the name {item.id!r:.80}")
        seen.add(item.id)
        if clusters.setdefault(item.unit, item.cluster) != item.cluster:
            raise PluginError(f"the task {task.name} puts the unit {item.unit!r:.80} into two clusters")
