"""Files and folders written whole or not at all: under another name first, then put into place in one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from ttt.errors import EnvironmentProblem
from ttt.files.places import free_in_words, replaced_file

TEMPORARY = ".writing-"
"""Start of the names that unfinished files and folders have."""

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn an error of the system, while `what` is written, into one sentence.

    Raises:
        EnvironmentProblem: the disk is full, or the place cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in _FULL or "(os error 28)" in str(error):
            raise EnvironmentProblem(
                f"{what}: no space left on the disk; nothing half written was left there. Free some space "
                f"({free_in_words(what)}) or choose another place"
            ) from error
        cause = getattr(error, "strerror", None) or str(error)
        raise EnvironmentProblem(f"{what}: cannot be written: {cause}") from error


def temporary_beside(path: Path) -> Path:
    """A name in the same folder, and so on the same disk, that nobody else uses and that tells an unfinished file."""
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")


def sync(path: Path) -> None:
    """Make sure that a file or folder is on the disk, so that a later rename cannot get there before it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. If the path is a link, the file that it leads to is written.

    Raises:
        EnvironmentProblem: the disk is full, or the place cannot be written; what was there is still there.
    """
    target = replaced_file(path)
    temporary = temporary_beside(target)
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files whole or not at all. An empty folder that is there is replaced.

    Args:
        path: the folder. If it is a link, the folder that it leads to is written.
        files: contents by path in the folder, as `tests/test_laws.py`.

    Raises:
        EnvironmentProblem: the disk is full, or the place cannot be written; of missing folders above it none was left.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_beside(target)
    missing: list[Path] = []
    with writing(path):
        try:
            missing += [folder for folder in target.parents if not folder.exists()]
            for name, content in files.items():
                file = temporary / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                sync(file)
            sync(temporary)
            os.rename(temporary, target)
            sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in missing:
                with contextlib.suppress(OSError):  # it holds the new folder, or was never made
                    folder.rmdir()
