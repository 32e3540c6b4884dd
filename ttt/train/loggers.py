"""The loggers of a run: TensorBoard and those of plugins. One that fails is told once and left out; the run goes on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt.config.schema import RunConfig
from ttt.plugins.asking import asked
from ttt.plugins.hookspecs import LOGGERS
from ttt.plugins.loggers import Logger
from ttt.plugins.registry import Plugin, ask, in_its_name, register_own
from ttt.train import tensorboard


@dataclass(frozen=True, eq=False)
class _Held:
    """A logger at work, and whose it is."""

    plugin: Plugin
    logger: Logger

    def ask(self, method: str, *arguments: Any) -> None:
        """Call a method of it.

        Raises:
            Exception: it failed.
        """
        called = getattr(self.logger, method)
        with asked(self.plugin, f"`{method}` of its logger", called):
            called(*arguments)


class Loggers:
    """Everything that keeps a run's metrics beside `metrics.jsonl`.

    Args:
        config: of the run.
        run_dir: its folder.
        first_step: the step that comes next.
        warn: told why a logger gets nothing more, in one sentence.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, first_step: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        register_own(tensorboard)
        answers = ask(LOGGERS, config=config, run_dir=run_dir, first_step=first_step)
        for failure in answers.failures:
            self._tell(failure.told)
        self._held = [_Held(answer.plugin, answer.value) for answer in answers.given]

    def log(self, line: Mapping[str, Any]) -> None:
        """Give a metrics line to each, a copy of its own."""
        for held in tuple(self._held):
            try:
                held.ask("log", copy.deepcopy(dict(line)))
            except Exception as error:
                self._tell(in_its_name(held.plugin, error))
                self._held.remove(held)
                with contextlib.suppress(Exception):
                    held.ask("close")

    def close(self) -> None:
        """Let go of all of them."""
        while self._held:
            held = self._held.pop()
            try:
                held.ask("close")
            except Exception as error:
                self._tell(in_its_name(held.plugin, error))

    def _tell(self, told: str) -> None:
        self._warn(f"warning: {told}; the run goes on")
