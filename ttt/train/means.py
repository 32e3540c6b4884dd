"""The means of a step's losses, over all rows that it reads, in however many passes and processes.

A loss is a mean, such as Moshi's `Σ w·ce / Σ w`, or a sum of means. The mean over a step is not the mean of its passes'
means if their weights differ: with W for the sum of a mean's weights over the whole step, it is `Σ mean · w / W` over
the passes. So each pass backpropagates `mean · w / W`, and what is added up over passes and processes, gradients
included, is that of one pass over everything. The weights come from the batches alone (`Backbone.loss_weights`), so
that W is known before the first forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt.config.schema import RunConfig
from ttt.parallel.world import World
from ttt.plugins import Backbone, Batch, LossOutput
from ttt.plugins.asking import WrongAnswer, asked


@dataclass(frozen=True)
class Share:
    """What a pass is of its step; without weights it is the whole step."""

    weights: Tensor | None = None
    """Of each mean in the pass, `[K]`."""
    totals: Tensor | None = None
    """Of each mean in the whole step, `[K]`."""

    def of_loss(self, output: LossOutput, backbone: Backbone) -> Tensor:
        """What the pass adds to the step's loss, a differentiable scalar; of the whole step, the loss itself.

        Raises:
            PluginError: the loss has another number of means than weights.
        """
        if self.weights is None:
            return output.loss
        return self._share(means_of(output, self.weights, backbone), slice(None)).sum()

    def of_metrics(self, output: LossOutput, backbone: Backbone) -> dict[str, Tensor]:
        """What the pass adds to each of the step's metrics, in float64.

        Raises:
            PluginError: a metric is a mean over something that has no weight.
        """
        entries = {name: output.metrics_over.get(name, 0) for name in output.metrics}
        for name, entry in entries.items():
            if self.weights is not None and entry >= len(self.weights):
                with asked(backbone, "`loss`", type(backbone).loss):
                    raise WrongAnswer(
                        f"the metric {name} as a mean over entry {entry} of `loss_weights`, which has "
                        f"{len(self.weights)}"
                    )
        device = output.loss.device
        values = {
            name: torch.as_tensor(value, dtype=torch.float64).detach().to(device, non_blocking=True).reshape(())
            for name, value in output.metrics.items()
        }
        if self.weights is None:
            return values
        return {name: self._share(value, entries[name]) for name, value in values.items()}

    def _share(self, means: Tensor, entry: int | slice) -> Tensor:
        assert self.weights is not None
        assert self.totals is not None
        totals = torch.where(self.totals > 0, self.totals, 1)  # what has no weight anywhere is 0
        kind = torch.promote_types(means.dtype, torch.float32)
        return means * self.weights[entry].to(kind) / totals[entry].to(kind)


def means_of(output: LossOutput, weights: Tensor, backbone: Backbone) -> Tensor:
    """The means whose sum a loss is, `[K]`, one for each of its weights.

    Raises:
        PluginError: there are more or fewer means than weights.
    """
    means = output.loss[None] if output.means is None else output.means
    if len(means) != len(weights):
        with asked(backbone, "`loss`", type(backbone).loss):
            raise WrongAnswer(f"a loss of {len(means)} means, but `loss_weights` gives {len(weights)} sums of weights")
    return means


WHOLE = Share()
"""A pass that is its whole step."""


def shares(
    backbone: Backbone,
    config: RunConfig,
    batches: Sequence[Batch],
    world: World,
    device: torch.device,
) -> list[Share]:
    """What each pass of a step is of the step.

    Args:
        backbone: gives the weights.
        config: of the run.
        batches: that this process reads in the step, in order.
        world: the processes that read it with this one.
        device: on which the losses will be.

    Raises:
        PluginError: the batches have different numbers of weights.
    """
    if len(batches) == 1 and world.data_size == 1:
        return [WHOLE]
    weights = [weights_of(backbone, config, batch, device) for batch in batches]
    if len({len(each) for each in weights}) > 1:
        with asked(backbone, "`loss_weights`", type(backbone).loss_weights):
            raise WrongAnswer(f"{sorted({len(each) for each in weights})} sums of weights for batches of one run")
    totals = world.sum(torch.stack(weights).sum(0))
    return [Share(each, totals) for each in weights]


def weighs_rows(backbone: Backbone) -> bool:
    """Whether every row counts alike, so that batches need not be read to know how much each weighs."""
    return type(backbone).loss_weights is Backbone.loss_weights


def even_shares(passes: int, world: World, device: torch.device) -> list[Share]:
    """`shares` of passes with equally many rows, each of which counts alike."""
    if passes == 1 and world.data_size == 1:
        return [WHOLE]
    one = torch.ones(1, dtype=torch.float64).to(device, non_blocking=True)
    return [Share(one, one * passes * world.data_size)] * passes


def weights_of(backbone: Backbone, config: RunConfig, batch: Batch, device: torch.device) -> Tensor:
    """Over what each mean in a batch's loss is taken, `[K]` in float64 on a device."""
    return backbone.loss_weights(batch, config).detach().to(device, torch.float64, non_blocking=True)


def added(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of each name's values."""
    totals: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            totals[name] = totals[name] + value if name in totals else value
    return totals
