"""Numbers for Weights & Biases, if `train.loggers` names it: a logger that uses the same hook as a plugin's.

W&B's own environment variables say where they go: WANDB_MODE=offline keeps them in the run's folder, WANDB_PROJECT and
WANDB_ENTITY name a place, WANDB_RUN_ID the run.
"""

from __future__ import annotations

import contextlib
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


class WandB:
    """A logger (`ttt.plugins.loggers.Logger`) of one run of W&B; a resumed run goes on in it.

    Args:
        config: the run's config.
        run_dir: its folder, where W&B keeps its files.
        first_step: the run's next step. W&B keeps the first line of a step: a step that comes again after an interrupt
            has the same numbers.

    Raises:
        EnvironmentProblem: W&B refuses or cannot be reached; the methods raise it too.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, first_step: int) -> None:
        with self._telling():
            import wandb

            name = dashboard_id(run_dir, "wandb", first_step=first_step, wanted=os.environ.get("WANDB_RUN_ID"))
            self._run: Any = wandb.init(
                project=None if os.environ.get("WANDB_PROJECT") else PROJECT,
                dir=run_dir,
                id=name,
                name=None if os.environ.get("WANDB_NAME") else run_dir.name,
                resume="allow",
                reinit="create_new",  # of several runs in one process, each has its own
                config=config.model_dump(mode="json"),
                allow_val_change=True,  # what may differ when a run goes on, such as train.max_steps
                settings=wandb.Settings(console="off", quiet=True),
            )

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """A context that adds to an error what is lost by it."""
        try:
            yield
        except Exception as error:
            raise EnvironmentProblem(f"nothing more goes to W&B ({cause(error)})") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a metrics line: every number in it, `layers` by name."""
        step = int(line["step"])
        with self._telling():
            if step >= self._run.step:  # of an earlier one W&B would warn that it is there already
                self._run.log(dict(numbers_of(line)), step=step)

    def close(self) -> None:
        """End W&B's run; it can be resumed."""
        with self._telling():
            self._run.finish()


@hookimpl
def ttt_loggers(config: RunConfig, run_dir: Path, first_step: int) -> WandB | None:
    """The hook: a run of W&B, if the config names it."""
    return WandB(config, run_dir, first_step=first_step) if "wandb" in (config.train.loggers or ()) else None
