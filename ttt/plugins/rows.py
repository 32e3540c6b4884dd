"""Which rows of a step a forward pass reads, for a loss that spreads its draws over all of them.

The gradient of an optimiser step is a mean over every row that the step reads, in however many forward passes. A loss
that draws something for each row, as diffusion draws a timestep, lowers the variance of that mean if it spreads the
draws over the step. `Backbone.loss` sees one pass alone; `rows_of_step` tells it where its rows stand in the step:

    step = rows_of_step(rows)
    generator = torch.Generator().manual_seed(step.seed)
    strata = torch.randperm(step.total, generator=generator)[step.slice]

Every pass of the step draws the same permutation and takes its own part of it. So `batch_size: 1,
num_microbatches: 64` has the strata that `batch_size: 64` has, and a resumed run those of the run that was not
interrupted. An evaluation is one step: its draws are spread over all windows that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class StepRows:
    """The rows of one forward pass among all rows of its step."""

    first: int
    """Where the pass's rows begin, counted over the step from 0."""
    count: int
    """Rows of the pass."""
    total: int
    """Rows of the step, over all of its passes."""
    seed: int
    """Of the step: the same in each of its passes, another in every other step. For `torch.Generator`, 0 … 2⁶³-1."""

    @property
    def slice(self) -> slice:
        """The pass's part of what is drawn for the whole step, `[total]`."""
        return slice(self.first, self.first + self.count)


_reading: ContextVar[StepRows | None] = ContextVar("ttt_rows_of_step", default=None)


@contextmanager
def reading_rows(rows: StepRows) -> Iterator[None]:
    """Say to `rows_of_step`, inside, which rows the forward pass reads."""
    mark = _reading.set(rows)
    try:
        yield
    finally:
        _reading.reset(mark)


def rows_of_step(count: int) -> StepRows:
    """Where the rows of the running forward pass stand in their step.

    Args:
        count: rows of the batch, as the loss found it.

    Returns:
        What training or evaluation said of the pass. Where neither runs, and for a batch of another number of rows
        than was said, the pass is a step of its own, whose seed torch's global generator draws.
    """
    rows = _reading.get()
    if rows is not None and rows.count == count:
        return rows
    import torch  # here, so that a backbone plugin can be imported without it

    return StepRows(first=0, count=count, total=count, seed=int(torch.randint(1 << 62, ())))
