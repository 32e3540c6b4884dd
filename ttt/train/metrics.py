"""What a run tells while it runs: `metrics.jsonl`, TensorBoard where installed, a live bar or plain lines.

A line of `metrics.jsonl` is one step: `step` (from 1), `loss`, the backbone's own metrics, `lr`, `grad_norm`,
`tokens_per_second`, `peak_memory_bytes`; where they were measured, `layers` (evidence by site) and
`eval_loss`, `eval_loss_gates_closed`, `eval_split`, `eval_windows`, `eval_windows_available`. Its last key, `crc32`,
is a checksum over the line before it (`ttt.checksums`).
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from ttt import checksums
from ttt.asking import in_one_line
from ttt.errors import DamagedFileWarning, EnvironmentProblem
from ttt.files import lock, replaced_file, size_in_words, sync, temporary_beside, writing
from ttt.printable import say
from ttt.progress import live_bar
from ttt.reading import open_file
from ttt.words import duration_in_words

TELL_SECONDS = 10.0
"""How long an evaluation may be silent where there is no bar, unless one batch takes longer."""


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of PyTorch's allocator on CUDA, else of the process (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MetricsFile:
    """`metrics.jsonl`, held by one process at a time.

    Lines past `last_step`, and a line that a crash cut short, are taken off when it is opened, so that a resumed
    run has no step twice. So are damaged lines, which `dropped` names; every other line stays.

    Raises:
        UsageError: another process is writing to it.
        EnvironmentProblem: it cannot be written.
    """

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        self._path = path
        replaced_file(path)  # a FIFO there would keep the run waiting
        self.dropped: list[str] = []
        """A sentence for each damaged line that was taken off, or about lines that are gone."""
        with writing(path):
            self._file: IO[str] = open(path, "a+", encoding="utf-8", newline="\n")  # noqa: SIM115 - held for the run
        try:
            lock(self._file, path)
            with writing(path):
                self.last_step = self._truncate(last_step)
        except BaseException:
            self._file.close()
            raise

    def _truncate(self, last_step: int) -> int:
        """Keep the whole lines of steps up to `last_step`, each step once; return the last one's step."""
        with open(self._path, "rb") as file:
            content = file.read()
        lines, found = [], 0
        for line in _lines(content):
            for entry, raw in line.entries:
                if found < entry["step"] <= last_step:
                    lines.append(raw + b"\n")
                    found = entry["step"]
            if line.problem and not line.cut_short and found < last_step:
                self.dropped.append(f"{self._path}:{line.number}: {line.problem}; {line.outcome}")
        if last_step and not found and not self.dropped:  # the first step is always logged
            self.dropped.append(f"{self._path}: the lines of the steps up to {last_step} are gone; it begins anew")
        kept = b"".join(lines)
        if content.startswith(kept):
            os.truncate(self._path, len(kept))
        else:
            self._replace(kept)
        return found

    def _replace(self, content: bytes) -> None:
        """Put other lines into the file's place at once, and hold that file instead."""
        temporary = temporary_beside(self._path)
        file = open(temporary, "a+", encoding="utf-8", newline="\n")  # noqa: SIM115 - held for the run
        try:
            file.buffer.write(content)
            file.flush()
            os.fsync(file.fileno())
            lock(file, self._path)
            os.replace(temporary, self._path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = file

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            EnvironmentProblem: the disk is full.
        """
        with writing(self._path):
            self._file.write(checksums.sealed_line(finite(line)) + "\n")
            self._file.flush()
        self.last_step = int(line["step"])

    def sync(self) -> None:
        """Have the lines so far on the disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())
            sync(self._path.parent)  # its name too

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError):  # it writes anew what could not be written, which was told then
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without their checksums; one that a crash cut short is left out.

    A damaged line is left out with a `DamagedFileWarning`.

    Raises:
        EnvironmentProblem: it cannot be read.
    """
    lines = metrics_lines(path)
    for line in lines:
        if line.problem and not line.cut_short:
            warnings.warn(f"{path}:{line.number}: {line.problem}; {line.outcome}", DamagedFileWarning, stacklevel=2)
    return [entry for line in lines for entry, _ in line.entries]


@dataclass(frozen=True)
class MetricsLine:
    """What a line of a `metrics.jsonl` holds."""

    number: int
    """From 1."""
    entries: tuple[tuple[dict[str, Any], bytes], ...]
    """The entry, with the bytes that say it; several where the newline between them is damaged, none where all is."""
    problem: str | None
    cut_short: bool
    """Whether it is the last and lacks its newline, as a crash leaves it."""

    @property
    def outcome(self) -> str:
        """What becomes of a line with a problem, in words."""
        return "what stands whole in it is kept" if self.entries else "the line is left out"


def metrics_lines(path: Path) -> list[MetricsLine]:
    """Every line of a `metrics.jsonl`, and what is wrong with it.

    Raises:
        EnvironmentProblem: it cannot be read.
    """
    try:
        with open_file(path) as file:
            return list(_lines(file.read()))
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be read: {error.strerror or error}") from error


def _lines(content: bytes) -> Iterator[MetricsLine]:
    lines = content.split(b"\n")
    for number, raw in enumerate(lines, start=1):
        last = number == len(lines)
        if not raw and last:
            return
        try:
            entry = checksums.parse_line(raw)
            _require_step(entry)
            yield MetricsLine(number, () if last else ((entry, raw),), "cut short" if last else None, cut_short=last)
        except ValueError as error:
            parts = tuple(pair for pair in checksums.whole_parts(raw) if type(pair[0].get("step")) is int)
            yield MetricsLine(number, parts, str(error), cut_short=last and not parts)


def _require_step(entry: Mapping[str, Any]) -> None:
    if type(entry.get("step")) is not int:
        raise ValueError("no line of a step")


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def survived(what: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Warn of what fails inside and go on: for what a run tells beside its metrics, which is never its end.

    Args:
        what: cannot be done then, a clause.
        warn: told so and why, in one sentence.
    """
    try:
        yield
    except Exception as error:  # of the disk, or of a library, its fonts and its settings
        warn(f"warning: {what} ({getattr(error, 'strerror', None) or in_one_line(error)}); the run goes on")


