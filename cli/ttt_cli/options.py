"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the config; can be repeated."),
]
BackboneName = Annotated[
    str | None, typer.Option("--backbone", metavar="NAME", help="Which backbone, as `ttt plugins` lists them.")
]
