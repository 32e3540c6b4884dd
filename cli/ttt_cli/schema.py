"""`ttt schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt_cli.options import is_standard_output, require_replaceable
from ttt_cli.terminal import show_note

if TYPE_CHECKING:
    from ttt.plugins import Backbone


def schema(
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", metavar="NAME", help="For one backbone. [default: all that are installed]"),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Write it there, over an older schema; without, print it."),
    ] = None,
) -> None:
    """Print the JSON schema of configs, for editors.

    Plugins' options are included. Editors complete and check configs by the schema. The configs of `ttt init` name it
    in their first line, as a file beside them: run `ttt schema --out ttt.schema.json` in the folder of your configs,
    and again when plugins come or go.
    """
    from ttt.check.json_schema import json_schema
    from ttt.files import write_text
    from ttt.plugins import get_backbone
    from ttt.printable import json_text

    backbones = _all_that_work() if backbone is None else [get_backbone(backbone)]
    text = json_text(json_schema(backbones)) + "\n"
    if out is None or is_standard_output(out):
        print(text, end="")
        return
    target = Path(out)
    _refuse_other_files(target)
    write_text(target, text)
    show_note(f"Wrote {target}. Configs beside it find it by the line `# yaml-language-server: $schema={target.name}`.")


def _all_that_work() -> list[Backbone]:
    """Every installed backbone that works; prints a note about each that does not.

    Raises:
        EnvironmentProblem: no backbone works.
    """
    from ttt.check.json_schema import json_schema
    from ttt.errors import EnvironmentProblem, PluginError
    from ttt.plugins import discover

    working = []
    for plugin in discover():
        try:
            if plugin.backbone is None:
                raise PluginError(f"the backbone {plugin.name} is broken: {plugin.error}")
            json_schema([plugin.backbone])
            working.append(plugin.backbone)
        except PluginError as error:
            show_note(f"note: left out: {error}")
    if not working:
        raise EnvironmentProblem("no backbone is installed that works; install one, as `pip install ttt-moshi`")
    return working


def _refuse_other_files(target: Path) -> None:
    """Refuse to overwrite a file that `ttt schema` did not write."""
    from ttt.check.json_schema import COMMENT
    from ttt.errors import UsageError
    from ttt.reading import MAX_JSON, read_file

    require_replaceable(target, force=True)
    try:
        ours = not target.exists() or json.loads(read_file(target, limit=MAX_JSON)).get("$comment") == COMMENT
    except (OSError, ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise UsageError(f"{target}: is already there, and is not a schema of `ttt schema`; name another file")
