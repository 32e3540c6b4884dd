"""`ttt import-config`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ttt_cli.options import BackboneName, is_standard_output, require_replaceable
from ttt_cli.terminal import show, show_findings, show_note, width_of


def import_config(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A config of another program.")],
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Write the new config there. [default: standard output]"),
    ] = None,
    backbone: BackboneName = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Turn a config of another program into one of this project.

    Says for each key where it went or why it has no counterpart, and checks the result. What can be read is the
    plugins' to say: ttt-moshi reads moshi-finetune's YAML, ttt-videodit TTT-Video's TOML.

    Exit codes: 0 imported, 1 imported, but the result has errors, 2 nothing that a plugin reads, 3 a file that cannot
    be read or written.
    """
    from ttt.check import check_config
    from ttt.check.importing import import_config as read
    from ttt.check.importing import readers, render_account, write_imported
    from ttt.check.json_schema import EDITOR_LINE
    from ttt.config.findings import has_errors, summary
    from ttt.errors import UsageError
    from ttt.files import write_text
    from ttt.plugins import get_backbone

    target = None if out is None or is_standard_output(out) else Path(out)
    if target is not None:
        require_replaceable(target, force=force)
    if backbone is not None:
        get_backbone(backbone)
    imported = read(_text(old), file=old, backbone=backbone, tell=lambda told: show_note(f"note: {told}"))
    if imported is None:
        wanted = "" if backbone is None else f" as a config for {backbone}"
        raise UsageError(
            f"{old}: no installed plugin reads this file{wanted} (asked: {', '.join(readers()) or 'none'}). ttt-moshi "
            f"reads moshi-finetune's YAML, ttt-videodit TTT-Video's TOML"
        )
    text = EDITOR_LINE + write_imported(imported, origin=old)
    stream = sys.stderr if target is None else sys.stdout
    if target is None:
        print(text, end="")
    else:
        write_text(target, text)
    name = "the new config" if target is None else str(target)
    show(f"{old} ({imported.format})  →  {name}", stream=stream)
    print(file=stream)
    for line in render_account(imported, width=width_of(stream)).split("\n"):
        show(line, stream=stream)
    checked = check_config(name, text=text)
    print(file=stream)
    show_findings(checked.findings, stream=stream)
    show(f"{name}: {summary(checked.findings)}", stream=stream)
    if has_errors(checked.findings):
        raise typer.Exit(1)


def _text(file: str) -> str:
    """The old file's text.

    Raises:
        UsageError: the file is not text, or too large for a config.
        EnvironmentProblem: the file cannot be read.
    """
    from ttt.amounts import show_bytes
    from ttt.check.reading import read_bytes
    from ttt.config.nodes import MAX_BYTES
    from ttt.errors import UsageError
    from ttt.reading import as_text, unreadable

    content = read_bytes(file)
    if len(content) > MAX_BYTES:
        raise UsageError(f"{file}: larger than {show_bytes(MAX_BYTES)}; name a config, they are short")
    try:
        return as_text(content, file)
    except OSError as error:
        raise UsageError(f"{file}: {unreadable(error)}") from None
