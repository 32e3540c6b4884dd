"""The newest lines of a `metrics.jsonl`, and its curves, in little memory however long the file is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ttt.checksums import parse_line
from ttt.reading import MAX_LINE, open_file

_BLOCK = 1 << 20
POINTS = 1000
"""Points of a curve are thinned beyond twice as many; a picture is about as many dots wide."""
_EVALUATION, _LAYERS = b'"eval_loss"', b'"layers"'


@dataclass(frozen=True)
class Ends:
    """The newest lines of a run's metrics, each None if there is none."""

    last: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    """The last one with evidence of the layers."""
    evaluated: dict[str, Any] | None = None
    """The last one with an evaluation."""


def newest_lines(path: Path) -> Ends:
    """The newest lines of a `metrics.jsonl`, read from its end. Damaged lines are passed over.

    Raises:
        OSError: it cannot be read.
    """
    last = measured = evaluated = None
    with open_file(path) as file:
        for raw in _from_the_end(file):
            wanted = last is None, measured is None and _LAYERS in raw, evaluated is None and _EVALUATION in raw
            line = _step_line(raw) if any(wanted) else None
            if line is None:
                continue
            last = line if wanted[0] else last
            measured = line if wanted[1] else measured
            evaluated = line if wanted[2] else evaluated
            if measured is not None and evaluated is not None:
                break
    return Ends(last, measured, evaluated)


def _from_the_end(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, the last one first. A line without its newline, or of more than `MAX_LINE`, is left out."""
    at = file.seek(0, os.SEEK_END)
    rest, whole = b"", False  # what stands before the first newline of the block behind; whether it has its end
    while at > 0:
        count = min(_BLOCK, at)
        at -= count
        file.seek(at)
        first, *lines = file.read(count).split(b"\n")
        if not lines:  # no newline in all of the block
            rest, whole = (first + rest, whole) if len(rest) <= MAX_LINE else (b"", False)
            continue
        lines[-1] += rest
        if not whole:
            lines.pop()
        yield from (line for line in reversed(lines) if len(line) <= MAX_LINE)
        rest, whole = first, True
    if whole and len(rest) <= MAX_LINE:
        yield rest


def _step_line(raw: bytes) -> dict[str, Any] | None:
    """The line of a step; None if it is damaged, or something else."""
    try:
        line = parse_line(raw)
    except ValueError:
        return None
    return line if type(line.get("step")) is int else None


class Thinned:
    """Keeps every line at first, and fewer the more there are: every second, every fourth, and so on."""

    def __init__(self, most: int = POINTS) -> None:
        self.lines: list[dict[str, Any]] = []
        self._most = most
        self._every = 1
        self._seen = 0

    def wants_next(self) -> bool:
        """Whether the next line is one to keep."""
        self._seen += 1
        return (self._seen - 1) % self._every == 0

    def keep(self, line: dict[str, Any]) -> None:
        """Keep a line that was wanted."""
        self.lines.append(line)
        if len(self.lines) >= 2 * self._most:
            self.lines = self.lines[::2]
            self._every *= 2


@dataclass(frozen=True)
class Curves:
    """What a run's metrics give over its steps. Values that are not finite are None, as in the file."""

    loss: list[tuple[int, float | None]] = field(default_factory=list)
    """Training loss."""
    evaluations: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    """Evaluation loss with gates open and with gates closed."""
    layers: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    """The mean over the layers, by what was measured: `gate`, `movement`."""

    def __bool__(self) -> bool:
        return bool(self.loss or self.evaluations)


def curves(path: Path, *, most: int = POINTS) -> Curves:
    """The curves of a `metrics.jsonl`, thinned if it is long. Damaged lines are left out.

    Args:
        path: the file.
        most: of more than twice as many points, some are left out.

    Raises:
        OSError: it cannot be read.
    """
    steps, measured, evaluated = Thinned(most), Thinned(most), Thinned(most)
    last = b""
    for raw in _lines(path):
        last = raw
        for kept, wanted in ((evaluated, _EVALUATION in raw), (measured, _LAYERS in raw), (steps, True)):
            if wanted and kept.wants_next():
                line = _step_line(raw)
                if line is not None:
                    kept.keep(line)
    end = _step_line(last)
    if end is not None and steps.lines and steps.lines[-1]["step"] != end["step"]:
        steps.lines.append(end)
    return Curves(
        [(line["step"], number(line.get("loss"))) for line in steps.lines if "loss" in line],
        [
            (line["step"], number(line.get("eval_loss")), number(line.get("eval_loss_gates_closed")))
            for line in evaluated.lines
            if "eval_loss" in line
        ],
        _over_steps(measured.lines),
    )


def _over_steps(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in over_layers(line.get("layers")).items():
            if value is not None:
                found.setdefault(key, []).append((line["step"], value))
    return found


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that have their newline and are no longer than `MAX_LINE`."""
    with open_file(path) as file:
        cut = False
        while line := file.readline(MAX_LINE):
            ends = line.endswith(b"\n")
            if ends and not cut:
                yield line
            cut = not ends


def over_layers(layers: Any) -> dict[str, float | None]:
    """What was measured of the layers as one number each: the largest of what is a maximum, the mean of the rest.

    Args:
        layers: of a line or a summary: by site, then by name.
    """
    if not isinstance(layers, Mapping):
        return {}
    values: dict[str, list[float | None]] = {}
    for layer in layers.values():
        for key, value in layer.items() if isinstance(layer, Mapping) else ():
            values.setdefault(str(key), []).append(number(value))
    return {key: _as_one(key, several) for key, several in values.items()}


def _as_one(key: str, values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):  # one of them is not finite
        return None
    return max(known) if key.endswith("_max") else sum(known) / len(known)


def number(value: Any) -> float | None:
    """A number as a float; None for anything else, and for one that no float holds."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except OverflowError:
        return None
