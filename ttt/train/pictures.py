"""The pictures of a run, drawn from its `metrics.jsonl` alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt.drawing import CLOSED, FAINT, INK, OPEN, dress, new_figure, png
from ttt.files import write_bytes
from ttt.train.claim import INNER_LOSS, LOSS, METRICS
from ttt.train.metrics import read_metrics
from ttt.train.rundir import RunDir
from ttt.train.terminal import survived

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_TASKS_BESIDE = 3
"""Panels of evaluation tasks in a row."""


class Pictures:
    """Draws the pictures of a run. If one cannot be drawn, the run goes on.

    Args:
        run: the run's folder.
        warn: called with one sentence that says why pictures cannot be drawn.
    """

    def __init__(self, run: RunDir, warn: Callable[[str], None]) -> None:
        self._run = run
        self._warn = warn

    def draw(self) -> list[Path]:
        """Draw the pictures again; returns the files that were written."""
        made: list[Path] = []
        with survived(f"the pictures in {self._run.path} cannot be drawn", self._warn):
            made += draw_run(self._run.path)
        return made


class Undrawn(Pictures):
    """The pictures in a process that draws none."""

    def __init__(self) -> None:
        """Nothing is needed."""

    def draw(self) -> list[Path]:
        """Draw nothing."""
        return []


def draw_run(run: Path) -> list[Path]:
    """Draw the loss of a run and what its TTT layers did; returns the files that were written.

    Raises:
        EnvironmentProblem: there are no metrics, or the pictures cannot be written.
    """
    lines = read_metrics(run / METRICS)
    made = []
    for name, figure in ((LOSS, loss_figure(lines)), (INNER_LOSS, inner_figure(lines))):
        if figure is not None:
            write_bytes(run / name, png(figure))
            made.append(run / name)
    return made


def pictures_are_due(run: Path) -> bool:
    """Whether a picture of a finished run is missing, or older than the last line of its metrics."""
    try:
        written = (run / METRICS).stat().st_mtime_ns
        return any((run / name).stat().st_mtime_ns < written for name in (LOSS, INNER_LOSS))
    except FileNotFoundError:
        return (run / METRICS).is_file()


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value with its neighbours up to `width` away on either side; fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    positions = np.arange(len(values))
    first, last = np.maximum(positions - width, 0), np.minimum(positions + width + 1, len(values))
    means: list[float] = ((sums[last] - sums[first]) / (last - first)).tolist()
    return means


def loss_figure(lines: Sequence[dict[str, Any]]) -> Figure | None:
    """The outer loss over the steps, and evaluations with open and with closed gates; None if there are no lines."""
    points = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    if not points:
        return None
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    tasks = task_series(lines)
    figure = new_figure(8.0, 4.6 + 1.9 * -(-len(tasks) // _TASKS_BESIDE))
    if tasks:
        ratios = [4.6, 1.9 * -(-len(tasks) // _TASKS_BESIDE)]
        upper, lower = figure.subfigures(2, 1, height_ratios=ratios, squeeze=False).flat
        axes = upper.subplots()
        _draw_tasks(lower, tasks)
    else:
        axes = figure.add_subplot()
    width = len(losses) // 25
    if width:
        axes.plot(steps, losses, color=FAINT, linewidth=0.9, label="training loss")
        axes.plot(
            steps, smoothed(losses, width), color=OPEN, linewidth=2.0, label=f"mean of {2 * width + 1} logged steps"
        )
    else:
        axes.plot(steps, losses, color=OPEN, linewidth=1.8, marker="o", markersize=3, label="training loss")
    _draw_evaluations(axes, lines)
    dress(axes, "optimiser step", "outer loss")
    axes.set_title(f"Outer loss: {losses[0]:.3f} at step {steps[0]}, {losses[-1]:.3f} at step {steps[-1]}", loc="left")
    axes.legend(facecolor="white", framealpha=0.9, edgecolor="none", loc="best")
    return figure


def task_series(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The numbers of evaluation tasks over the steps: by task and metric, the points of it.

    A line has them as `task/metric`. Metrics are in the order in which the task gave them, its own first.
    """
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for key, value in line.items():
            task, slash, metric = key.partition("/")
            if slash and isinstance(value, (int, float)):
                found.setdefault(task, {}).setdefault(metric, []).append((line["step"], float(value)))
    return found


