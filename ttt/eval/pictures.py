"""The pictures of an evaluation. Imports no matplotlib until something is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ttt.drawing import ARM_WORDS, CLOSED, GRID, INK, OPEN, dress, new_figure
from ttt.eval.by_position import WINDOW, moving_average

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ttt.inner_curves import InnerCurve

_LOSSES = (
    # attribute of a curve, colour, width, its name in mathematics, in words; the last two often lie on one another
    ("w0", "#8a8a8a", 1.1, r"\ell(W_0;x_t)", "with what the stream started from"),
    ("before", CLOSED, 2.6, r"\ell(W_{t-1};x_t)", "before the token is learned"),
    ("after", OPEN, 0.9, r"\ell(W_t;x_t)", "after it"),
)
_MOST_COLUMNS = 4


def inner_loss_figure(curves: Mapping[str, InnerCurve], *, arm: str = "ttt", window: int = WINDOW) -> Figure:
    """The inner loss of each TTT layer by position: a panel a layer, and in it three curves and their distances.

    A curve is the mean over sequences at each position, then a moving average over positions. The distances in a panel
    are means over all positions and sequences. Positions count from 1, on a logarithmic axis: the curves part within
    the first mini-batches, which would be no wider than a line on a linear one, and a stream of hours still fits.

    Args:
        curves: by site, as `ttt.inner_curves.InnerCurves` records them.
        arm: under which they were recorded; the title says so if it is not `ttt`.
        window: positions of the moving average.

    Raises:
        ValueError: there are no curves.

    Source: TTT-LM (arXiv 2407.04620), its figure of the inner loss by token, with the same window.
    """
    if not curves:
        raise ValueError("there are no curves to draw; with its gates closed a model has none")
    columns = min(len(curves), _MOST_COLUMNS)
    rows = -(-len(curves) // columns)
    figure = new_figure(max(8.8, 3.4 * columns), 2.6 * rows + 1.1)  # the words below need 8.8
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for place, (site, curve) in enumerate(curves.items()):
        _draw_losses(panels.flat[place], curve, window)
        panels.flat[place].set_title(site, fontsize=9, loc="left")
    for panel in list(panels.flat)[len(curves) :]:
        panel.set_axis_off()
    for place, panel in enumerate(list(panels.flat)[: len(curves)]):
        lowest = place + columns >= len(curves)
        dress(panel, "position" if lowest else "", "inner loss" if place % columns == 0 else "")
        panel.set_xscale("log")
        panel.xaxis.set_tick_params(labelbottom=lowest)
        panel.grid(which="minor", axis="x", color=GRID, linewidth=0.4)
    sequences = max(len(curve.w0) for curve in curves.values())
    mean = (
        f"mean of {sequences} sequences, then of {window} positions" if sequences > 1 else f"mean of {window} positions"
    )
    under = "" if arm == "ttt" else f", {ARM_WORDS[arm]}"
    figure.suptitle(f"Inner loss by position{under} ({mean})", x=0.01, ha="left", fontsize=11)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_losses(panel: Axes, curve: InnerCurve, window: int) -> None:
    import numpy as np

    positions = np.arange(1, curve.w0.shape[1] + 1)
    for name, color, width, symbol, words in _LOSSES:
        smooth = moving_average(mean_over_sequences(getattr(curve, name)), window)
        panel.plot(positions, smooth, color=color, linewidth=width, label=f"${symbol}$, {words}")
    told = "\n".join(
        (
            _distance(r"\ell(W_{t-1})-\ell(W_0)", curve.before, curve.w0),
            _distance(r"\ell(W_t)-\ell(W_{t-1})", curve.after, curve.before),
        )
    )
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + 0.22 * (high - low))  # room for the words
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    panel.text(0.02, 0.98, told, transform=panel.transAxes, fontsize=8, color=INK, va="top", bbox=box)


def mean_over_sequences(losses: np.ndarray) -> np.ndarray:
    """The mean of `[S,T]` over the sequences that have a number at a position, `[T]`; NaN where none has."""
    import numpy as np

    there = ~np.isnan(losses)
    sums, counts = np.sum(losses, 0, where=there, dtype=np.float64), np.sum(there, 0)
    return np.divide(sums, counts, out=np.full(losses.shape[1], np.nan), where=counts > 0)


def _distance(symbol: str, losses: np.ndarray, others: np.ndarray) -> str:
    """How far one curve lies above another on average, and what part of the other that is."""
    import numpy as np

    if np.isnan(losses).all():
        return f"${symbol}$: –"
    level = float(np.nanmean(others, dtype=np.float64))
    distance = float(np.nanmean(losses, dtype=np.float64)) - level
    share = f" ({distance / level:+.1%})" if level else ""
    return f"${symbol}$ = {distance:+.3g}{share}".replace("= -", "= −").replace("(-", "(−")
