"""What all pictures share: colours, figures without a window, axes. Imports no matplotlib until something is drawn."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPEN, CLOSED, FAINT = "#1668b8", "#c7511f", "#9cb8d4"
"""As trained; the plain backbone; what lies behind a smoothed line."""
RESET = "#3d8c40"
"""Fast weights started anew every now and then."""
INK, GRID = "#303030", "#e4e4e4"
ARM_COLORS = {"ttt": OPEN, "closed": CLOSED, "reset": RESET}
ARM_WORDS = {"ttt": "as trained", "closed": "plain backbone", "reset": "fast weights reset"}


def new_figure(width: float, height: float) -> Figure:
    """A figure without a window and without pyplot's global state, which other users of matplotlib could see."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, x: str, y: str) -> None:
    """Labels, a faint grid, whole numbers below."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def png(figure: Figure) -> bytes:
    """The picture as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)  # what `savefig` calls, which draws the figure twice
    return content.getvalue()
