"""The parts of a step, marked for `ttt train --profile`: ranges in a trace, and nothing while no run is profiled."""

from __future__ import annotations

from contextlib import ContextDecorator
from typing import Any

import torch

PREFIX = "ttt: "
"""Begins the names of the ranges in a trace."""
DATA, FORWARD, BACKWARD, OPTIMIZER, NUMBERS = PARTS = ("data", "forward", "backward", "optimizer", "numbers read")
"""The parts, in the order of a step. While numbers are read, the host waits for the device."""


class Marks:
    """Whether parts are marked."""

    on = False


class part_of_step(ContextDecorator):  # noqa: N801 - used like a function, as a context and as a decorator
    """Marks a part of a step, if a run is profiled."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._range: Any = None

    def _recreate_cm(self) -> part_of_step:
        return part_of_step(self._name)  # so that a decorated function may call itself

    def __enter__(self) -> None:
        if Marks.on:
            self._range = torch.profiler.record_function(PREFIX + self._name)
            self._range.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._range is not None:
            self._range.__exit__(*error)
