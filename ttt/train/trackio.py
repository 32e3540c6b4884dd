"""Numbers for Trackio, if `train.loggers` names it: a logger that uses the same hook as a plugin's.

Trackio's own environment variables say where they go: TRACKIO_DIR is its folder on this machine, TRACKIO_SPACE_ID a
Space, TRACKIO_SERVER_URL a server. TRACKIO_PROJECT names the project.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ttt.config.schema import RunConfig
from ttt.errors import EnvironmentProblem
from ttt.plugins import hookimpl
from ttt.train.dashboard_id import dashboard_id
from ttt.train.line_numbers import numbers_of
from ttt.train.terminal import cause

PROJECT = "ttt"
"""The project, if the environment names none."""


class Trackio:
    """A logger (`ttt.plugins.loggers.Logger`) of one run of Trackio; a resumed run goes on in it.

    Args:
        config: the run's config.
        run_dir: its folder, whose name begins the run's.
        first_step: the run's next step. Of a step that comes again after an interrupt, with the same numbers, the first
            line is kept.

    Raises:
        EnvironmentProblem: Trackio refuses, or its files cannot be written; the methods raise it too.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, first_step: int) -> None:
        with self._telling():
            import trackio

            name = dashboard_id(run_dir, "trackio", first_step=first_step)
            self._run: Any = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
                name=f"{run_dir.name}-{name}",
                resume="allow",
                config=config.model_dump(mode="json"),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            self._there = int(getattr(self._run, "_next_step", 0)) if first_step > 1 else 0

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """A context that adds to an error what is lost by it, and keeps Trackio from printing into the progress."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:
            raise EnvironmentProblem(f"nothing more goes to Trackio ({cause(error)})") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a metrics line: every number in it, `layers` by name."""
        step = int(line["step"])
        with self._telling():
            if step >= self._there:
                self._run.log(dict(numbers_of(line)), step=step)

    def close(self) -> None:
        """Send what waits, and end Trackio's run; it can be resumed."""
        with self._telling():
            import trackio

            trackio.finish()  # the run of this process; else that happens once more when the process ends


@hookimpl
def ttt_loggers(config: RunConfig, run_dir: Path, first_step: int) -> Trackio | None:
    """The hook: a run of Trackio, if the config names it."""
    return Trackio(config, run_dir, first_step=first_step) if "trackio" in (config.train.loggers or ()) else None
