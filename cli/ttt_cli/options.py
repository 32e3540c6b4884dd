"""Options that several commands share."""

from __future__ import annotations

import re
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
