"""Scalars for TensorBoard, if it is installed."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ttt.train.terminal import survived


class TensorBoard:
    """Scalars for TensorBoard; does nothing if it is not installed.

    A logger never ends a run: whatever fails in it is warned of once, and the run goes on without it.

    Args:
        folder: where its files go.
        first_step: the run's next step; TensorBoard drops what it has of this step and later ones, from a run that was
            cut short.
        warn: told why nothing more is written, in one sentence.
    """

    def __init__(self, folder: Path, *, first_step: int, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._warn = warn
        self._events: _EventFile | None = None
        with self._surviving():
            self._events = _EventFile.open(folder, first_step)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Warn of what fails inside, and do without TensorBoard from there on."""
        with survived(f"nothing more is written for TensorBoard in {self._folder}", self._warn):
            try:
                yield
            except Exception:
                events, self._events = self._events, None
                with contextlib.suppress(Exception):
                    if events is not None:
                        events.close()
                raise

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a metrics line: every number in it, `layers` by name."""
        with self._surviving():
            if self._events is not None:
                self._events.write(int(line["step"]), dict(_numbers(line)))

    def close(self) -> None:
        """Let go of the file."""
        with self._surviving():
            if self._events is not None:
                self._events.close()


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a metrics line by TensorBoard's names."""
    for name, value in line.items():
        if name == "layers":
            for site, evidence in value.items():
                yield from ((f"{site}/{key}", number) for key, number in evidence.items() if number is not None)
        elif name != "step" and isinstance(value, (int, float)):
            yield name, value


class _EventFile:
    """One event file of TensorBoard, written by this thread.

    PyTorch's `SummaryWriter` hands its events to a thread, which prints a traceback of its own when the disk is full,
    and whose locks an interrupt can leave taken.
    """

    def __init__(self, file: IO[bytes], first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._records = RecordWriter(file)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    @classmethod
    def open(cls, folder: Path, first_step: int) -> _EventFile | None:
        """A new file in the folder, named as TensorBoard looks for them; None if TensorBoard is not installed."""
        try:
            import tensorboard
        except ModuleNotFoundError as error:
            if error.name != "tensorboard":
                raise
            return None
        del tensorboard
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
        """Let go of it."""
        self._records.close()
