"""Whose a folder is: what lies in it is looked at, and the folder held, before anything is written there.

A run that ended before its first checkpoint left nothing worth keeping, so its folder is taken over. What somebody
else put there is not touched, and what a run with checkpoints left is never started over.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from ttt.config.schema import RunConfig
from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import lock, temporary_beside, write_bytes
from ttt.machine import why_unusable
from ttt.reading import other_kind

CONFIG = "config.yaml"
ORIGINAL = "config.original.yaml"
"""A config by hand that lay where the resolved one goes."""
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
LOSS = "loss.png"
INNER_LOSS = "inner_loss.png"

_MAX_CONFIG = 1 << 20
_COMMENT = re.compile(r"(^|\s)#", re.MULTILINE)
_CHECKSUM = "# sha256 of the lines above, which tells a later change: "


class Hold:
    """Keeps other processes out of a run's folder, from when it is there until the end of the `with`."""

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
        """Hold the folder; nothing to hold where it is not there yet.

        Raises:
            UsageError: another process holds it.
        """
        if self._handle is not None:
            return
        try:
            handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))  # to open a FIFO would wait
        except (OSError, ValueError):  # not there, or a system that opens no folders: what is wrong is told elsewhere
            return
        try:
            lock(handle, folder / METRICS)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle


@contextlib.contextmanager
def looking(folder: Path) -> Iterator[None]:
    """Turn what the system says while a folder is looked at into one sentence.

    Raises:
        EnvironmentProblem: it cannot be looked at.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(f"run_dir: {folder}: cannot be read: {error.strerror or error}") from error


def require_possible(folder: Path) -> None:
    """Refuse a path that no run's folder can have.

    Raises:
        UsageError: it is a file, or a device.
        EnvironmentProblem: it has too many levels, the system knows no such names, or it may not be written.
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
    """Refuse a folder in which something else lies where a run's files go.

    Raises:
        EnvironmentProblem: a file's place is taken by a folder or a device, or a folder's by a file.
    """
    for name in (CONFIG, METRICS, SUMMARY, LOSS, INNER_LOSS):
        place = folder / name
        if os.path.lexists(place) and not place.is_file():
            kind = "a folder" if place.is_dir() else "no regular file"
            raise EnvironmentProblem(
                f"{place}: is {kind}, and a run writes a file there; move it away, or name another run_dir"
            )
    place = folder / CHECKPOINTS
    if os.path.lexists(place) and not place.is_dir():
        raise EnvironmentProblem(
            f"{place}: is no folder, and a run has its checkpoints there; move it away, or name another run_dir"
        )


def require_startable(folder: Path) -> None:
    """Refuse a folder without a checkpoint whose files are more than what a run leaves before its first.

    Raises:
        UsageError: they are somebody else's, or those of a finished run.
        EnvironmentProblem: a file cannot be read.
    """
    config, metrics = folder / CONFIG, folder / METRICS
    if (folder / SUMMARY).is_file():
        raise UsageError(
            f"run_dir: {folder} holds the {SUMMARY} of a finished run, but none of its checkpoints; put them back, "
            f"name another run_dir, or delete {SUMMARY} to start anew there"
        )
    if config.is_file() and not _is_config(_text(config)):
        raise UsageError(
            f"run_dir: {folder} holds a {CONFIG} that is no config of ttt; move it away, or name another run_dir"
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


def keep_original(folder: Path) -> None:
    """Put a config that somebody wrote by hand aside, so that the resolved one does not replace its comments."""
    if (folder / CONFIG).is_file() and not _is_resolved(_text(folder / CONFIG)):
        _put_aside(folder)


def keep_comments(folder: Path) -> None:
    """Put the config of a run that goes on aside, if somebody wrote comments into it."""
    if (folder / CONFIG).is_file():
        content, found, rest = _text(folder / CONFIG).rpartition(_CHECKSUM)
        if _COMMENT.search(content if found else rest):
            _put_aside(folder)


def _put_aside(folder: Path) -> None:
    """Copy a config; it stays until the resolved one replaces it, so that a kill leaves a config at any time."""
    config = folder / CONFIG
    content = config.read_bytes()
    for name in itertools.chain(
        [ORIGINAL], (ORIGINAL.replace(".yaml", f"-{number}.yaml") for number in itertools.count(2))
    ):
        if not os.path.lexists(folder / name):
            write_bytes(folder / name, content)
            break
        if other_kind(folder / name) is None and (folder / name).read_bytes() == content:
            break  # a run that was killed has put it there
    if config.is_symlink():  # what it leads to is not the run's to write to
        temporary = temporary_beside(config)
        write_bytes(temporary, content)
        os.replace(temporary, config)


def with_checksum(text: str) -> str:
    """A resolved config and the line that tells whether it was changed."""
    return f"{text}{_CHECKSUM}{_digest_of(text)}\n"


def is_as_written(text: str) -> bool | None:
    """Whether a config has the checksum that it was written with; None where it has none."""
    content, found, digest = text.rpartition(_CHECKSUM)
    return digest.strip() == _digest_of(content) if found else None


def is_of_a_run(config: Path) -> bool:
    """Whether a run wrote a config, be it changed since."""
    text = _text(config)
    return is_as_written(text) is not None or _is_resolved(text)


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _text(config: Path) -> str:
    with open(config, "rb") as file:
        return file.read(_MAX_CONFIG).decode("utf-8", errors="replace")


def _is_config(text: str) -> bool:
    """Whether a YAML text has the one section that every config has."""
    return bool(re.search(r"""^[{\s]*["']?backbone(["']|\b)[^\n]*""", text, re.MULTILINE))


def _is_resolved(text: str) -> bool:
    """Whether a run wrote it: its checksum holds or, where it has none, every section, in order, and no comment."""
    as_written = is_as_written(text)
    if as_written is not None:
        return as_written
    sections = re.findall(r"^(\w+):", text, re.MULTILINE)
    return sections == list(RunConfig.model_fields) and not re.search(r"(^|\s)#", text)
