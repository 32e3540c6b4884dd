"""Where the time of a step goes, from the events of PyTorch's profiler: by part of the step, and by operation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile

from ttt.train.parts_of_a_step import BACKWARD, FORWARD, PARTS, PREFIX

TTT_LAYERS = f"{PREFIX}TTT layers"
"""The range of a TTT layer's call."""
OPERATIONS = 15
"""How many operations the table has."""
_STEP = "ProfilerStep"
_NODE = "autograd::engine::evaluate_function: "
"""Begins the names of the events in which autograd runs one node of a graph."""


@dataclass
class _Time:
    """Microseconds of a part in all steps."""

    host: float = 0.0
    """On the clock of the host."""
    device: float = 0.0
    """Of the kernels that it launched."""
    of_ttt: _Time | None = None
    """What TTT layers have of it."""


@dataclass
class _Intervals:
    """Intervals of time that do not overlap."""

    bounds: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Any]) -> _Intervals:
        """The outermost of the events."""
        found = cls()
        for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
            if not found.bounds or start >= found.bounds[-1][1]:
                found.bounds.append((start, end))
        return found

    def __contains__(self, time: float) -> bool:
        place = bisect_right(self.bounds, (time, float("inf"))) - 1
        return place >= 0 and time < self.bounds[place][1]

    def total(self) -> float:
        """Microseconds of all of them."""
        return sum(end - start for start, end in self.bounds)


def tables_of(profiler: profile, *, steps: int) -> str:
    """Both tables as text.

    Args:
        profiler: after its steps.
        steps: how many it measured.
    """
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CPU]
    parts, whole = times_of_parts(events)
    return f"{_table_of_parts(parts, whole, steps)}\n\n{_table_of_operations(profiler, steps)}"


def times_of_parts(events: Sequence[Any]) -> tuple[dict[str, _Time], _Time]:
    """The time of each part, and of all steps; TTT layers in forward, and in backward with what is recomputed."""
    ranges = {name: _Intervals.of(e for e in events if e.name == PREFIX + name) for name in PARTS}
    layers = _Intervals.of(event for event in events if event.name == TTT_LAYERS)
    nodes = _Intervals.of(_backward_of(events, layers))
    parts = {name: _Time(intervals.total()) for name, intervals in ranges.items()}
    whole = _Time(sum(event.time_range.elapsed_us() for event in events if event.name.startswith(_STEP)))
    for name in (FORWARD, BACKWARD):
        found = [bounds for bounds in (*layers.bounds, *nodes.bounds) if bounds[0] in ranges[name]]
        parts[name].of_ttt = _Time(_Intervals.of(map(_Bounds, found)).total())
    for event in events:
        launched = sum(kernel.duration for kernel in event.kernels)
        start = event.time_range.start
        if not launched:
            continue
        whole.device += launched
        for name, time in parts.items():
            if start in ranges[name]:
                time.device += launched
                if time.of_ttt is not None and (start in layers or start in nodes):
                    time.of_ttt.device += launched
    return parts, whole


class _Bounds:
    """Bounds of time in the form of an event."""

    def __init__(self, bounds: tuple[float, float]) -> None:
        self.time_range = self
        self.start, self.end = bounds


def _backward_of(events: Sequence[Any], layers: _Intervals) -> list[Any]:
    """The events in which autograd runs the nodes that were made while a TTT layer was called.

    A node has the number of the operation that made it, which is the last one of its thread to see that number.
    """
    makers: dict[tuple[int, int], Any] = {}
    for event in events:
        if event.sequence_nr >= 0 and event.scope != 1 and not event.name.startswith(_NODE):
            key = event.thread, event.sequence_nr
            if key not in makers or makers[key].time_range.start <= event.time_range.start:
                makers[key] = event
    inside = {key for key, event in makers.items() if event.time_range.start in layers}
    return [e for e in events if e.name.startswith(_NODE) and (e.fwd_thread, e.sequence_nr) in inside]


# --- text ---


def _table_of_parts(parts: Mapping[str, _Time], whole: _Time, steps: int) -> str:
    other = _Time(
        max(whole.host - sum(time.host for time in parts.values()), 0.0),
        max(whole.device - sum(time.device for time in parts.values()), 0.0),
    )
    rows = []
    for name, time in [*parts.items(), ("other", other)]:
        rows.append(_row(name, time, whole, steps))
        if time.of_ttt is not None:
            rows.append(_row("  of it TTT layers", time.of_ttt, whole, steps))
    rows.append(_row("a step", whole, whole, steps))
    head = ("part of a step", "ms", "share", *(("ms of kernels",) if whole.device else ()))
    return _aligned([head, *rows])


def _row(name: str, time: _Time, whole: _Time, steps: int) -> tuple[str, ...]:
    kernels = (f"{time.device / steps / 1e3:.2f}",) if whole.device else ()
    return (name, f"{time.host / steps / 1e3:.2f}", f"{time.host / whole.host:.1%}" if whole.host else "", *kernels)


def _table_of_operations(profiler: profile, steps: int) -> str:
    """The operations that take most time themselves, of the device if there is one."""
    averages = [each for each in profiler.key_averages() if not each.key.startswith((PREFIX, _STEP))]
    on_device = any(each.self_device_time_total for each in averages)

    def own(each: Any) -> float:
        return float(each.self_device_time_total if on_device else each.self_cpu_time_total)

    total = sum(map(own, averages)) or 1.0
    head = ("operation", "ms of kernels" if on_device else "ms", "share", "calls in a step")
    most = sorted(averages, key=own, reverse=True)[:OPERATIONS]
    rows = [
        (each.key[:60], f"{own(each) / steps / 1e3:.2f}", f"{own(each) / total:.1%}", f"{each.count / steps:.0f}")
        for each in most
        if own(each)
    ]
    return _aligned([head, *rows])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