class TensorBoard:
    """Scalars for TensorBoard; does nothing where it is not installed.

    A logger is never the end of a run: whatever fails in it is warned of once, and the run goes on without it.

    Args:
        folder: where its files go.
        first_step: the run's next step; what TensorBoard has of it and of later ones is of a run that was cut short.
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
    """One event file of TensorBoard, written where it is asked for.

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
        """A new file in the folder, named as TensorBoard looks for them; None where TensorBoard is not installed."""
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


class _Text(ProgressColumn):
    """A column from a function of the task; rich draws it anew with every refresh."""

    def __init__(self, text: Callable[[Task], str], style: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._text, self._style = text, style

    def render(self, task: Task) -> Text:
        return Text(self._text(task), style=self._style)


class Display:
    """The live bar on a terminal, plain lines elsewhere.

    Args:
        console: where to.
        total: optimiser steps of the run.
        done: of which are done already.
        log_freq: steps between plain lines.
    """

    def __init__(self, console: Console, *, total: int, done: int, log_freq: int) -> None:
        self._console = console
        self._total = total
        self._first = done
        self._log_freq = log_freq
        self._started = self._evaluating = self._told = time.monotonic()
        self._bar = live_bar(
            console,
            "train",
            _Text(lambda task: task.fields["told"], "cyan"),
            _Text(lambda task: f"{task.fields['left']} left" if task.fields["left"] else "", "green"),
        )
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=total, completed=done, told="", left="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        say(self._console, text)

    def evaluating(self, done: int, total: int) -> None:
        """An evaluation has read `done` of `total` windows: told in the bar, or in a line every `TELL_SECONDS`."""
        now = time.monotonic()
        if done == 0:
            self._evaluating = self._told = now
        text = f"evaluating: {done} of {total} windows"
        if self._bar is not None:
            self._bar.update(self._task, told=text if done < total else "", left="")
        elif 0 < done < total and now - self._told >= TELL_SECONDS:
            left = duration_in_words((now - self._evaluating) / done * (total - done))
            self.say(f"{text}, {left} left")
            self._told = now

    def step(self, line: Mapping[str, Any]) -> None:
        """A step is done."""
        step = line["step"]
        seconds = time.monotonic() - self._started
        left = duration_in_words(seconds / (step - self._first) * (self._total - step))
        speed, memory = line["tokens_per_second"], size_in_words(line["peak_memory_bytes"])
        if self._bar is not None:
            told = f"loss {line['loss']:.4f}  {speed:,.0f} tok/s  {memory}"
            self._bar.update(self._task, completed=step, told=told, left=left)
        elif step % self._log_freq == 0 or step in (1, self._total):
            self.say(
                f"step {step:>{len(str(self._total))}}/{self._total}  loss {line['loss']:.4f}  "
                f"lr {line['lr']:.2e}  {speed:,.0f} tokens/s  peak {memory}  {left} left"
            )
