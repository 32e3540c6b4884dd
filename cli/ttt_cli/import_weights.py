"""`ttt import-weights`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ttt_cli.options import require_new_folder
from ttt_cli.terminal import show


def import_weights(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Another program's checkpoint, a file or a folder.")],
    backbone: Annotated[
        str, typer.Option("--backbone", metavar="NAME", help="Whose it is, as `ttt plugins` lists them.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where to; a folder that is not there yet.")],
) -> None:
    """Turn another program's weights into this project's files.

    Says for each tensor where it went or why it was left out.
    """
    from ttt.errors import EnvironmentProblem, UsageError
    from ttt.files import require_place
    from ttt.plugins import WeightImport, capability, get_backbone
    from ttt.reading import other_kind

    importer = capability(get_backbone(backbone), WeightImport)
    kind = other_kind(source)
    if kind not in (None, "a folder"):
        raise UsageError(f"{source}: is {kind}; name a checkpoint's file or folder")
    if not os.path.exists(source):
        raise EnvironmentProblem(f"{source}: no such file or folder")
    target = Path(out)
    require_new_folder(target)
    require_place(target)
    show(f"reading {source}")
    sys.stdout.flush()  # importing the libraries takes seconds
    from rich.console import Console

    console = Console()
    written = importer.import_weights(Path(source), target, console=console)
    from ttt.printable import say

    say(console, f"wrote {', '.join(map(str, written))}")
