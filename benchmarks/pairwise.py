"""A few rows of a product in which every pair of values of two factors still occurs, or every three of three.

Most faults need one value of one factor, or one of each of two. The whole product has thousands of rows, this has tens.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Combination = tuple[tuple[str, Any], ...]


def combinations_of(row: Row, strength: int = 2) -> set[Combination]:
    """Every two (or `strength`) of a row's values, with the names of their factors."""
    return set(itertools.combinations(row.items(), strength))


def allowed_rows(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]) -> list[dict[str, Any]]:
    """The product of the factors' values, but for rows that cannot be."""
    rows = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    return [row for row in rows if allowed(row)]


def covering(
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool] = lambda row: True,
    cost: Callable[[Row], float] = lambda row: 1.0,
    strength: int = 2,
) -> list[dict[str, Any]]:
    """Rows with every combination of values that any allowed row has, the same rows at every call.

    One by one, the row that has most new ones for its cost; of two that have as many, the first of the product.

    Args:
        factors: their names, and the values of each.
        allowed: whether a row can be.
        cost: what a row takes, above zero.
        strength: of how many factors the values are combined.
    """
    rows = allowed_rows(factors, allowed)
    combined, costs = [combinations_of(row, strength) for row in rows], [cost(row) for row in rows]
    missing = set().union(*combined)
    # A row never has more new ones than when it was last looked at, so only the best need be looked at again.
    heap = [(-len(combined[index]) / costs[index], index) for index in range(len(rows))]
    heapq.heapify(heap)
    chosen = []
    while missing:
        _, index = heapq.heappop(heap)
        now = -len(combined[index] & missing) / costs[index]
        if heap and (now, index) > heap[0]:
            heapq.heappush(heap, (now, index))
            continue
        chosen.append(rows[index])
        missing -= combined[index]
    return chosen
