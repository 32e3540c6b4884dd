"""`ttt import-weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    from ttt.plugins import get_backbone

    plugin = get_backbone(backbone)
    if not Path(source).exists():
        raise EnvironmentProblem(f"{source}: no such file or folder")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target}: is already there; name a folder that is not")

    from rich.console import Console

    from ttt.train.metrics import say

    console = Console()
    written = plugin.import_weights(Path(source), target, console=console)
    say(console, f"wrote {', '.join(map(str, written))}")