def _draw_tasks(figure: Any, tasks: dict[str, dict[str, list[tuple[int, float]]]]) -> None:
    """A panel for each task: its first metric, with its standard error and with gates closed if it has them."""
    columns = min(len(tasks), _TASKS_BESIDE)
    panels = figure.subplots(-(-len(tasks) // columns), columns, squeeze=False)
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    for axes, (task, metrics) in zip(panels.flat, tasks.items(), strict=False):
        name = next(iter(metrics))
        errors = dict(metrics.get(f"{name}_stderr", ()))
        steps, values = zip(*metrics[name], strict=True)
        axes.errorbar(steps, values, [errors.get(step, 0.0) for step in steps], color=OPEN, marker="o", markersize=4)
        if f"{name}_closed" in metrics:
            axes.plot(
                *zip(*metrics[f"{name}_closed"], strict=True), color=CLOSED, linestyle=":", marker="s", markersize=4
            )
        dress(axes, "optimiser step", "")
        axes.set_title(f"{task}: {name} {values[-1]:.4g}", fontsize=9, loc="left")


def _draw_evaluations(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    """Draw each evaluation as a pair of points, and write the numbers of the last one."""
    found = [
        line for line in lines if line.get("eval_loss") is not None and line.get("eval_loss_gates_closed") is not None
    ]
    if not found:
        return
    where = "held-out windows" if found[-1].get("eval_split") == "eval" else "training windows"
    steps = [line["step"] for line in found]
    last = found[-1]
    drawn: tuple[tuple[str, dict[str, Any], str, str], ...] = (
        (
            "eval_loss",
            {"marker": "D", "markersize": 5, "zorder": 6},
            INK,
            f"{where}, as trained: {last['eval_loss']:.4f}",
        ),
        (
            "eval_loss_gates_closed",  # larger, hollow and behind, so that both points show if they are close
            {"marker": "s", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8, "zorder": 5},
            CLOSED,
            f"the same, plain backbone: {last['eval_loss_gates_closed']:.4f}",
        ),
    )
    for key, style, color, label in drawn:
        values = [line[key] for line in found]
        axes.plot(steps, values, color=color, linewidth=1.2, linestyle=":", label=label, clip_on=False, **style)
        axes.axhline(values[-1], color=color, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.7)
    axes.margins(x=0.03)


def inner_figure(lines: Sequence[dict[str, Any]]) -> Figure | None:
    """Each layer's inner loss before and after its step, how far its fast weights moved, and its gate."""
    measured = [line for line in lines if line.get("layers")]
    if not measured:
        return None
    sites = list(measured[-1]["layers"])
    columns = min(len(sites), 4 if len(sites) <= 8 else 7)
    rows = -(-len(sites) // columns)
    figure = new_figure(max(8.0, 2.3 * columns), 2.1 * rows + 3.0)
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.1 * rows, 2.7], squeeze=False).flat
    panels = upper.subplots(rows, columns, squeeze=False, sharex=True)
    for index, panel in enumerate(panels.flat):
        if index >= len(sites):
            panel.set_axis_off()
            continue
        _draw_inner_loss(panel, measured, sites[index])
    upper.suptitle("Inner loss before and after each mini-batch's step", x=0.01, ha="left", fontsize=11)
    upper.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False, fontsize=9)
    movement, gate = lower.subplots(1, 2).flat
    _draw_by_site(movement, measured, sites, "movement", r"how far fast weights moved, $\|W_T - W_0\|\,/\,\|W_0\|$")
    _draw_by_site(gate, measured, sites, "gate", r"gate, mean $|\tanh\,\alpha|$")
    if len(sites) > 1:
        handles, labels = movement.get_legend_handles_labels()
        if len(sites) > 10:  # colours run from the first layer to the last
            shown = sorted({0, len(sites) // 4, len(sites) // 2, 3 * len(sites) // 4, len(sites) - 1})
            handles, labels = [handles[index] for index in shown], [labels[index] for index in shown]
        lower.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _draw_inner_loss(axes: Axes, measured: Sequence[dict[str, Any]], site: str) -> None:
    points = [(line["step"], line["layers"][site]) for line in measured if site in line["layers"]]
    steps = [step for step, _ in points]
    before = [_number(layer["inner_loss_before"]) for _, layer in points]
    after = [_number(layer["inner_loss_after"]) for _, layer in points]
    marker = "o" if len(steps) < 12 else None
    axes.fill_between(steps, before, after, color=OPEN, alpha=0.12, linewidth=0)
    axes.plot(steps, before, color=CLOSED, linewidth=1.5, marker=marker, markersize=3, label="before its step")
    axes.plot(steps, after, color=OPEN, linewidth=1.5, marker=marker, markersize=3, label="after")
    dress(axes, "", "")
    axes.set_title(site, fontsize=9, loc="left")


def _draw_by_site(axes: Axes, measured: Sequence[dict[str, Any]], sites: Sequence[str], key: str, title: str) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"]
    for index, site in enumerate(sites):
        points = [(line["step"], _number(line["layers"][site][key])) for line in measured if site in line["layers"]]
        axes.plot(
            *zip(*points, strict=True),
            color=colors(0.9 * index / max(1, len(sites) - 1)),
            linewidth=1.5,
            marker="o" if len(points) < 12 else None,
            markersize=3,
            label=site,
        )
    dress(axes, "optimiser step", "")
    axes.set_title(title, fontsize=9, loc="left")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
