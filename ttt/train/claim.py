"""Claims a folder for a run: it is checked and locked before anything is written there.

If a run ended there before its first checkpoint, the folder is taken over, since nothing in it is worth keeping. Files
of another origin are not touched, and a run with checkpoints is never started over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from ttt.checkpoint_folder import CHECKPOINTS
from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import lock
from ttt.machine import why_unusable
from ttt.reading import other_kind
from ttt.train.stored_config import CONFIG, is_a_config, is_of_a_run

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
LOSS = "loss.png"
INNER_LOSS = "inner_loss.png"


class Hold:
    """A lock on a run's folder, from `take` until the end of the `with` block."""

    def __init__(self) -> None:
        self._handle: int | None = None

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def take(self, folder: Path) -> None:
        """Lock the folder; does nothing if it does not exist yet.

        Raises:
            UsageError: another process holds it.
        """
        if self._handle is not None:
            return
        try:
            handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))  # opening a FIFO would block
        except (OSError, ValueError):  # missing, or the system opens no folders; other checks report what is wrong
            return
        try:
            lock(handle, folder / METRICS)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle


@contextlib.contextmanager
def looking(folder: Path) -> Iterator[None]:
    """Turn a system error while a folder is read into one sentence.

    Raises:
        EnvironmentProblem: the folder cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(f"run_dir: {folder}: cannot be read: {error.strerror or error}") from error


def require_possible(folder: Path) -> None:
    """Refuse a path at which a run's folder cannot exist.

    Raises:
        UsageError: the path is a file or a device.
        EnvironmentProblem: it has too many levels, the system does not allow the name, or it is not writable.
    """
    if os.path.isdir(folder):
        return
    kind = "a file" if os.path.isfile(folder) else other_kind(folder)
    if kind:
        raise UsageError(f"run_dir: {folder} is {kind}; name a folder")
    cause = why_unusable(str(folder))
    if cause:
        raise EnvironmentProblem(f"run_dir: {str(folder)[:300]!r} cannot hold the run: {cause}; name another folder")


def require_places(folder: Path) -> None:
    """Refuse a folder in which something else has the name of a run's file or folder.

    Raises:
        EnvironmentProblem: a folder or a device has the name of a run's file, or a file that of a run's folder.
    """
    for name in (CONFIG, METRICS, SUMMARY, LOSS, INNER_LOSS):
        place = folder / name
        if os.path.lexists(place) and not place.is_file():
            kind = other_kind(place) or "a link that leads nowhere"
            raise EnvironmentProblem(
                f"{place}: is {kind}, and a run writes a file there; move it away, or name another run_dir"
            )
    place = folder / CHECKPOINTS
    if os.path.lexists(place) and not place.is_dir():
        raise EnvironmentProblem(
            f"{place}: is not a folder, and a run has its checkpoints there; move it away, or name another run_dir"
        )


def require_startable(folder: Path) -> None:
    """Refuse a folder without a checkpoint if it holds more than a run leaves before its first checkpoint.

    Raises:
        UsageError: the files are not from a run of ttt, or they are from a finished run.
        EnvironmentProblem: a file cannot be read.
    """
    config, metrics = folder / CONFIG, folder / METRICS
    if (folder / SUMMARY).is_file():
        raise UsageError(
            f"run_dir: {folder} holds the {SUMMARY} of a finished run, but none of its checkpoints; put them back, "
            f"name another run_dir, or delete {SUMMARY} to start anew there"
        )
    if config.is_file() and not is_a_config(config):
        raise UsageError(
            f"run_dir: {folder} holds a {CONFIG} that is not a config of ttt; move it away, or name another run_dir"
        )
    if not metrics.is_file() or not metrics.stat().st_size:
        return
    if not config.is_file():
        raise UsageError(
            f"run_dir: {folder} holds a {METRICS} but no {CONFIG}, so no run of ttt left it; move it away, or name "
            f"another run_dir"
        )
    if not is_of_a_run(config):
        raise UsageError(
            f"run_dir: {folder} holds a {METRICS} that no run of ttt with its {CONFIG} left; move it away, or name "
            f"another run_dir"
        )
