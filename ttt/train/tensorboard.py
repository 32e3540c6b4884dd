"""Scalars for TensorBoard, if it is installed: a logger that uses the same hook as a plugin's."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ttt.config.schema import RunConfig
from ttt.errors import EnvironmentProblem
from ttt.plugins import hookimpl
from ttt.train.line_numbers import numbers_of
from ttt.train.terminal import cause


class TensorBoard:
    """A logger (`ttt.plugins.loggers.Logger`) of scalars.

    Args:
        folder: the folder of its files.
        first_step: the run's next step; TensorBoard drops earlier records of this step and later ones, which a run that
            was cut short may have left.

    Raises:
        EnvironmentProblem: files cannot be written, or the package is broken; the methods raise it too.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._folder = folder
        with self._telling():
            self._events = _EventFile.open(folder, first_step)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """A context that adds to an error what is lost by it."""
        try:
            yield
        except Exception as error:
            lost = f"nothing more is written for TensorBoard in {self._folder}"
            raise EnvironmentProblem(f"{lost} ({cause(error)})") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a metrics line: every number in it, `layers` by name."""
        with self._telling():
            self._events.write(int(line["step"]), dict(numbers_of(line)))

    def close(self) -> None:
        """Close the file."""
        with self._telling():
            self._events.close()


def _is_installed() -> bool:
    try:
        importlib.import_module("tensorboard")
    except ModuleNotFoundError as error:
        if error.name == "tensorboard":
            return False
    except Exception:
        return True  # the package is broken; that is reported when it is used
    return True


@hookimpl
def ttt_loggers(config: RunConfig, run_dir: Path, first_step: int) -> TensorBoard | None:
    """The hook: scalars in the run's folder, if the config names it, or names no loggers and it is installed."""
    named = config.train.loggers
    wanted = _is_installed() if named is None else "tensorboard" in named
    return TensorBoard(run_dir / "tensorboard", first_step=first_step) if wanted else None


class _EventFile:
    """One event file of TensorBoard, written by this thread.

    PyTorch's `SummaryWriter` passes events to a thread. That thread prints a traceback when the disk is full, and an
    interrupt can leave its locks taken.
    """

    def __init__(self, file: IO[bytes], first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._records = RecordWriter(file)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    @classmethod
    def open(cls, folder: Path, first_step: int) -> _EventFile:
        """Open a new file in the folder, with a name that TensorBoard finds."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        file = open(folder / name, "xb")  # noqa: SIM115 - held for the run
        try:
            return cls(file, first_step)
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            raise

    def _add(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **event).SerializeToString())

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, number in numbers.items():
            value = Summary.Value(tag=name, simple_value=number)
            self._add(step=step, summary=Summary(value=[value]))
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()
