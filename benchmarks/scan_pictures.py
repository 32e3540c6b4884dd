"""The picture of `benchmarks/scan.py`'s results."""

from __future__ import annotations

from pathlib import Path

from contenders import ATTENTION, PUBLISHED
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scan_results import Results

from ttt.amounts import show_bytes

COLORS = {PUBLISHED: "#b3446c", "generic": "#888888", "fused": "#1f6fb4", ATTENTION: "#d79b00", "in place": "#17806d"}


def draw(results: Results, path: Path) -> None:
    """Draw time and memory of each shape, growth with length, and decoding, as a PNG."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    (times, memory), (growth, decoding) = figure.subplots(2, 2)
    _bars(times, results, "seconds", "whole layer, forward and backward, relative to published")
    _bars(memory, results, "peak_bytes", "peak memory, relative to published")
    _lines(growth, results)
    _stream(decoding, results)
    machine = results.machine
    quick = ", quick run" if results.quick else ""
    figure.suptitle(
        f"{machine.device}, {machine.threads} threads, torch {machine.versions['torch']}{quick}", fontsize=10
    )
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, results: Results, field: str, title: str) -> None:
    """One group of bars for each shape, at the default group size of 16 if that is smaller than the scan."""
    width = 0.8 / 4
    for place, name in enumerate((PUBLISHED, "generic", "fused", ATTENTION)):
        for index, shape in enumerate(results.shapes):
            rows = {(row.contender, row.group_size): row for row in shape.rows if row.part == "layer"}
            base = rows[PUBLISHED, 16]
            row = rows[name, None if name == ATTENTION else 16]
            share = getattr(row, field) / getattr(base, field)
            bar = axes.bar(index + place * width, share, width, color=COLORS[name], label=None if index else name)
            label = f"{row.seconds:.2g} s" if field == "seconds" else show_bytes(row.peak_bytes)
            axes.bar_label(bar, [label], fontsize=7, rotation=90, padding=2)
    axes.set_xticks([index + 1.5 * width for index in range(len(results.shapes))])
    axes.set_xticklabels([shape.name for shape in results.shapes], fontsize=8)
    axes.margins(y=0.3)  # room for the numbers and the legend
    axes.set_title(f"{title} (groups of 16)", fontsize=10)
    axes.legend(fontsize=8, ncols=4, loc="upper center")


def _lines(axes: Axes, results: Results) -> None:
    for name in dict.fromkeys(point.contender for point in results.growth):
        points = sorted((point.tokens, point.seconds) for point in results.growth if point.contender == name)
        axes.loglog(*zip(*points, strict=True), "o-", color=COLORS.get(name), label=name, markersize=4)
    lengths = sorted({point.tokens for point in results.growth})
    fused = {point.tokens: point.seconds for point in results.growth if point.contender == "fused"}
    per_token = fused[lengths[-1]] / lengths[-1]
    axes.loglog(lengths, [per_token * t for t in lengths], ":", color="black", linewidth=1, label="linear in T")
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds, forward and backward")
    axes.set_title(f"growth: {results.growth_shape}", fontsize=10)
    axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _stream(axes: Axes, results: Results) -> None:
    for one in results.decoding:
        tenth = one.tokens / 10
        places = [(index + 0.5) * tenth for index in range(10)]
        axes.plot(places, [1000 * s for s in one.tenths], "o-", color=COLORS.get(one.contender), label=one.contender)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("ms a token")
    axes.set_title(f"one token at a time: {results.decode_shape}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
