"""Reading a config file from the disk."""

from __future__ import annotations

from pathlib import Path

from ttt.checkpoint_folder import CHECKPOINTS
from ttt.config.nodes import MAX_BYTES
from ttt.config.paths import moved_along, noted_folder
from ttt.config.schema import RunConfig
from ttt.config.source import Source, parse_source
from ttt.errors import EnvironmentProblem
from ttt.reading import read_start, unreadable


def read_source(path: str | Path) -> Source:
    """Read a config file.

    Raises:
        EnvironmentProblem: there is no such file, or it cannot be read.
    """
    return parse_source(read_bytes(path), file=str(path))


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a config file. If it is too large, its beginning: enough for `parse_source` to say so.

    Raises:
        EnvironmentProblem: there is no such file, or it cannot be read.
    """
    try:
        return read_start(path, MAX_BYTES + 1)
    except FileNotFoundError:
        raise EnvironmentProblem(f"{path}: no such file; name a config, or write one with `ttt init`") from None
    except IsADirectoryError:
        raise EnvironmentProblem(f"{path}: a folder; name the config file in it") from None
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be read: {unreadable(error)}") from error


def found_again(config: RunConfig, file: Path) -> RunConfig:
    """A run's config with the paths that are where they were beside the run's folder, if that was moved with them."""
    folder = file.parent
    if file.name != "config.yaml" or not (folder / CHECKPOINTS).is_dir():
        return config
    try:
        before = noted_folder(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return config
    return config if before is None else moved_along(config, before=before, now=str(folder))
