"""Work in a folder beside other processes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ttt.files.atomic import TEMPORARY
from ttt.files.places import replaced_file


@contextlib.contextmanager
def beside_others(folder: Path) -> Iterator[None]:
    """A context for work in a folder beside other processes; if there are none, it first removes half-written files."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with replaced_file(folder / ".lock").open("a") as file:
        with contextlib.suppress(OSError):  # others are at work, or the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # safetensors names what it is writing `.tmp` and six letters; here only what is ours was written so
            for left in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(".tmp??????")):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """A context that only one process is in at a time; others wait. A file system without locks keeps nobody out."""
    with replaced_file(path).open("a") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
