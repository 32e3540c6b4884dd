"""Two evaluations of the same items beside each other: refused if they are not of the same, else paired item by item.

Nothing here reads a file or knows a task; `comparing.py` does. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttt.eval.statistics import MCNEMAR_BELOW, Estimate, McNemar, average, mcnemar, paired_difference
from ttt.printable import json_text, shortened
from ttt.words import first_few

_OUTCOMES = {0.0, 0.5, 1.0}
"""Of a pair; McNemar's test is of wins and losses."""


@dataclass(frozen=True)
class Outcome:
    """What one evaluation gave for one item."""

    unit: str
    cluster: str
    digests: tuple[str, ...]
    """SHA-256 of its files, in their order; empty if they could not be read."""
    values: Mapping[str, Mapping[str, float]]
    """By arm, then by metric, the task's own first; empty if the item failed."""


@dataclass(frozen=True)
class Evaluated:
    """What one evaluation gave for one task."""

    conditions: Mapping[str, Any]
    """By dotted name, what decides what a number means: version, options, how scores are made, how files are read."""
    outcomes: Mapping[str, Outcome]
    """By item."""
    of_arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What decides it for one arm alone, by arm; it matters if both evaluations have that arm."""

    @property
    def arms(self) -> frozenset[str]:
        """Under which arms it was measured."""
        return frozenset(arm for outcome in self.outcomes.values() for arm in outcome.values)


@dataclass(frozen=True)
class Compared:
    """How one task differs between two evaluations."""

    metric: str
    """The task's own."""
    arms: Mapping[str, Estimate]
    """The second evaluation minus the first, by arm that both have, paired item by item."""
    tests: Mapping[str, McNemar] = field(default_factory=dict)
    """McNemar's test by arm, if outcomes are wins and losses of few clusters. Wins are the second evaluation's."""
    failed: int = 0
    """Items that failed in one of them or both; they count in nothing."""


def refusals(one: Evaluated, other: Evaluated) -> list[str]:
    """Why two evaluations of a task cannot be compared, each reason a sentence; empty if they can."""
    found = list(_differing(one.conditions, other.conditions))
    for arm in sorted(one.arms & other.arms):
        found += _differing(one.of_arms.get(arm, {}), other.of_arms.get(arm, {}))
    for first, second, words in ((one, other, "the second lacks"), (other, one, "the first lacks")):
        missing = sorted(set(first.outcomes) - set(second.outcomes))
        if missing:
            found.append(f"{words} {_items(missing)}; evaluate both with the same data, --limit and seed")
    changed = sorted(item for item in set(one.outcomes) & set(other.outcomes) if _changed(item, one, other))
    if changed:
        found.append(f"the data differ: {_items(changed)} had other content")
    return found


def compared(one: Evaluated, other: Evaluated) -> Compared | None:
    """How the second evaluation differs from the first, which must be of the same; None if they share no item or arm.

    Args:
        one: the first evaluation.
        other: the second one, of the same items.
    """
    good = [item for item in sorted(one.outcomes) if one.outcomes[item].values and other.outcomes[item].values]
    if not good:
        return None
    first, second = ([each.outcomes[item] for item in good] for each in (one, other))
    metric = next(iter(next(iter(first[0].values.values()))))
    arms: dict[str, Estimate] = {}
    tests: dict[str, McNemar] = {}
    for arm in (arm for arm in first[0].values if arm in second[0].values):
        before, after = ([each.values[arm][metric] for each in outcomes] for outcomes in (first, second))
        clusters = [each.cluster for each in first]
        arms[arm] = paired_difference(after, before, [each.unit for each in first], clusters)
        if {*before, *after} <= _OUTCOMES and len(set(clusters)) < MCNEMAR_BELOW:
            tests[arm] = mcnemar(after, before, clusters)
    return Compared(metric, arms, tests, len(one.outcomes) - len(good)) if arms else None


def average_difference(tasks: Sequence[Compared | None], arm: str, *, metric: str = "acc") -> Estimate | None:
    """The average over tasks of what an arm gained; None if a task has no result, is of another metric, or is alone."""
    if len(tasks) < 2 or any(task is None or task.metric != metric for task in tasks):
        return None
    return average([task.arms.get(arm) for task in tasks if task is not None])


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*one, *other)):
        if one.get(name) != other.get(name) or (name in one) != (name in other):
            yield f"{name} is {_in_words(one, name)} in the first, {_in_words(other, name)} in the second"


def _changed(item: str, one: Evaluated, other: Evaluated) -> bool:
    """Whether an item is another one under the same name. What could not be read is of no known content."""
    a, b = one.outcomes[item], other.outcomes[item]
    read_again = bool(a.digests and b.digests)
    return (a.unit, a.cluster) != (b.unit, b.cluster) or (read_again and a.digests != b.digests)


def _items(items: Sequence[str]) -> str:
    return f"{len(items)} {'item' if len(items) == 1 else 'items'} ({first_few([shortened(i, 60) for i in items])})"


def _in_words(conditions: Mapping[str, Any], name: str) -> str:
    return shortened(json_text(conditions[name], indent=None), 80) if name in conditions else "not known"
