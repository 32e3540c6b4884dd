"""The pictures of an evaluation. Imports no matplotlib until something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt.drawing import ARM_COLORS, ARM_WORDS, CLOSED, GRID, INK, OPEN, dress, new_figure
from ttt.eval.by_position import WINDOW, bin_by_position, log_edges, moving_average, over_clusters
from ttt.eval.results import TaskSummary
from ttt.eval.statistics import Estimate, estimate

if TYPE_CHECKING:
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

ByBook = Mapping[str, Mapping[str, Any]]
"""Arrays by name, of each book."""


def outcome_figure(summaries: Mapping[str, TaskSummary], chances: Mapping[str, float | None]) -> Figure | None:
    """The outcomes of tasks that have a chance, each arm with its standard error; None if there are none."""
    shown = [name for name, summary in summaries.items() if chances.get(name) is not None and summary.main is not None]
    if not shown:
        return None
    figure = new_figure(max(6.0, 1.7 * len(shown) + 2.0), 4.4)
    axes = figure.add_subplot()
    arms = list(dict.fromkeys(arm for name in shown for arm in _arms(summaries[name])))
    width = 0.8 / len(arms)
    for place, arm in enumerate(arms):
        for number, name in enumerate(shown):
            found = summaries[name].metrics[str(summaries[name].main)].get(arm)
            if found is None:
                continue
            x = number + (place - (len(arms) - 1) / 2) * width
            label = ARM_WORDS[arm] if number == 0 else None
            axes.bar(x, 100 * found.mean, width * 0.92, color=ARM_COLORS[arm], label=label)
            axes.errorbar(x, 100 * found.mean, 100 * (found.stderr or 0.0), color=INK, capsize=3, linewidth=1.2)
            axes.annotate(f"{100 * found.mean:.1f}", (x, 1.5), ha="center", color="white", fontsize=8)
    for number, name in enumerate(shown):
        chance = 100 * float(chances[name] or 0.0)
        axes.plot([number - 0.48, number + 0.48], [chance, chance], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    dress(axes, "", "outcome, %")
    axes.set_xticks(range(len(shown)), [_named(name, summaries[name]) for name in shown], fontsize=9)
    axes.set_ylim(0, 100)
    axes.set_title("Bars are means with one standard error; the dashed line is chance", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=len(arms), loc="upper right")
    return figure


def _arms(summary: TaskSummary) -> list[str]:
    return [arm for arm in summary.metrics[str(summary.main)] if arm in ARM_COLORS]


def _named(name: str, summary: TaskSummary) -> str:
    found = next(iter(summary.metrics[str(summary.main)].values()))
    return f"{name}\n{found.units:,} units"


def position_figure(
    arms: Mapping[str, ByBook], *, span: int | None, rate: float | None, unit: str = "book"
) -> Figure | None:
    """The loss by position in log-spaced bins, a panel for each kind of stream; None if there is nothing to draw.

    Args:
        arms: for each arm, the arrays of each book: a loss for each position, by kind of stream.
        span: positions that the backbone's own attention sees.
        rate: positions a second, for the axis.
        unit: what a book is called.
    """
    kinds = list(dict.fromkeys(kind for books in arms.values() for arrays in books.values() for kind in arrays))
    if not kinds:
        return None
    longest = max(len(losses) for books in arms.values() for arrays in books.values() for losses in arrays.values())
    edges = log_edges(longest)
    figure = new_figure(5.6 * len(kinds) + 0.6, 6.2)
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True, height_ratios=[3, 2])
    for column, kind in enumerate(kinds):
        curves = {arm: _curves(books, kind, edges) for arm, books in arms.items()}
        _draw_curves(panels[0, column], curves, edges)
        _draw_differences(panels[1, column], curves, edges)
        panels[0, column].set_title(f"{kind}", fontsize=10, loc="left")
        for axes in panels[:, column]:
            axes.set_xscale("log")
            if span is not None and span < longest:
                axes.axvline(span, color=INK, linewidth=1.0, linestyle=(0, (2, 3)))
        if span is not None and span < longest:
            panels[0, column].annotate(
                "end of attention",
                (span, 0.98),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
                color=INK,
            )
    for axes in panels[0]:
        dress_log(axes, "", "loss, nats")
    for axes in panels[1]:
        dress_log(axes, _position_label(rate, longest), "gain over gates closed, nats")
    panels[0, 0].legend(frameon=False, fontsize=8)
    count = len(next(iter(arms.values())))
    figure.suptitle(
        f"Loss by position, {count} {unit}{'' if count == 1 else 's'}; bands are one standard error over {unit}s",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def _position_label(rate: float | None, longest: int) -> str:
    return "position" if rate is None else f"position, {rate:g} a second; {longest / rate / 3600:.2f} hours in all"


def dress_log(axes: Axes, x: str, y: str) -> None:
    """As `ttt.drawing.dress`, for an axis of positions that is logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter

    dress(axes, x, y)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _curves(books: ByBook, kind: str, edges: Any) -> tuple[np.ndarray, list[str]]:
    """The binned losses of each book that has this kind, `[books, bins]`, and the books."""
    rows, names = [], []
    for name, arrays in books.items():
        if kind in arrays:
            losses = np.asarray(arrays[kind], dtype=np.float64)
            rows.append(bin_by_position(losses, ~np.isnan(losses), edges).means)
            names.append(name)
    return np.asarray(rows), names


