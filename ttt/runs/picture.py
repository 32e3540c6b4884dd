"""The curves of several runs over each other: losses with and without gates, gates, movement."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttt.drawing import FAINT, INK, dress, new_figure
from ttt.printable import printable
from ttt.runs.metrics_ends import POINTS, Curves, curves
from ttt.runs.run import Run
from ttt.train.pictures import smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of Okabe and Ito, told apart by people who see few colours, and legible on white and on black."""
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)))
IN_COLOR = len(COLORS) * len(DASHES)
"""How many runs have a colour or dashes of their own; more are drawn in grey behind them."""
_FEWEST = 50
"""Points of a curve among very many."""
_LONGEST_NAME = 26
_LINE = 0.046
"""Height of a name beside a panel, in parts of the panel's."""


@dataclass(frozen=True)
class Drawn:
    """A run's curves with how they are drawn."""

    name: str
    curves: Curves
    style: dict[str, Any]
    """Colour, dashes and height, as matplotlib names them."""
    is_named: bool


def drawn_runs(runs: Sequence[Run], *, tell: Callable[[str], None] = lambda problem: None) -> list[Drawn]:
    """The runs that have curves, in their order, the first `IN_COLOR` with a style of their own.

    Args:
        runs: as the table has them.
        tell: called with a sentence about each run whose metrics cannot be read.
    """
    found: list[Drawn] = []
    names = _without_what_all_share([run.name for run in runs])
    for run, name in zip(runs, names, strict=True):
        try:
            read = curves(run.metrics, most=min(POINTS, max(_FEWEST, IN_COLOR * POINTS // len(runs))))
        except OSError as error:
            if run.metrics.exists():
                tell(f"{run.metrics}: is not drawn: {error.strerror or error}")
            continue
        if read:
            found.append(Drawn(name, read, _style(len(found)), len(found) < IN_COLOR))
    return found


def _style(place: int) -> dict[str, Any]:
    if place >= IN_COLOR:
        return {"color": FAINT, "linestyle": "-", "linewidth": 0.8, "alpha": 0.6, "zorder": 1.5}
    return {
        "color": COLORS[place % len(COLORS)],
        "linestyle": DASHES[place // len(COLORS)],
        "linewidth": 1.6,
        "zorder": 3,
    }


def _without_what_all_share(names: Sequence[str]) -> list[str]:
    """Names for a picture: folders that all runs are in are left out, and long names shortened in the middle."""
    split = [name.split("/") for name in names]
    shared = 0
    while len(names) > 1 and all(len(parts) > shared + 1 for parts in split) and len({p[shared] for p in split}) == 1:
        shared += 1
    return [_middle_left_out(printable("/".join(parts[shared:]))) for parts in split]


def _middle_left_out(name: str) -> str:
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def curves_figure(drawn: Sequence[Drawn]) -> Figure | None:
    """The curves of several runs; None if none has any.

    Four panels: training loss; evaluation loss, as trained and of the plain backbone; gates; movement of fast weights.
    Panels of which no run has anything are left out.
    """
    panels = [
        (draw, title)
        for draw, title, has in (
            (_training, "training loss", any(run.curves.loss for run in drawn)),
            (_evaluation, _EVALUATION_TITLE, any(run.curves.evaluations for run in drawn)),
            (_gate, r"gate, mean $|\tanh\,\alpha|$", any("gate" in run.curves.layers for run in drawn)),
            (
                _movement,
                r"how far fast weights moved, $\|W_T - W_0\|\,/\,\|W_0\|$",
                any("movement" in run.curves.layers for run in drawn),
            ),
        )
        if has
    ]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(6.6 * columns, 4.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for place, panel in enumerate(axes.flat):
        if place >= len(panels):
            panel.set_axis_off()
            continue
        draw, title = panels[place]
        draw(panel, drawn)
        panel.set_title(title, fontsize=10, loc="left", color=INK)
    if len(drawn) > IN_COLOR:
        figure.suptitle(
            f"{IN_COLOR} of {len(drawn)} runs in colour, the first of the table", x=0.01, ha="left", fontsize=10
        )
    return figure


_EVALUATION_TITLE = "evaluation loss: as trained (filled), plain backbone (hollow)"


def _training(axes: Axes, drawn: Sequence[Drawn]) -> None:
    ends = []
    for run in drawn:
        points = [(step, math.nan if loss is None else loss) for step, loss in run.curves.loss]
        if not points:
            continue
        steps, losses = zip(*points, strict=True)
        width = len(losses) // 25
        if width and all(map(math.isfinite, losses)):
            losses = tuple(smoothed(losses, width))
        axes.plot(steps, losses, **run.style, **_dots(steps))
        ends.append((run, steps[-1], losses[-1]))
    _finish(axes, ends)


def _evaluation(axes: Axes, drawn: Sequence[Drawn]) -> None:
    """Evaluations over the steps; if each run has only one, a line from the plain backbone's loss to its own."""
    if all(len(run.curves.evaluations) < 2 for run in drawn):
        _single_evaluations(axes, [run for run in drawn if run.curves.evaluations])
        return
    ends = []
    for run in drawn:
        points = [(step, _number(loss), _number(closed)) for step, loss, closed in run.curves.evaluations]
        if not points:
            continue
        steps, losses, closed = zip(*points, strict=True)
        axes.plot(steps, losses, **run.style, marker="o", markersize=4)
        plain = {**run.style, "linestyle": ":", "linewidth": 1.0}
        axes.plot(steps, closed, **plain, marker="o", markersize=5, markerfacecolor="none")
        ends.append((run, steps[-1], losses[-1]))
    _finish(axes, ends)


def _single_evaluations(axes: Axes, drawn: Sequence[Drawn]) -> None:
    for place, run in enumerate(drawn):
        _, loss, closed = run.curves.evaluations[-1]
        row = len(drawn) - 1 - place
        axes.plot([_number(closed), _number(loss)], [row, row], **run.style)
        axes.plot([_number(closed)], [row], color=run.style["color"], marker="o", markersize=7, markerfacecolor="none")
        axes.plot([_number(loss)], [row], color=run.style["color"], marker="o", markersize=7)
    dress(axes, "loss", "")
    axes.xaxis.set_major_locator(_any_numbers())
    few = len(drawn) <= 2 * IN_COLOR
    axes.set_yticks(range(len(drawn)) if few else [], [run.name for run in reversed(drawn)] if few else [])
    for label, run in zip(axes.get_yticklabels(), reversed(drawn), strict=False):
        label.set(color=run.style["color"] if run.is_named else INK, parse_math=False)
    axes.set_ylim(-0.7, len(drawn) - 0.3)


def _any_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6)


def _gate(axes: Axes, drawn: Sequence[Drawn]) -> None:
    _of_layers(axes, drawn, "gate")


def _movement(axes: Axes, drawn: Sequence[Drawn]) -> None:
    values = [value for run in drawn for _, value in run.curves.layers.get("movement", ())]
    if min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
    _of_layers(axes, drawn, "movement")


def _of_layers(axes: Axes, drawn: Sequence[Drawn], key: str) -> None:
    ends = []
    for run in drawn:
        points = run.curves.layers.get(key)
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, **run.style, **_dots(steps))
            ends.append((run, steps[-1], values[-1]))
    _finish(axes, ends)


def _dots(steps: Sequence[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(steps) < 12 else {}


def _finish(axes: Axes, ends: Sequence[tuple[Drawn, float, float]]) -> None:
    dress(axes, "optimiser step", "")
    axes.margins(x=0.03)
    named = [(run, x, y) for run, x, y in ends if run.is_named and math.isfinite(y)]
    if named:
        _name_at_the_ends(axes, named)


def _name_at_the_ends(axes: Axes, ends: Sequence[tuple[Drawn, float, float]]) -> None:
    """Names at the right of the panel in the order of the curves' ends, apart from each other, each with a line to it.

    A legend would have to be read by colour, which not everybody can.
    """
    ordered = sorted(ends, key=lambda end: end[2])
    axes.get_ylim()  # brings the limits up to date
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((x, y))[1]) for _, x, y in ordered]
    for (run, x, y), height in zip(ordered, _apart(wanted, _LINE), strict=True):
        axes.annotate(
            run.name,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            color=run.style["color"],
            va="center",
            annotation_clip=False,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": run.style["color"], "linewidth": 0.6, "alpha": 0.6, "shrinkB": 2},
        )


def _apart(heights: Sequence[float], room: float) -> list[float]:
    """Rising heights, moved as little as needed so that neighbours are `room` apart and all stay between 0 and 1.

    Heights that are too close become a group around their mean (isotonic regression, by pooling neighbours).
    """
    groups: list[tuple[float, int]] = []  # mean of what is left of each height below `room` per place; how many
    for place, height in enumerate(heights):
        groups.append((height - place * room, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (one, count), (other, more) = groups[-2:]
            groups[-2:] = [((one * count + other * more) / (count + more), count + more)]
    highest = 1.0 - (len(heights) - 1) * room
    left = [min(max(mean, 0.0), highest) for mean, count in groups for _ in range(count)]
    return [rest + place * room for place, rest in enumerate(left)]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def picture_bytes(figure: Figure, *, svg: bool) -> bytes:
    """The picture as PNG, or as SVG with its texts as texts."""
    from ttt.drawing import png

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font lacks, in the name of a run
        return _svg(figure) if svg else png(figure)


def _svg(figure: Figure) -> bytes:
    import io

    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ttt"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()
