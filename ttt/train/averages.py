"""An exponential moving average of what learns (`train.ema_decay`), in float32.

    averages after the first step    the weights
    after each further step          decay · averages + (1 - decay) · weights

The averages are part of the optimiser's state in a checkpoint, so that a resumed run goes on with the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ttt.parallel.gathering import own_part

KIND = "ema"
"""Begins the names of the averages among the tensors of the optimiser's state: `ema.NAME`."""


class Averages:
    """Averages of parameters over the steps of a run.

    Args:
        weights: the parameters by name, in float32 (masters of those in half precision); read after each step.
        decay: how much of the average stays at each step.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self._weights = weights
        self._update = get_ema_multi_avg_fn(decay)
        self._averages: dict[str, Tensor] = {}

    def update(self) -> None:
        """Take the weights after a step into the averages."""
        now = {name: weight.detach() for name, weight in self._weights.items()}
        if self._averages:
            # by their own parts: PyTorch has no such update for tensors of which some are split
            self._update([own_part(x) for x in self._averages.values()], [own_part(x) for x in now.values()], len(now))
        else:
            self._averages = {name: weight.clone() for name, weight in now.items()}

    def tensors(self) -> Mapping[str, Tensor]:
        """The averages by name of their parameters; empty before the first step."""
        return self._averages

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from averages, of all parameters, or of none if they begin with the next step."""
        self._averages = {
            name: averages[name].to(weight.device, torch.float32, copy=True)
            for name, weight in self._weights.items()
            if name in averages
        }


@contextlib.contextmanager
def applied(parameters: Mapping[str, nn.Parameter], averages: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which the parameters have the values of their averages."""
    with torch.no_grad():
        parts = {name: own_part(parameters[name].detach()) for name in averages}
        own = {name: part.clone() for name, part in parts.items()}
        try:
            for name, average in averages.items():
                parts[name].copy_(own_part(average))
            yield
        finally:
            for name, value in own.items():
                parts[name].copy_(value)
