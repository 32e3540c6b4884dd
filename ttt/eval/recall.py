"""Second hearing: does a model that has heard a passage before find it likelier, after a long gap? Imports no torch.

A stream is a passage, a gap of other material, and the passage again. Its control has another passage of the same book
in the first place, and all else the same. The gain is how much lower the loss of the last passage is if it was heard
before. Where the gap is longer than the backbone's attention sees, only fast weights can recall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field

from ttt.config.schema import MOST_STEPS
from ttt.config.tasks import TaskOptions
from ttt.config.values import as_tuple
from ttt.errors import EnvironmentProblem, UsageError
from ttt.eval.items import Item, Measured, Row
from ttt.eval.sources import Source, books, texts
from ttt.eval.tasks import ARMS, Arrays, ItemOptions, ItemTask, Setup, with_chosen
from ttt.plugins.capabilities import Scoring
from ttt.plugins.capable import capability

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from ttt.eval.bench import Bench

_Length = Annotated[float, Field(gt=0, le=1e6)]
_Lengths = Annotated[tuple[_Length, ...], BeforeValidator(as_tuple, json_schema_input_type=list[float])]


class RecallOptions(ItemOptions):
    """Options of the task `recall`."""

    passage: _Length = 10.0
    """Length of the passage: seconds of sound, or tokens of text."""
    gaps: Annotated[_Lengths, Field(min_length=1, max_length=64)] = (30.0, 120.0, 600.0)
    """Lengths of the gap, in the same unit; each is measured for every passage."""
    passages: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 1
    """How many passages of each book are tried, from its beginning on."""


class Recall(ItemTask):
    """Second hearing: how much likelier a passage is that was heard before, after a gap of other material."""

    name = "recall"
    options: ClassVar[type[TaskOptions]] = RecallOptions
    arms: ClassVar[tuple[str, ...]] = ARMS
    batched: ClassVar[bool] = False
    folder: ClassVar[str | None] = "librilight"

    def is_ready(self, setup: Setup) -> bool:
        """Only if it is told where its material is: what backbones bring is too short for its gaps."""
        return setup.options.data is not None and super().is_ready(setup)

    def items(self, setup: Setup) -> Sequence[Item]:
        """An item for each book, passage and gap. The gap is from the next book."""
        sources, options = _sources(setup), setup.options
        after = (*sources[1:], sources[0])
        return [
            Item(f"{unit}@{gap:g}", unit, each.key, {"gap": f"{gap:g}"}, each.files + other.files)
            for each, other in zip(sources, after, strict=True)
            for unit in (f"{each.key}#{passage}" for passage in range(options.passages))
            for gap in options.gaps
        ]

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        """The loss of the last passage, heard before and not, each in a stream of its own; and the gain."""
        from ttt.eval.long_streams import losses_at_end

        found = []
        for item in items:
            heard, control, length = self._streams(bench, item)
            again, once = losses_at_end(bench, heard, length), losses_at_end(bench, control, length)
            gains = {f"gain.{name}": once[name] - again[name] for name in again}
            found.append(Measured({**gains, **{f"again.{name}": loss for name, loss in again.items()}}))
        return found

    def _streams(self, bench: Bench, item: Item) -> tuple[Tensor, Tensor, int]:
        """The stream in which the passage was heard before, its control, and the passage's length in positions."""
        import torch

        sources = _sources(Setup(bench.config, bench.backbone, bench.options, self.folder))
        place = next(number for number, source in enumerate(sources) if source.key == item.cluster)
        rate = bench.facts.positions_per_second or 1.0
        length, gap = max(1, round(bench.options.passage * rate)), round(float(item.tags["gap"]) * rate)
        number = int(item.unit.rpartition("#")[2])
        mine = _beginning(bench, sources[place], (number + 2) * length)
        passage, other = mine[:, number * length :].split(length, 1)
        between = _beginning(bench, sources[(place + 1) % len(sources)], gap)
        return torch.cat([passage, between, passage], 1), torch.cat([other, between, passage], 1), length

    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """`gain` by the chosen weights, in nats a position; and the loss at the second hearing, `again`."""
        return with_chosen(numbers, capability(setup.backbone, Scoring).score_facts(setup.config).chosen)

    def figures(self, setup: Setup, rows: Sequence[Row], arrays: Arrays) -> Mapping[str, Figure]:
        """`recall.png`: the gain against the gap."""
        from ttt.eval.pictures import recall_figure

        facts = capability(setup.backbone, Scoring).score_facts(setup.config)
        rate = facts.positions_per_second
        span = None if facts.attention_span is None else facts.attention_span / (rate or 1.0)
        gains = {
            arm: [
                (float(row.item.tags["gap"]), row.item.cluster, row.arms[arm][f"gain.{facts.chosen}"]) for row in rows
            ]
            for arm in rows[0].arms
        }
        return {"recall.png": recall_figure(gains, span=span, unit="seconds" if rate else "tokens")}


def _sources(setup: Setup) -> list[Source]:
    """The books or texts of the task's folder.

    Raises:
        EnvironmentProblem: there are none.
        UsageError: there is only one.
    """
    medium = capability(setup.backbone, Scoring).score_facts(setup.config).medium
    found = books(setup.data) if medium == "speech" else texts(setup.data)
    if len(found) < 2:
        raise UsageError(
            f"{setup.data}: holds one book only, and the gap is other material than the passage; add another",
            key="data",
        )
    return found


def _beginning(bench: Bench, source: Source, length: int) -> Tensor:
    """The first positions of a book, `[S,length]`.

    Raises:
        EnvironmentProblem: it is shorter.
    """
    import torch

    from ttt.eval.long_streams import pieces

    found = torch.cat(list(pieces(bench, source.files, length)), 1)
    if found.shape[1] < length:
        unit = "seconds" if bench.facts.positions_per_second else "tokens"
        rate = bench.facts.positions_per_second or 1.0
        raise EnvironmentProblem(
            f"{source.files[0].parent}: has {found.shape[1] / rate:g} {unit}, and {length / rate:g} are needed for the "
            f"passage or the gap; write shorter ones, or leave this book out"
        )
    return found
