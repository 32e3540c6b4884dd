"""Which rows of a step a forward pass reads, for a loss that draws random numbers for them.

The gradient of an optimiser step is a mean over every row that the step reads, in however many forward passes and
processes. What a loss draws for a row should not depend on how many there are. `Backbone.loss` sees one pass alone;
`rows_of_step` tells it where its rows stand in the step, and draws numbers for each of them:

    draws = rows_of_step(rows).draws(latents.device)
    noise = draws.normal(latents.shape[1:])

A loss can also spread its draws over the step, as diffusion may its timesteps, to lower the variance of the mean:

    step = rows_of_step(rows)
    generator = torch.Generator().manual_seed(step.seed)
    strata = torch.randperm(step.total, generator=generator)[step.slice]

Every pass of the step draws the same permutation and takes its own part of it. So `batch_size: 1,
num_microbatches: 64` has the strata and the noise that `batch_size: 64` has, on one process or on many, and a resumed
run those of the run that was not interrupted. An evaluation is one step: its draws are spread over all windows that it
reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    seeds: tuple[int, ...] = ()
    """Of each row of the pass, for what is drawn for it alone: the same in whichever pass and process it is read. Empty
    where neither training nor evaluation runs; then torch's global generator draws."""

    @property
    def slice(self) -> slice:
        """The pass's part of what is drawn for the whole step, `[total]`."""
        return slice(self.first, self.first + self.count)

    def draws(self, device: torch.device | str = "cpu") -> RowDraws:
        """Random numbers for each row of the pass, drawn on a device; from the first on at every call."""
        return RowDraws(self.count, self.seeds, device)


class RowDraws:
    """Random numbers for the rows of a batch, each row's from a generator of its own on the device.

    Args:
        count: of rows.
        seeds: of each row; empty if torch's global generator draws for all of them.
        device: where numbers are drawn. Another kind of device draws other numbers.
    """

    def __init__(self, count: int, seeds: Sequence[int], device: torch.device | str) -> None:
        import torch  # here, so that a backbone plugin can be imported without it

        self._count = count
        self._device = torch.device(device)
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def normal(self, shape: Sequence[int], *, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers of the standard normal distribution, `[B, *shape]`; of torch's default dtype if none is given."""
        import torch

        return self._drawn(torch.randn, shape, dtype)

    def uniform(self, shape: Sequence[int] = (), *, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers from 0 on and below 1, `[B, *shape]`; of torch's default dtype if none is given."""
        import torch

        return self._drawn(torch.rand, shape, dtype)

    def _drawn(self, draw: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        import torch

        if not self._generators:
            return draw((self._count, *shape), device=self._device, dtype=dtype)
        return torch.stack(
            [draw(tuple(shape), generator=each, device=self._device, dtype=dtype) for each in self._generators]
        )


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
