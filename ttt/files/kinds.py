"""What a file is instead of what was meant, for whoever cannot read it; the signatures are in `ttt.file_kinds`."""

from __future__ import annotations

from pathlib import Path

from ttt.file_kinds import EMPTY, ENOUGH, FileKind, kind_of_start
from ttt.reading import read_start, require_file


def kind_of_file(path: str | Path) -> FileKind | None:
    """What a file is by its first bytes; None if they do not say.

    Raises:
        OSError: it cannot be read, or is a folder, a FIFO, a socket or a device.
    """
    size = require_file(path).st_size
    return kind_of_content(read_start(path, ENOUGH), size, path)


def kind_of_content(start: bytes, size: int, file: str | Path = "FILE") -> FileKind | None:
    """What a file of `size` bytes is that begins with `start`; None if that does not say.

    Args:
        start: its first bytes, some hundreds of them, or all.
        size: of the file, in bytes.
        file: its name, for the commands that make something else of it.
    """
    return EMPTY if size == 0 else kind_of_start(start, file)
