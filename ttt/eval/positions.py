"""The loss by position of long streams, under each arm: of books that are read out, of texts. Imports no torch.

If fast weights are a memory, the loss goes on falling, or stays lower, where the backbone's own attention has ended.
The arm `reset` tells what adaptation without memory gives.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ttt.config.schema import MOST_STEPS
from ttt.config.tasks import TaskOptions
from ttt.eval.items import Item, Measured, Row
from ttt.eval.sources import texts
from ttt.eval.tasks import ARMS, Arrays, ItemOptions, ItemTask, Setup, with_chosen
from ttt.plugins.capabilities import Scoring
from ttt.plugins.capable import capability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttt.eval.bench import Bench


class PositionTask(ItemTask):
    """A task whose items are long streams, measured position by position."""

    arms: ClassVar[tuple[str, ...]] = ARMS
    batched: ClassVar[bool] = False
    unit: ClassVar[str] = "book"
    """What an item is called, for its picture."""

    @abstractmethod
    def most(self, bench: Bench) -> int:
        """How many positions of each stream are read."""

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        """The loss at each position of each stream, by kind of stream, and its means."""
        from ttt.eval.long_streams import losses_by_position

        most = self.most(bench)
        return [_summed(losses_by_position(bench, item.files, most=most), bench) for item in items]

    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """`loss` by the chosen weights, of each kind of stream, and all of them beyond the attention's span."""
        facts = capability(setup.backbone, Scoring).score_facts(setup.config)
        return with_chosen(numbers, facts.chosen)

    def figures(self, setup: Setup, rows: Sequence[Row], arrays: Arrays) -> Mapping[str, Figure]:
        """The loss by position."""
        from ttt.eval.pictures import position_figure

        facts = capability(setup.backbone, Scoring).score_facts(setup.config)
        found = {
            arm: {row.item.id: arrays.of(row.item.id, arm) for row in rows}
            for arm in dict.fromkeys(arm for row in rows for arm in row.arms)
        }
        rate, span = facts.positions_per_second, facts.attention_span
        figure = position_figure(found, span=span, rate=rate, unit=self.unit)
        return {} if figure is None else {f"{self.name}.png": figure}


class TextPositionsOptions(ItemOptions):
    """Options of the task `text_positions`."""

    positions: Annotated[int, Field(ge=2, le=MOST_STEPS)] = 1 << 14
    """How many tokens of each text are read; a shorter one is read to its end."""


class TextPositions(PositionTask):
    """Long texts, each as one stream: the loss by position, and beyond the backbone's attention."""

    name = "text_positions"
    options: ClassVar[type[TaskOptions]] = TextPositionsOptions
    medium: ClassVar[str | None] = "text"
    unit: ClassVar[str] = "text"

    def items(self, setup: Setup) -> Sequence[Item]:
        """An item for each `.txt` file at any depth."""
        return [Item(text.key, text.key, text.key, {}, text.files) for text in texts(setup.data)]

    def most(self, bench: Bench) -> int:
        """As many as the option says."""
        most: int = bench.options.positions
        return most


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
