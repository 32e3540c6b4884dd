"""The log of a run's steps: `metrics.jsonl`, loggers, the display."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ttt.files import writing
from ttt.train.claim import METRICS, SUMMARY
from ttt.train.display import Display
from ttt.train.failure import FAILURE
from ttt.train.loggers import Loggers
from ttt.train.metrics import MetricsFile
from ttt.train.parts import Parts
from ttt.train.progress import Progress


class RunLog:
    """The open outputs of a run."""

    def __init__(self, metrics: MetricsFile | _Unwritten, loggers: Loggers | _Nobody, display: Display) -> None:
        self.metrics = metrics
        self.display = display
        self._loggers = loggers

    def write(self, line: Mapping[str, Any]) -> None:
        """Write the line of a step to every output.

        Raises:
            EnvironmentProblem: the disk is full.
        """
        self.metrics.write(line)
        self._loggers.log(line)


@contextlib.contextmanager
def shared_log(parts: Parts, progress: Progress) -> Iterator[RunLog]:
    """The log of a run: of several processes the first writes it, and the others know how far it is."""
    world, opened = parts.world, contextlib.ExitStack()
    with opened:
        logs: list[RunLog] = []

        def open_it() -> int:
            logs.append(opened.enter_context(opened_log(parts, progress)))
            return logs[0].metrics.last_step

        last_step = world.from_first(open_it)
        if world.first:
            yield logs[0]
        else:
            display = Display(parts.console, total=parts.config.train.max_steps, done=progress.done, log_freq=1 << 60)
            yield RunLog(_Unwritten(last_step), _Nobody(), display)


class _Unwritten:
    """The metrics file in a process that does not write it."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step

    def write(self, line: Mapping[str, Any]) -> None:
        """Note the step."""
        self.last_step = int(line["step"])

    def sync(self) -> None:
        """Nothing is to be synced."""


class _Nobody:
    """The loggers in a process that has none."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Nobody is told."""


@contextlib.contextmanager
def opened_log(parts: Parts, progress: Progress) -> Iterator[RunLog]:
    """A context with the outputs of a run open.

    Once the metrics file is locked, no other process trains the run: then the resolved config is written, and files
    from an earlier end of the run are removed.

    Raises:
        UsageError: another process is training there.
        EnvironmentProblem: the disk is full or cannot be written.
    """
    directory, total = parts.directory, parts.config.train.max_steps
    # a run that only lacks its closing evaluation writes its last line again
    keep = progress.done - 1 if progress.done == total else progress.done
    with contextlib.closing(MetricsFile(directory / METRICS, last_step=keep)) as metrics:
        for problem in metrics.dropped:
            parts.say(problem)
        directory.stored_config.keep_comments()
        directory.stored_config.write(parts.config)
        with writing(directory / SUMMARY):
            directory.remove_unfinished()
            for stale in (SUMMARY, FAILURE):  # the run is no longer finished, and no longer failed
                (directory / stale).unlink(missing_ok=True)
        with (
            contextlib.closing(
                Loggers(parts.config, directory.path, first_step=keep + 1, warn=parts.say),
            ) as loggers,
            Display(parts.console, total=total, done=progress.done, log_freq=parts.config.train.log_freq) as display,
        ):
            yield RunLog(metrics, loggers, display)
