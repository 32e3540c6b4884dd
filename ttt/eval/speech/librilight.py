"""Hours of one reader as one stream: the loss by position, under each arm. Imports no torch.

Source: the layout is that of Libri-Light (Kahn et al., arXiv 1912.07875).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from ttt.config.tasks import TaskOptions
from ttt.eval.items import Item
from ttt.eval.positions import PositionTask
from ttt.eval.sources import books
from ttt.eval.tasks import ItemOptions, Setup

if TYPE_CHECKING:
    from ttt.eval.bench import Bench


class LibriLightOptions(ItemOptions):
    """Options of the task `librilight`."""

    hours: Annotated[float, Field(gt=0, le=1000)] = 3.0
    """How much of each book is read, its chapters one after another."""


class LibriLight(PositionTask):
    """Hours of a book as one stream: the loss by position, and beyond the backbone's attention."""

    name = "librilight"
    options: ClassVar[type[TaskOptions]] = LibriLightOptions
    medium: ClassVar[str | None] = "speech"

    def items(self, setup: Setup) -> Sequence[Item]:
        """An item for each book."""
        return [Item(book.key, book.key, book.key, {}, book.files) for book in books(setup.data)]

    def most(self, bench: Bench) -> int:
        """The frames of so many hours."""
        rate = bench.facts.positions_per_second
        assert rate is not None
        return round(bench.options.hours * 3600 * rate)
