"""The loggers of a run: of `train.loggers` and of plugins. If one fails, that is reported once, and the run goes on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt.config.schema import RunConfig
from ttt.errors import EnvironmentProblem
from ttt.machine import is_installed
from ttt.plugins.asking import asked
from ttt.plugins.hookspecs import LOGGERS
from ttt.plugins.loggers import Logger
from ttt.plugins.registry import Plugin, ask, in_its_name, register_own
from ttt.train import tensorboard, trackio, wandb


@dataclass(frozen=True, eq=False)
class _Held:
    """An open logger and the plugin it comes from."""

    plugin: Plugin
    logger: Logger

    def ask(self, method: str, *arguments: Any) -> None:
        """Call a method of the logger.

        Raises:
            Exception: the method failed.
        """
        called = getattr(self.logger, method)
        with asked(self.plugin, f"`{method}` of its logger", called):
            called(*arguments)


def require_packages(config: RunConfig) -> None:
    """Refuse to begin a run that names a logger whose package is not there.

    Raises:
        EnvironmentProblem: the package is not installed.
    """
    missing = next((name for name in config.train.loggers or () if not is_installed(name)), None)
    if missing is not None:
        raise EnvironmentProblem(
            f"train.loggers names {missing}, and there is no package of that name here; pip install {missing}, or "
            f"leave it out"
        )


class Loggers:
    """Everything that records a run's metrics besides `metrics.jsonl`.

    Args:
        config: the run's config.
        run_dir: its folder.
        first_step: the next step.
        warn: called with one sentence that says why a logger is left out from now on.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, first_step: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        for module in (tensorboard, wandb, trackio):
            register_own(module)
        answers = ask(LOGGERS, config=config, run_dir=run_dir, first_step=first_step)
        for failure in answers.failures:
            self._tell(failure.told)
        self._held = [_Held(answer.plugin, answer.value) for answer in answers.given]

    def log(self, line: Mapping[str, Any]) -> None:
        """Give each logger its own copy of a metrics line."""
        for held in tuple(self._held):
            try:
                held.ask("log", copy.deepcopy(dict(line)))
            except Exception as error:
                self._tell(in_its_name(held.plugin, error))
                self._held.remove(held)
                with contextlib.suppress(Exception):
                    held.ask("close")

    def close(self) -> None:
        """Close every logger."""
        while self._held:
            held = self._held.pop()
            try:
                held.ask("close")
            except Exception as error:
                self._tell(in_its_name(held.plugin, error))

    def _tell(self, told: str) -> None:
        self._warn(f"warning: {told}; the run goes on")
