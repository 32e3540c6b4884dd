"""What keeps the metrics of a run beside `metrics.jsonl`: a dashboard, a table, a database."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Logger(Protocol):
    """Keeps the metrics of one run.

    A logger never ends a run. What it raises is told once, and the run goes on without it.
    """

    def log(self, line: Mapping[str, Any]) -> None:
        """Keep the line of a step, as `metrics.jsonl` gets it: `step`, `loss`, `layers` by site, `task/metric`.

        A number that is not finite stays one here; `metrics.jsonl` has null. The line is the logger's own copy.
        """
        ...

    def close(self) -> None:
        """Let go of everything: the run has ended, was interrupted or failed."""
        ...
