"""Options that several commands share."""

from __future__ import annotations

import re
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


_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt])(i?)b\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """An amount of memory as people write it: `80GiB`, `24 GB`, `512MiB`.

    Raises:
        ttt.errors.UsageError: it is none.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None or not float(match[1]):
        from ttt.errors import UsageError

        raise UsageError(f"--memory {text}: is no amount of memory; write it as 80GiB or 24GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].casefold()])


def is_standard_output(out: str) -> bool:
    """Whether `--out` means standard output, by the sign for it or by one of its names."""
    return out in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def require_replaceable(target: Path, *, force: bool) -> None:
    """Refuse to write where something is: without `force` to a file, and at all to what is no file.

    Raises:
        UsageError: the message says what is there, and how to go on.
    """
    from ttt.errors import UsageError
    from ttt.files import replaced_file
    from ttt.reading import other_kind

    if other_kind(target) == "a folder":
        raise UsageError(f"{target}: a folder; name a file in it")
    replaced_file(target)
    if target.exists() and not force:
        raise UsageError(f"{target}: is already there; write another file with --out, or replace it with --force")
