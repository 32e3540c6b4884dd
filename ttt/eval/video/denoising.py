"""The task `diffusion_loss`: how well a model denoises held-out windows, by band of timesteps and by segment.

A window is noised at timesteps spread evenly over the noise schedule, and the training loss is taken at each. Noise and
timesteps follow from the window's name and the option `seed` alone. So they are the same under every arm, in every run
and in every batch, and differences between arms, or between two runs, are of the model and not of the draw. This
module imports no torch until windows are looked up or measured.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ttt.config.schema import MOST_STEPS
from ttt.config.tasks import TaskOptions
from ttt.errors import PluginError, UsageError
from ttt.eval.items import Item, Measured, Row
from ttt.eval.tasks import Arrays, ItemTask, Setup
from ttt.plugins.capabilities import DiffusionScoring
from ttt.plugins.capability_base import Capability
from ttt.plugins.capable import capability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttt.eval.bench import Bench

METRIC = "loss"


class DiffusionLossOptions(TaskOptions):
    """Options of the task."""

    bands: Annotated[int, Field(ge=1, le=100)] = 10
    """Into how many equal bands the timesteps are cut."""
    draws: Annotated[int, Field(ge=1, le=1000)] = 2
    """Timesteps that are drawn in each band for each window; each is a forward pass under every arm."""
    limit: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """How many windows, drawn by `seed`; null is all."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of the noise and the timesteps, and of which windows `limit` draws."""


class DiffusionLoss(ItemTask):
    """How well held-out windows are denoised: the loss by band of timesteps and by segment."""

    name = "diffusion_loss"
    options: ClassVar[type[TaskOptions]] = DiffusionLossOptions
    requires: ClassVar[tuple[type[Capability], ...]] = (DiffusionScoring,)
    lists_without_torch: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = False

    def is_ready(self, setup: Setup) -> bool:
        """Whether the config has held-out data."""
        return setup.backbone.has_eval_data(setup.config)

    def items(self, setup: Setup) -> Sequence[Item]:
        """The windows of the held-out data, in their order. Imports torch.

        Raises:
            UsageError: there are no held-out data.
        """
        if not self.is_ready(setup):
            raise UsageError(
                f"the task {self.name}: there are no held-out data, and the loss of what was trained on says little; "
                f"name some in data.eval_data"
            )
        backbone = capability(setup.backbone, DiffusionScoring)
        dataset = setup.backbone.dataset(setup.config, split="eval", device="cpu")
        found = []
        for index in range(len(dataset)):
            source, name = backbone.window_source(dataset, index), f"{index}: {dataset.describe(index)}"
            found.append(Item(name, name, source.name, files=source.files))
        return found

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        """The losses of some windows at their timesteps, side by side."""
        import torch

        backbone, options, dataset = capability(bench.backbone, DiffusionScoring), bench.options, bench.context.dataset
        count = backbone.num_timesteps(bench.config)
        if count < options.bands:
            raise UsageError(f"bands: {options.bands} is more than the {count} timesteps; write fewer")
        bands = bands_of(count, options.bands)
        numbers, names = zip(*(_number_and_name(item) for item in items), strict=True)
        seeds = [_number(f"{options.seed}:{name}") >> 1 for name in names]
        timesteps = torch.tensor([timesteps_of(seed, bands, options.draws) for seed in seeds])
        batch = _on(bench.device, dataset.collate([dataset[number] for number in numbers]))
        losses = backbone.diffusion_losses(bench.model, batch, bench.config, timesteps=timesteps, seeds=seeds)
        if losses.loss.shape[:2] != timesteps.shape:
            raise PluginError(
                f"the backbone {bench.backbone.name} gave losses {list(losses.loss.shape)} for timesteps "
                f"{list(timesteps.shape)}, not [B, N, S] for [B, N]"
            )
        by_window = losses.loss.double().cpu().numpy()
        return [
            _measured(loss, losses.weights, times.numpy(), bands)
            for loss, times in zip(by_window, timesteps, strict=True)
        ]

    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """`loss` over all timesteps and segments; `loss/band.FIRST-LAST` and `loss/segment.N` of parts."""
        return {METRIC: numbers[METRIC], **{f"{METRIC}/{name}": numbers[name] for name in numbers if name != METRIC}}

    def figures(self, setup: Setup, rows: Sequence[Row], arrays: Arrays) -> Mapping[str, Figure]:
        """The loss by band and by segment under each arm, and how much the arms differ there."""
        from ttt.eval.video.pictures import loss_by_part

        return {f"{self.name}.png": loss_by_part(rows)}


def _number_and_name(item: Item) -> tuple[int, str]:
    """The number of a window in its dataset, and its name there."""
    number, _, name = item.id.partition(": ")
    return int(number), name


def bands_of(count: int, bands: int) -> list[range]:
    """The timesteps of each band, `0 … count−1` cut as evenly as whole numbers allow."""
    edges = [band * count // bands for band in range(bands + 1)]
    return [range(first, end) for first, end in itertools.pairwise(edges)]


def timesteps_of(seed: int, bands: Sequence[range], draws: int) -> list[int]:
    """So many timesteps in each band, one in each equal part of it; with as many as it has, each of them once."""
    found = []
    for number, band in enumerate(bands):
        for draw in range(draws):
            inside = _number(f"{seed}:{number}:{draw}") / 2**64
            found.append(band[min(int((draw + inside) * len(band) / draws), len(band) - 1)])
    return found


def _measured(losses: Any, weights: Sequence[float], timesteps: Any, bands: Sequence[range]) -> Measured:
    """What one window gave: losses `[N,S]` at timesteps `[N]`, as means of its parts."""
    import numpy as np

    by_band = (losses @ np.asarray(weights)).reshape(len(bands), -1).mean(axis=1)
    digits = len(str(bands[-1][-1]))
    names = [f"band.{band[0]:0{digits}}-{band[-1]:0{digits}}" for band in bands]
    numbers = {METRIC: float(by_band.mean()), **dict(zip(names, map(float, by_band), strict=True))}
    numbers |= {f"segment.{number}": float(loss) for number, loss in enumerate(losses.mean(axis=0), 1)}
    return Measured(numbers, {"loss": losses, "timesteps": timesteps, "weights": np.asarray(weights)})


def _number(text: str) -> int:
    """A number below 2⁶⁴ that follows from a text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _on(device: Any, batch: Any) -> Any:
    """A batch on a device: tensors in dicts, lists and tuples."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda value: value.to(device) if hasattr(value, "to") else value, batch)
