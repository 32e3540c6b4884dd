"""`metrics.jsonl`: one process at a time writes it; reading reports all damage.

A line is one step: `step` (from 1), `loss`, the backbone's own metrics, `lr`, `grad_norm`, `tokens_per_second`,
`peak_memory_bytes`; if they were measured, `layers` (evidence by site), `lora_share` (how far LoRA has moved its linear
layers) and `eval_loss`, `eval_loss_ema` (with averaged weights), `eval_loss_gates_closed`, `eval_split`,
`eval_windows`, `eval_windows_available` and the numbers of `eval.tasks`, each as `task/metric`. Its last key, `crc32`,
is a checksum over the line before it (`ttt.checksums`).
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ttt import checksums
from ttt.errors import DamagedFileWarning, EnvironmentProblem
from ttt.files import lock, replaced_file, sync, temporary_beside, writing
from ttt.reading import open_file


class MetricsFile:
    """`metrics.jsonl`, held by one process at a time.

    Opening it removes lines past `last_step` and a line that a crash cut short, so that a resumed run has no step
    twice. It also removes damaged lines, which `dropped` names; every other line stays.

    Raises:
        UsageError: another process is writing to it.
        EnvironmentProblem: it cannot be written.
    """

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        self._path = path
        replaced_file(path)  # opening a FIFO would block
        self.dropped: list[str] = []
        """A sentence for each damaged line that was removed, or about missing lines."""
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
        """Replace the file with new content in one rename, and lock the new file."""
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
        """Make sure that the lines so far are on the disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())
            sync(self._path.parent)  # its name too

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # closing retries a write that failed, which was already reported
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without their checksums.

    A line that a crash cut short is left out; a damaged line is left out with a `DamagedFileWarning`.

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
    """The content of one line of a `metrics.jsonl`."""

    number: int
    """The line's number, from 1."""
    entries: tuple[tuple[dict[str, Any], bytes], ...]
    """The line's entry and its bytes: several if a newline between entries is damaged, none if no entry is whole."""
    problem: str | None
    cut_short: bool
    """Whether it is the last line and lacks its newline, as after a crash."""

    @property
    def outcome(self) -> str:
        """What happens to a line with a problem, in words."""
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
    """The same value, with None for numbers that JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
