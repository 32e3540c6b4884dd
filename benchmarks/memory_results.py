"""Tables and the picture of `memory_beyond_attention.py`, from what its arms lost on each held-out document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ttt.eval.statistics import Estimate, estimate, paired_difference

COLORS = {
    "closed": "#888888",
    "reset": "#d79b00",
    "no memory": "#b3446c",
    "lora": "#7a5195",
    "ttt": "#1f6fb4",
    "full": "#17806d",
}
WORDS = {
    "closed": "gates closed (window alone)",
    "reset": "TTT, fast weights reset at every window",
    "no memory": "same adapter, inner rate 0",
    "lora": "LoRA of as many parameters",
    "ttt": "TTT",
    "full": "full attention, no TTT",
}
AGAINST = (("closed", "ttt"), ("reset", "ttt"), ("no memory", "ttt"), ("lora", "ttt"), ("ttt", "full"))
"""Which arm's loss less which other's; where it is above zero, the second is better."""

Losses = Mapping[str, Mapping[str, Sequence[Sequence[float | None]]]]
"""By arm and seed: for each document the mean loss in each bin of positions; None where no token is scored."""


def buckets(window: int, length: int) -> dict[str, tuple[int, int]]:
    """Positions from and to: within the window, up to two windows, and beyond, doubling."""
    found, begin = {"within the window": (0, window), "1–2 windows": (window, 2 * window)}, 2 * window
    while begin < length:
        end = min(2 * begin, length)
        found[f"{begin // window}–{end // window} windows"] = (begin, end)
        begin = end
    return {**found, "beyond 2 windows": (2 * window, length)}


def of_documents(losses: Losses, arm: str, bins: range) -> list[float]:
    """The mean loss of each document over bins and seeds."""
    by_document = zip(*losses[arm].values(), strict=True)
    return [
        fmean(loss for seed in seeds for number in bins if (loss := seed[number]) is not None) for seeds in by_document
    ]


def compare(losses: Losses, works: Sequence[str], bins: range) -> dict[str, Any]:
    """Each arm's mean, and the paired differences, with errors clustered by work."""
    units = [str(number) for number in range(len(works))]
    means = {arm: of_documents(losses, arm, bins) for arm in losses}
    found: dict[str, Any] = {arm: _told(estimate(values, units, works)) for arm, values in means.items()}
    for worse, better in AGAINST:
        if worse in means and better in means:
            difference = paired_difference(means[worse], means[better], units, works)
            found[f"{worse} − {better}"] = {**_told(difference), "by_seed": _by_seed(losses, worse, better, bins)}
    return found


def _by_seed(losses: Losses, worse: str, better: str, bins: range) -> list[float]:
    seeds = max((losses[worse], losses[better]), key=len).keys()

    def mean(arm: str, seed: str) -> float:
        one = losses[arm].get(seed) or next(iter(losses[arm].values()))
        return fmean(of_documents({arm: {seed: one}}, arm, bins))

    return [round(mean(worse, seed) - mean(better, seed), 5) for seed in seeds]


