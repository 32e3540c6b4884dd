"""Checkpoint folders: what makes one complete, what its record says, and which of a run's is the newest.

    RUN/checkpoints/step_000100/trainer_state.json     names each file beside it, with its size and checksum

A folder is complete if each file that its record names is there as it was recorded. This module imports no torch and
knows nothing about training, so an adapter can be read from a run's folder without the trainer.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt import checksums
from ttt.checksums import DAMAGED
from ttt.errors import DamagedFileWarning, EnvironmentProblem, UnreadableError
from ttt.files.json_objects import read_json, write_json
from ttt.files.tensors import read_header, verify_tensors

CHECKPOINTS = "checkpoints"
"""A run's folder of checkpoints."""
EMA = "ema"
"""The folder in a checkpoint of the adapter with averaged weights, if the run keeps averages (`train.ema_decay`)."""
TRAINER_STATE = "trainer_state.json"
"""The record in each of them."""

_FORMAT = "ttt-checkpoint"
_VERSION = 2
"""Of `trainer_state.json`: 2 records checksums, 1 sizes alone."""
_STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimiser steps done."""
    state: dict[str, Any]
    """What the trainer put into `trainer_state.json`."""


@dataclass(frozen=True)
class Newest:
    """The newest complete checkpoint of a run, and the newer folders that were passed over."""

    checkpoint: Checkpoint | None
    passed_over: tuple[str, ...]
    """For each newer folder a sentence that says why."""
    damaged: frozenset[Path]
    """Those of them that are complete by name and size, but whose content is not what was written."""

    @property
    def why_none(self) -> str:
        """The reasons in brackets, for the end of a sentence that says that there is none."""
        return f" ({'; '.join(self.passed_over)})" if self.passed_over else ""

    def warn_of_passed_over(self, *, stacklevel: int) -> None:
        """Warn of each folder that was passed over, and name the one that is taken instead.

        Args:
            stacklevel: as for `warnings.warn`, counted from the caller.
        """
        assert self.checkpoint is not None
        for problem in self.passed_over:
            warnings.warn(
                f"passed over a checkpoint that is not whole: {problem}; {self.checkpoint.path} is taken instead",
                DamagedFileWarning,
                stacklevel=stacklevel + 1,
            )


def newest_checkpoint(run: Path, *, verify: bool = False, only: Collection[str] | None = None) -> Newest:
    """The newest complete checkpoint of a run.

    Args:
        run: the run's folder.
        verify: compare the content of its files with their checksums, which reads them; else only what is small is
            compared.
        only: names of the files whose content is compared; None compares all.

    Raises:
        UnreadableError: the disk does not give a file. Taking an older checkpoint would lose steps that are there.
    """
    passed_over: list[str] = []
    damaged: set[Path] = set()
    for folder in reversed(step_folders(run)):
        checkpoint = None
        try:
            checkpoint = read_checkpoint(folder)
            if verify:
                verify_checkpoint(checkpoint, only=only)
            return Newest(checkpoint, tuple(passed_over), frozenset(damaged))
        except UnreadableError:
            raise
        except EnvironmentProblem as problem:
            passed_over.append(str(problem))
            if checkpoint is not None:
                damaged.add(folder)
    return Newest(None, tuple(passed_over), frozenset(damaged))


def step_folders(run: Path) -> list[Path]:
    """Folders of a run that are named like checkpoints, in order of step, whatever is in them."""
    try:  # newer Pythons' `is_dir` takes a disk that fails for a folder that is not there: a run would start over
        entries = sorted((run / CHECKPOINTS).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    named = [(match, folder) for folder in entries if (match := _STEP.fullmatch(folder.name))]
    return [folder for match, folder in sorted(named, key=lambda pair: int(pair[0][1])) if folder.is_dir()]


def step_folder(run: Path, step: int) -> Path:
    """Where a run's checkpoint goes that is written after `step` optimiser steps."""
    return run / CHECKPOINTS / f"step_{step:06d}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, if each of its files is there in full; no tensor is read.

    Raises:
        EnvironmentProblem: it is not complete, or not a checkpoint of ours; one sentence says why.
    """
    state = read_json(folder / TRAINER_STATE, sealed=True)
    if state.get("format") != _FORMAT:
        raise EnvironmentProblem(f"{folder / TRAINER_STATE}: not a checkpoint of ttt")
    version = state.get("version")
    if version not in (1, _VERSION):
        raise EnvironmentProblem(
            f"{folder / TRAINER_STATE}: checkpoint version {version!r}, this ttt reads up to {_VERSION}"
        )
    step, files = state.get("step"), state.get("files")
    match = _STEP.fullmatch(folder.name)
    if not isinstance(step, int) or not isinstance(files, dict) or (match and int(match[1]) != step):
        raise EnvironmentProblem(f"{folder / TRAINER_STATE}: does not describe this checkpoint")
    for name, record in files.items():
        _require_file(folder / name, record if isinstance(record, dict) else {"bytes": record})
    return Checkpoint(folder, step, state)


def verify_checkpoint(
    checkpoint: Checkpoint, *, only: Collection[str] | None = None, without: Collection[str] = ()
) -> None:
    """Compare the content of a complete checkpoint's files with their checksums; needs no torch.

    Args:
        checkpoint: from `read_checkpoint`, which has compared what is small.
        only: names of the files to compare; None compares all.
        without: names of files that were compared already.

    Raises:
        EnvironmentProblem: a file is not what was written; the message names it.
    """
    for name in checkpoint.state["files"]:
        if name.endswith(".safetensors") and (only is None or name in only) and name not in without:
            verify_tensors(checkpoint.path / name)


def write_record(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the record that makes a folder a checkpoint, after every other file in it.

    Args:
        folder: holds the files.
        step: optimiser steps done.
        state: what else goes into it, as JSON.
    """
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    files = {file.relative_to(folder).as_posix(): _record_of(file) for file in found}
    content = {"format": _FORMAT, "version": _VERSION, "step": step, "files": files, **state}
    write_json(folder / TRAINER_STATE, content)


def _record_of(file: Path) -> dict[str, Any]:
    """What a record keeps of a file: its size, and a checksum of its content."""
    return {"bytes": file.stat().st_size, checksums.KEY: _small_digest(file)}


def _small_digest(file: Path) -> str | None:
    """The checksum of a file without reading much of it: the one in a safetensors header, else that of its bytes."""
    return read_header(file).checksum if file.suffix == ".safetensors" else checksums.file_digest(file)


def _require_file(file: Path, record: Mapping[str, Any]) -> None:
    """Compare a file with its record, as far as that needs no reading of tensors."""
    if not file.is_file():
        raise EnvironmentProblem(f"{file}: missing")
    if file.stat().st_size != record.get("bytes"):
        raise EnvironmentProblem(f"{file}: {file.stat().st_size} bytes, {record.get('bytes')} were written")
    found = None if file.suffix != ".safetensors" else read_header(file).checksum
    if checksums.KEY not in record:  # written before there were checksums
        return
    try:
        found = found or _small_digest(file)
    except OSError as error:
        raise UnreadableError(f"{file}: cannot be read: {error.strerror or error}") from error
    if found != record[checksums.KEY]:
        raise EnvironmentProblem(f"{file}: damaged: its checksum is not the one that was recorded; {DAMAGED}")
