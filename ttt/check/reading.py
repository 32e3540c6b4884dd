"""Reading a config file from the disk."""

from __future__ import annotations

from pathlib import Path

from ttt.config.nodes import MAX_BYTES
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