def _told(one: Estimate) -> dict[str, Any]:
    stderr = None if one.stderr is None else round(one.stderr, 5)
    return {"mean": round(one.mean, 5), "stderr": stderr, "documents": one.units, "works": one.clusters}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row for each bucket, the arms' losses and the differences in nats."""
    names = list(next(iter(found.values())))
    lines = ["| positions | " + " | ".join(names) + " |", "| --- " + "| ---: " * len(names) + "|"]
    for bucket, row in found.items():
        cells = [_cell(row[name], signed="−" in name) for name in names]
        lines.append(f"| {bucket} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(one: Mapping[str, Any], *, signed: bool) -> str:
    if not signed:
        return f"{one['mean']:.3f}"
    error = "" if one["stderr"] is None else f" ± {one['stderr']:.4f}"
    return f"{one['mean']:+.4f}{error}"


def report(found: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    seconds, tokens = found["speed"]["seconds"], found["speed"]["tokens"]
    lines = ["Loss in nats a token, differences with standard errors clustered by work:", "", table(found["held_out"])]
    lines += ["A repeated passage, farther back than the window:", "", table(found["recall"])]
    if found["ablations"] is not None:
        lines += [f"Short runs of {found['ablations']['steps']} steps and one seed:", ""]
        lines += ["| changed | beyond 2 windows: closed − ttt | reset − ttt | repeated: closed − ttt | reset − ttt |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        lines += [f"| {name} | {' | '.join(_ablation(row))} |" for name, row in found["ablations"]["rows"].items()]
        lines += [""]
    lines += ["| what runs | forward, tokens a second | of plain | forward and backward | of plain |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name in dict.fromkeys(key.partition(", ")[0] for key in seconds):
        cells = []
        for what in ("forward", "forward and backward"):
            cells += [f"{tokens / seconds[f'{name}, {what}']:.0f}"]
            cells += [f"{seconds[f'plain, {what}'] / seconds[f'{name}, {what}']:.2f}"]
        lines += [f"| {name} | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def _ablation(row: Mapping[str, Any]) -> Iterator[str]:
    for part in ("held_out", "recall"):
        for name in ("closed − ttt", "reset − ttt"):
            one = row[part][name]
            yield f"{one['mean']:+.4f} ± {one['stderr'] or 0:.4f}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw loss by position against the closed gates, the differences beyond two windows, and recall, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplot_mosaic([["full", "bars", "recall"], ["arms", "bars", "recall"]], width_ratios=(1.6, 1, 1))
    size = results["size"]
    _curves(axes["full"], results, ("full",))
    _curves(axes["arms"], results, ("reset", "no memory", "lora", "ttt"))
    axes["arms"].set_xlabel("position in the document, tokens (dotted: one and two windows)")
    beyond = results["held_out"]["beyond 2 windows"]
    _bars(axes["bars"], beyond, "held-out documents, beyond 2 windows")
    _bars(axes["recall"], results["recall"]["repeated"], "a repeated passage, beyond the window")
    documents, works = beyond["ttt"]["documents"], beyond["ttt"]["works"]
    title = f"{results['model']}, attention of {size['window']} tokens and {size['sinks']} sinks"
    measured = f"{documents} held-out documents of {works} works, seeds: {results['seeds']}"
    quick = " (a quick run: its figures mean nothing)" if results["quick"] else ""
    figure.suptitle(f"{title}; {measured}{quick}", fontsize=9)
    figure.savefig(path, dpi=120)


def _curves(axes: Any, results: Mapping[str, Any], arms: Sequence[str]) -> None:
    curves, step, window = results["by_position"], results["bin"], results["size"]["window"]
    places = [step * (number + 0.5) for number in range(len(curves["closed"]))]
    for arm in arms:
        gain = [a - b for a, b in zip(curves["closed"], curves[arm], strict=True)]
        axes.plot(places, gain, color=COLORS[arm], label=WORDS[arm], linewidth=1.6)
    axes.axhline(0, color="black", linewidth=0.8)
    for edge in (window, 2 * window):
        axes.axvline(edge, color="black", linewidth=0.6, linestyle=":")
    axes.margins(y=0.3)  # room for the legend
    axes.set_ylabel("nats better than\nwith gates closed", fontsize=8)
    axes.legend(fontsize=7, loc="upper left", ncols=2)


def _bars(axes: Any, found: Mapping[str, Any], title: str) -> None:
    names = [f"{worse} − {better}" for worse, better in AGAINST if better == "ttt"]
    for place, name in enumerate(names):
        one = found[name]
        error = 1.96 * (one["stderr"] or 0)
        axes.bar(place, one["mean"], 0.7, yerr=error, capsize=3, color=COLORS[name.partition(" −")[0]])
        axes.text(place, one["mean"] + error, f"{one['mean']:+.4f}\n", ha="center", va="bottom", fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.2)
    axes.set_xticks(range(len(names)), [name.replace(" −", "\n−") for name in names], fontsize=8)
    more = found["closed"]["mean"] - found["full"]["mean"]
    axes.set_title(f"{title}\nnats a token, 95 % intervals\n(closed − full: {more:+.3f})", fontsize=8.5)
