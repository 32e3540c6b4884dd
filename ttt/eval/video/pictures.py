"""Pictures of the video tasks: losses of parts of a window, and the contact sheets of all arms in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ttt.eval.items import Row
from ttt.eval.statistics import Estimate, estimate, paired_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"ttt": "#1668b8", "closed": "#c7511f", "reset": "#5b8f3a"}
INK, GRID, FAINT = "#303030", "#e4e4e4", "#808080"
_KINDS = (("band", "timesteps (left: little noise)"), ("segment", "segment"))


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, without a window and without global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def loss_by_part(rows: Sequence[Row]) -> Figure:
    """The loss by band of timesteps and by segment, arms side by side, and below the paired differences.

    Args:
        rows: of `diffusion_loss`, none of which failed.
    """
    arms = list(rows[0].arms)
    pairs = [(arms[0], other) for other in arms[1:]]
    figure = new_figure(11, 7 if pairs else 4)
    kinds = [(kind, label, _parts(rows, kind)) for kind, label in _KINDS]
    widths = [len(parts) + 1 for _, _, parts in kinds]
    panels = figure.subplots(2 if pairs else 1, 2, squeeze=False, width_ratios=widths)
    for column, (kind, label, parts) in enumerate(kinds):
        drawn = {arm: [_estimated(rows, f"{kind}.{part}", arm) for part in parts] for arm in arms}
        _draw(panels[0][column], parts, drawn, [COLOURS.get(arm, INK) for arm in arms])
        if pairs:
            found = {
                f"{one} − {other}": [_difference(rows, f"{kind}.{part}", one, other) for part in parts]
                for one, other in pairs
            }
            _draw(panels[1][column], parts, found, [COLOURS.get(other, INK) for _, other in pairs])
            panels[1][column].axhline(0, color=INK, linewidth=0.8)
        panels[-1][column].set_xlabel(label, color=INK)
    panels[0][0].set_ylabel("loss", color=INK)
    if pairs:
        panels[1][0].set_ylabel(f"paired difference\n(below 0: {arms[0]} is better)", color=INK)
    for row in panels:
        row[0].legend(frameon=False, fontsize=9)
    figure.suptitle(_title(rows), x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _parts(rows: Sequence[Row], kind: str) -> list[str]:
    numbers = next(iter(rows[0].arms.values()))
    return [name.partition(".")[2] for name in numbers if name.startswith(f"{kind}.")]


def _title(rows: Sequence[Row]) -> str:
    clusters = len({row.item.cluster for row in rows})
    if clusters == 1:
        return f"diffusion loss; windows: {len(rows)}, all cut from one video, so that no error is known"
    return f"diffusion loss; windows: {len(rows)}, cut from {clusters} videos; bars: one standard error over videos"


def _estimated(rows: Sequence[Row], name: str, arm: str) -> Estimate:
    return estimate([row.arms[arm][name] for row in rows], *_grouping(rows))


def _difference(rows: Sequence[Row], name: str, one: str, other: str) -> Estimate:
    first, second = ([row.arms[arm][name] for row in rows] for arm in (one, other))
    return paired_difference(first, second, *_grouping(rows))


def _grouping(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    return [row.item.unit for row in rows], [row.item.cluster for row in rows]


def _draw(axes: Axes, parts: Sequence[str], drawn: Mapping[str, Sequence[Estimate]], colours: Sequence[str]) -> None:
    """Draw points of several series side by side at each part, with error bars where the error is known."""
    for number, ((label, found), colour) in enumerate(zip(drawn.items(), colours, strict=True)):
        places = [place + (number - (len(drawn) - 1) / 2) * 0.18 for place in range(len(parts))]
        errors = [one.stderr for one in found if one.stderr is not None]
        axes.errorbar(
            places,
            [one.mean for one in found],
            errors if len(errors) == len(found) else None,
            fmt="o",
            color=colour,
            markersize=4,
            capsize=2,
            label=label,
        )
    axes.set_xticks(range(len(parts)), parts, fontsize=8, color=INK)
    if len(parts) > 4:
        axes.tick_params(axis="x", rotation=45)
    axes.set_xlim(-0.6, len(parts) - 0.4)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def sheets_above_one_another(sheets: Mapping[str, Path]) -> Figure:
    """The contact sheets of one prompt set under each arm, above one another.

    Args:
        sheets: a picture by arm.
    """
    from matplotlib.image import imread

    pictures = {arm: imread(sheet) for arm, sheet in sheets.items()}
    width = 11.0
    heights = [width * picture.shape[0] / picture.shape[1] for picture in pictures.values()]
    figure = new_figure(width, sum(heights) + 0.35 * len(heights))
    panels = figure.subplots(len(pictures), 1, squeeze=False, height_ratios=heights)
    for axes, (arm, picture) in zip(panels.flat, pictures.items(), strict=True):
        axes.imshow(picture)
        axes.set_title(arm, loc="left", fontsize=11, color=COLOURS.get(arm, INK), fontweight="bold")
        axes.set_axis_off()
    return figure
