"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the config; can be repeated."),
]
BackboneName = Annotated[
    str | None, typer.Option("--backbone", metavar="NAME", help="Which backbone, as `ttt plugins` lists them.")
]

Verify = Annotated[
    bool,
    typer.Option("--verify/--no-verify", help="Compare files with their checksums, which reads them once more."),
]


def is_standard_output(out: str) -> bool:
    """Whether `--out` means standard output: `-`, or a path of it."""
    return out in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def require_new_folder(target: Path) -> None:
    """Refuse a place for a folder where anything is but an empty one.

    Raises:
        UsageError: something is there.
    """
    from ttt.errors import UsageError

    if os.path.lexists(target) and not target.is_dir():
        raise UsageError(f"{target}: is already there, and is no folder; name one that is new or empty with --out")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"{target}: is already there, and not empty; name a folder that is new or empty with --out")


def require_replaceable(target: Path, *, force: bool) -> None:
    """Refuse to overwrite a file unless `force` is given, and anything else always.

    Raises:
        UsageError: something exists at the path; the message says what, and what to do.
    """
    from ttt.errors import UsageError
    from ttt.files import replaced_file
    from ttt.reading import other_kind

    if other_kind(target) == "a folder":
        raise UsageError(f"{target}: a folder; name a file in it")
    replaced_file(target)
    if target.exists() and not force:
        raise UsageError(f"{target}: is already there; write another file with --out, or replace it with --force")


def require_free(file: Path, *, overwrite: bool) -> None:
    """Refuse to replace files without `--overwrite`, and folders always.

    Raises:
        UsageError: a file exists already, or is a folder.
    """
    from ttt.errors import UsageError

    require_replaceable(file, force=True)
    if file.exists() and not overwrite:
        raise UsageError(f"{file}: is already there; name another --out, or replace it with --overwrite")
