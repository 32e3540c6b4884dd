"""Compares the files of a run, a checkpoint or an adapter that are read again with their checksums."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

from ttt import checksums
from ttt.adapter_file import BACKBONE, MODEL, AdapterInfo, verify_adapter
from ttt.checkpoint_folder import CHECKPOINTS, TRAINER_STATE, newest_checkpoint, read_checkpoint, verify_checkpoint
from ttt.errors import DamagedFileWarning, EnvironmentProblem
from ttt.files import read_json
from ttt.train.claim import METRICS, SUMMARY
from ttt.train.stored_config import CONFIG, StoredConfig


def verify_files(info: AdapterInfo, path: Path) -> None:
    """Compare the files of an adapter, of its checkpoint and of its run with their checksums.

    Needs no torch.

    Args:
        info: the adapter's info, read from `path`.
        path: the adapter's file or folder, or a run's folder; for a run, its own files are compared too, and
            checkpoints that were passed over are named.

    Raises:
        EnvironmentProblem: files differ from what was written; the message names each.
    """
    folder = info.path.parent
    is_run = path.is_dir() and folder.parent == path / CHECKPOINTS
    problems = list(newest_checkpoint(path).passed_over) if is_run else []
    problems += _problems(lambda: verify_adapter(info))
    if (folder / TRAINER_STATE).is_file():
        others = _checkpoint_problems(folder)
        problems += [problem for problem in others if problem not in problems]
    if path.is_dir() and (path / CONFIG).is_file():
        problems += _problems(lambda: (path / SUMMARY).is_file() and read_json(path / SUMMARY, sealed=True))
        problems += _metrics_problems(path / METRICS)
        if StoredConfig(path).is_as_written() is False:
            warnings.warn(f"{path / CONFIG} is not as the run wrote it", DamagedFileWarning, stacklevel=2)
    if problems:
        raise EnvironmentProblem("; ".join(problems))


def _checkpoint_problems(folder: Path) -> list[str]:
    def compare() -> None:
        verify_checkpoint(read_checkpoint(folder), without=(MODEL, BACKBONE))

    return _problems(compare)


def _metrics_problems(path: Path) -> list[str]:
    """The damage in a `metrics.jsonl`: its first few damaged lines."""
    found = []
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                checksums.parse_line(line)
            except ValueError as error:
                if line.endswith(b"\n"):  # if not, a crash cut the line short
                    found.append(f"{path}:{number}: {error}")
    return [*found[:5], f"{len(found) - 5} lines more of it"] if len(found) > 5 else found


def _problems(look: Callable[[], object]) -> list[str]:
    try:
        look()
    except EnvironmentProblem as problem:
        return [str(problem)]
    return []
