"""`ttt index`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt_cli.options import BackboneName, require_replaceable
from ttt_cli.terminal import show_note

if TYPE_CHECKING:
    from ttt.plugins import Indexing


def index(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder of sound files, at any depth.")],
    out: Annotated[str, typer.Option("--out", metavar="FILE.jsonl", help="Where to; paths in it start at its folder.")],
    backbone: BackboneName = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Leave out files that cannot be read, and name them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the list of recordings that training reads, of a folder of sound files.

    A line holds the path and the measured length of a file. Folders in Libri-Light's layout, speaker/book/chapter.flac,
    are read as any other.
    """
    from rich.console import Console

    from ttt.errors import UsageError
    from ttt.files import require_place
    from ttt.indexing import write_index
    from ttt.printable import shell_word

    target = Path(out)
    if target.suffix.lower() != ".jsonl":
        raise UsageError(f"{out}: an index is a .jsonl file; write --out {shell_word(target.with_suffix('.jsonl'))}")
    require_replaceable(target, force=force)
    require_place(target)
    try:
        write_index(_indexing(backbone), Path(folder), target, leave_out=leave_out, console=Console())
    except KeyboardInterrupt:
        show_note("interrupted; nothing was written")
        raise
    show_note(f"Read it with `data: {{train_data: {target}}}`; without transcripts, with `format: audio` beside it.")


def _indexing(name: str | None) -> Indexing:
    """The backbone of that name; without a name, the only installed one that can make an index.

    Raises:
        UsageError: it cannot, or there is not one.
    """
    from ttt.errors import UsageError
    from ttt.plugins import Indexing, capability, discover, get_backbone, has_capability

    if name is not None:
        return capability(get_backbone(name), Indexing)
    able = [plugin.name for plugin in discover() if has_capability(plugin.backbone, Indexing)]
    if len(able) != 1:
        known = f"those that can make an index are {', '.join(able)}" if able else "none that is installed can"
        raise UsageError(f"name the backbone whose data it is, with --backbone; {known}")
    return capability(get_backbone(able[0]), Indexing)
