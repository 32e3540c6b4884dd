"""The pictures of an evaluation: outcomes with error bars, losses by position, recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt.drawing import ARM_COLORS, ARM_WORDS, INK, dress, new_figure
from ttt.eval.by_position import bin_by_position, log_edges, over_clusters
from ttt.eval.results import TaskSummary
from ttt.eval.statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def position_figure(arms: Mapping[str, ByBook], *, span: int | None, rate: float | None) -> Figure | None:
    """The loss by position in log-spaced bins, a panel for each kind of stream; None if there is nothing to draw.

    Args:
        arms: for each arm, the arrays of each book: a loss for each position, by kind of stream.
        span: positions that the backbone's own attention sees.
        rate: positions a second, for the axis.
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
        f"Loss by position, {count} {'book' if count == 1 else 'books'}; bands are one standard error over books",
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