def _draw_curves(axes: Axes, curves: Mapping[str, tuple[np.ndarray, list[str]]], edges: Any) -> None:
    for arm, (rows, names) in curves.items():
        if len(rows):
            _band(axes, rows, names, edges, arm)


def _draw_differences(axes: Axes, curves: Mapping[str, tuple[np.ndarray, list[str]]], edges: Any) -> None:
    """How much lower each arm's loss is than with gates closed, paired by book."""
    if "closed" not in curves:
        return
    base, names = curves["closed"]
    axes.axhline(0, color=INK, linewidth=1.0)
    for arm, (rows, own) in curves.items():
        if arm != "closed" and len(rows) and own == names:
            _band(axes, base - rows, names, edges, arm)


def _band(axes: Axes, rows: np.ndarray, names: Sequence[str], edges: Any, arm: str) -> None:
    centres = np.sqrt(edges[:-1] * np.maximum(edges[1:] - 1.0, edges[:-1]))
    found = over_clusters(list(rows), names)
    there = [place for place, each in enumerate(found) if each is not None]
    means = np.array([found[place].mean for place in there])  # type: ignore[union-attr]
    errors = np.array([found[place].stderr or 0.0 for place in there])  # type: ignore[union-attr]
    style = (0, (5, 2)) if arm == "reset" else "-"  # where it lies on another arm's line, both show
    axes.plot(centres[there], means, color=ARM_COLORS[arm], linewidth=1.7, linestyle=style, label=ARM_WORDS[arm])
    axes.fill_between(centres[there], means - errors, means + errors, color=ARM_COLORS[arm], alpha=0.18, linewidth=0)


def recall_figure(gains: Mapping[str, Sequence[tuple[float, str, float]]], *, span: float | None, unit: str) -> Figure:
    """The gain at the second hearing against the length of the gap.

    Args:
        gains: for each arm, the gap, the book and the gain of each item.
        span: how far the backbone's own attention sees, in `unit`.
        unit: of the gaps, `seconds` or `tokens`.
    """
    figure = new_figure(7.2, 4.4)
    axes = figure.add_subplot()
    axes.axhline(0, color=INK, linewidth=1.0)
    lengths = sorted({gap for items in gains.values() for gap, _, _ in items})
    for place, (arm, items) in enumerate(gains.items()):
        found = [_gain_at(items, gap) for gap in lengths]
        shifted = [gap * 1.03 ** (place - (len(gains) - 1) / 2) for gap in lengths]  # side by side, so that all show
        means, errors = [each.mean for each in found], [each.stderr or 0.0 for each in found]
        axes.errorbar(
            shifted, means, errors, color=ARM_COLORS[arm], marker="o", markersize=5, capsize=3, label=ARM_WORDS[arm]
        )
    dress_log(axes, f"gap, {unit}", "gain at the second hearing, nats")
    axes.set_xticks(lengths, [f"{gap:g}" for gap in lengths])
    if span is not None and lengths[0] * 0.9 < span < lengths[-1] * 1.2:
        axes.axvline(span, color=INK, linewidth=1.0, linestyle=(0, (2, 3)), label="end of attention")
    axes.set_title("Loss of a passage heard once, less its loss heard again", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _gain_at(items: Sequence[tuple[float, str, float]], gap: float) -> Estimate:
    chosen = [(book, gain) for length, book, gain in items if length == gap]
    names = [str(number) for number, _ in enumerate(chosen)]
    return estimate([gain for _, gain in chosen], names, [book for book, _ in chosen])


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
    there = ~np.isnan(losses)
    sums, counts = np.sum(losses, 0, where=there, dtype=np.float64), np.sum(there, 0)
    return np.divide(sums, counts, out=np.full(losses.shape[1], np.nan), where=counts > 0)


def _distance(symbol: str, losses: np.ndarray, others: np.ndarray) -> str:
    """How far one curve lies above another on average, and what part of the other that is."""
    if np.isnan(losses).all():
        return f"${symbol}$: –"
    level = float(np.nanmean(others, dtype=np.float64))
    distance = float(np.nanmean(losses, dtype=np.float64)) - level
    share = f" ({distance / level:+.1%})" if level else ""
    return f"${symbol}$ = {distance:+.3g}{share}".replace("= -", "= −").replace("(-", "(−")
