"""Hours of one reader as one stream: the loss by position, under each arm. Imports no torch.

If fast weights are a memory, the loss goes on falling, or stays lower, where the backbone's own attention has ended.
The arm `reset` tells what adaptation without memory gives.

Source: the layout is that of Libri-Light (Kahn et al., arXiv 1912.07875).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ttt.config.tasks import TaskOptions
from ttt.eval.items import Item, Measured, Row
from ttt.eval.sources import books
from ttt.eval.tasks import ARMS, Arrays, ItemOptions, ItemTask, Setup, with_chosen
from ttt.plugins.capabilities import Scoring
from ttt.plugins.capable import capability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttt.eval.bench import Bench


class LibriLightOptions(ItemOptions):
    """Options of the task `librilight`."""

    hours: Annotated[float, Field(gt=0, le=1000)] = 3.0
    """How much of each book is read, its chapters one after another."""


class LibriLight(ItemTask):
    """Hours of a book as one stream: the loss by position, and beyond the backbone's attention."""

    name = "librilight"
    options: ClassVar[type[TaskOptions]] = LibriLightOptions
    medium: ClassVar[str | None] = "speech"
    arms: ClassVar[tuple[str, ...]] = ARMS
    batched: ClassVar[bool] = False

    def items(self, setup: Setup) -> Sequence[Item]:
        """An item for each book."""
        return [Item(book.key, book.key, book.key, {}, book.files) for book in books(setup.data)]

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        """The loss at each position of each book, by kind of stream, and its means."""
        from ttt.eval.long_streams import losses_by_position

        rate = bench.facts.positions_per_second
        assert rate is not None
        return [
            _summed(losses_by_position(bench, item.files, most=round(bench.options.hours * 3600 * rate)), bench)
            for item in items
        ]

    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """`loss` by the chosen weights, of each kind of stream, and all of them beyond the attention's span."""
        facts = capability(setup.backbone, Scoring).score_facts(setup.config)
        return with_chosen(numbers, facts.chosen)

    def figures(self, setup: Setup, rows: Sequence[Row], arrays: Arrays) -> Mapping[str, Figure]:
        """`librilight.png`: the loss by position."""
        from ttt.eval.pictures import position_figure

        facts = capability(setup.backbone, Scoring).score_facts(setup.config)
        found = {
            arm: {row.item.id: arrays.of(row.item.id, arm) for row in rows}
            for arm in dict.fromkeys(arm for row in rows for arm in row.arms)
        }
        figure = position_figure(found, span=facts.attention_span, rate=facts.positions_per_second)
        return {} if figure is None else {"librilight.png": figure}


def _summed(found: Any, bench: Bench) -> Measured:
    """Means over the whole stream, and over what lies beyond the attention's span."""
    span = bench.facts.attention_span
    numbers: dict[str, float] = {}
    for name, weights in bench.facts.weights.items():
        mean = found.weighted(weights)
        if mean is not None:
            numbers[f"loss.{name}"] = mean
        late = None if span is None else found.weighted(weights, late=True)
        if late is not None:
            numbers[f"loss_beyond_attention.{name}"] = late
    return Measured(numbers, found.arrays())
