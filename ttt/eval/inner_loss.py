"""The inner loss of each TTT layer by position: does a layer learn while it reads? Imports no torch.

Source: TTT-LM (arXiv 2407.04620), its figure of the inner loss by token: `ℓ(W₀; x_t)`, `ℓ(W_{t−1}; x_t)` and
`ℓ(W_t; x_t)`, over sequences of 2048 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ttt.config.schema import MOST_STEPS
from ttt.config.tasks import TaskOptions
from ttt.errors import EnvironmentProblem
from ttt.eval.items import Item, Measured, Row
from ttt.eval.sources import require_folder
from ttt.eval.tasks import Arrays, ItemOptions, ItemTask, Setup
from ttt.plugins.capabilities import Scoring
from ttt.plugins.capable import capability
from ttt.reading import unreadable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from ttt.eval.bench import Bench
    from ttt.inner_curves import InnerCurve

LOSSES = ("w0", "before", "after")
"""The three losses of a token, as `ttt.inner_curves.InnerCurve` names them."""
SUFFIXES = {"speech": (".flac", ".wav", ".ogg", ".mp3"), "text": (".txt",)}
"""The files that are sequences, by what a backbone reads."""


class InnerLossOptions(ItemOptions):
    """Options of the inner loss by position."""

    positions: Annotated[int, Field(ge=2, le=MOST_STEPS)] = 2048
    """How many positions of each file are read; a shorter file is read to its end."""


class InnerLoss(ItemTask):
    """Inner losses by position: how much each TTT layer has learned, and how much one step adds."""

    name = "inner_loss"
    options: ClassVar[type[TaskOptions]] = InnerLossOptions
    arms: ClassVar[tuple[str, ...]] = ("ttt",)
    arms_without: ClassVar[tuple[str, ...]] = ("closed",)
    batched: ClassVar[bool] = False
    needs_ttt: ClassVar[bool] = True
    folder: ClassVar[str | None] = "librilight"

    def items(self, setup: Setup) -> Sequence[Item]:
        """An item for each file below the folder: a sequence, not independent of the others in its own folder."""
        folder = setup.data
        suffixes = SUFFIXES[capability(setup.backbone, Scoring).score_facts(setup.config).medium]
        found = []
        for file in _files(folder, suffixes):
            place = file.relative_to(folder)
            name, book = place.as_posix(), place.parent.as_posix()
            found.append(Item(name, name, name if book == "." else book, files=(file,)))
        if not found:
            raise EnvironmentProblem(
                f"{folder}: holds no {' or '.join(suffixes)} file to read inner losses from; name another folder",
                key="data",
            )
        return found

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        """The three losses of each layer: their means over positions, and position by position as arrays."""
        return [_measured(bench, item) for item in items]

    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """`gain`, `ℓ(W₀) − ℓ(W_{t−1})`; `step`, `ℓ(W_{t−1}) − ℓ(W_t)`; the losses: means over layers, and by layer."""
        sites = list(dict.fromkeys(name.rpartition(".")[0] for name in numbers))
        by_site = {name: [numbers[f"{site}.{name}"] for site in sites] for name in LOSSES}
        w0, before, after = by_site.values()
        parts = {
            "gain": [one - other for one, other in zip(w0, before, strict=True)],
            "step": [one - other for one, other in zip(before, after, strict=True)],
            **by_site,
        }
        means = {name: sum(column) / len(column) for name, column in parts.items()}
        return means | {
            f"{name}/{site}": value for name, column in parts.items() for site, value in zip(sites, column, strict=True)
        }

    def figures(self, setup: Setup, rows: Sequence[Row], arrays: Arrays) -> Mapping[str, Figure]:
        """The figure of each arm: a panel for each layer."""
        from ttt.eval.pictures import inner_loss_figure

        arms = dict.fromkeys(arm for row in rows for arm in row.arms)
        by_arm = {arm: _joined([arrays.of(row.item.id, arm) for row in rows]) for arm in arms}
        return {
            "inner_loss.png" if arm == "ttt" else f"inner_loss_{arm}.png": inner_loss_figure(curves, arm=arm)
            for arm, curves in by_arm.items()
            if curves
        }


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files below a folder, in the order of their paths.

    Raises:
        EnvironmentProblem: it is missing, no folder, or cannot be read.
    """
    require_folder(folder)
    try:
        return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    except OSError as error:
        raise EnvironmentProblem(f"{folder}: cannot be read: {unreadable(error)}", key="data") from None


def _measured(bench: Bench, item: Item) -> Measured:
    import numpy as np

    from ttt.inner_curves import InnerCurves

    with InnerCurves(bench.context) as recorder, bench.stream() as stream:
        for piece in _first(bench.reader.stream(item.files[0]), bench.options.positions):
            stream.read(piece[None].to(bench.device))
    arrays = {
        f"{site}.{name}": losses[0]
        for site, curve in recorder.curves().items()
        for name, losses in zip(LOSSES, curve, strict=True)
    }
    return Measured({name: float(np.nanmean(losses, dtype=np.float64)) for name, losses in arrays.items()}, arrays)


def _first(pieces: Iterator[Tensor], positions: int) -> Iterator[Tensor]:
    """The pieces `[S,t]` of the first positions."""
    for piece in pieces:
        yield piece[:, :positions]
        positions -= piece.shape[1]
        if positions <= 0:
            return


def _joined(sequences: Sequence[Mapping[str, Any]]) -> dict[str, InnerCurve]:
    """The curves of several sequences by site, with NaN after the end of shorter ones."""
    import numpy as np

    from ttt.inner_curves import InnerCurve

    sequences = [arrays for arrays in sequences if arrays]
    longest = max((len(losses) for arrays in sequences for losses in arrays.values()), default=0)

    def rows(name: str) -> np.ndarray:
        parts = [arrays[name] for arrays in sequences]
        return np.stack([np.pad(part, (0, longest - len(part)), constant_values=np.nan) for part in parts])

    sites = dict.fromkeys(name.rpartition(".")[0] for arrays in sequences for name in arrays)
    return {site: InnerCurve(*(rows(f"{site}.{name}") for name in LOSSES)) for site in sites}
