"""The runs below a folder, at any depth, and folders that look like one and are none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ttt.checkpoint_folder import CHECKPOINTS
from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import TEMPORARY
from ttt.reading import other_kind, unreadable
from ttt.train.claim import METRICS, SUMMARY
from ttt.train.stored_config import CONFIG

_OF_A_RUN = {CHECKPOINTS, "eval", "tensorboard", "samples", "slurm"}
"""Folders inside a run in which no other run is looked for."""
_PASSED_OVER = {".git", ".venv", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class LeftOut:
    """A folder that is not in the table."""

    path: Path
    why: str
    """One clause, as `config.yaml: not a config of ttt`."""

    def __str__(self) -> str:
        return f"{self.path}: left out: {self.why}"


def run_folders(folder: Path) -> Iterator[Path | LeftOut]:
    """The folders at or below `folder` that hold a run's files, in the order of their names, each once.

    Links are followed; a folder that is reached twice, as through a link that leads back, counts once.

    Raises:
        UsageError: it is a file.
        EnvironmentProblem: it is not there, or cannot be read.
    """
    _require_folder(folder)
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise EnvironmentProblem(f"{folder}: cannot be read: {unreadable(error)}") from None
    ahead, seen = [folder], set()
    while ahead:
        here = ahead.pop()
        try:
            facts = os.stat(here)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(here) as entries:
                folders = {entry.name: entry.is_dir() for entry in entries}
        except OSError as error:
            yield LeftOut(here, f"cannot be read: {unreadable(error)}")
            continue
        is_run = _holds_a_run(folders)
        if is_run:
            yield here
        inside = [name for name, is_folder in folders.items() if is_folder and _may_hold_runs(name, is_run)]
        ahead += [here / name for name in sorted(inside, reverse=True)]


def _require_folder(folder: Path) -> None:
    kind = other_kind(folder)
    if kind == "a folder":
        return
    if kind is not None or folder.is_file():
        raise UsageError(f"{folder}: is {kind or 'a file'}; name a folder that holds runs")
    try:
        os.stat(folder)
    except ValueError:
        raise UsageError(f"{str(folder)[:300]!r}: no folder can have such a name") from None
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder}: cannot be read: {unreadable(error)}; name a folder that holds runs"
        ) from None


def _holds_a_run(names: dict[str, bool]) -> bool:
    """Whether a folder has what training leaves: a config alone may be anybody's."""
    return METRICS in names or (CONFIG in names and (SUMMARY in names or names.get(CHECKPOINTS, False)))


def _may_hold_runs(name: str, is_run: bool) -> bool:
    return not (name.startswith(TEMPORARY) or name in _PASSED_OVER or (is_run and name in _OF_A_RUN))
