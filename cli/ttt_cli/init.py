"""`ttt init`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt.printable import shell_word
from ttt_cli.options import is_standard_output, require_replaceable
from ttt_cli.terminal import show_note

if TYPE_CHECKING:
    from ttt.plugins import Backbone


def init(
    backbone: Annotated[
        str, typer.Option("--backbone", metavar="NAME", help="Which backbone, as `ttt plugins` lists them.")
    ],
    preset: Annotated[str, typer.Option("--preset", help="Which of the backbone's configs.")] = "demo",
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Where to; - is standard output. [default: NAME.yaml]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented config to start from.

    Its first line lets editors complete and check it, once `ttt schema --out ttt.schema.json` has put the schema beside
    it.
    """
    from ttt.check.json_schema import EDITOR_LINE, SCHEMA_FILE
    from ttt.files import write_text
    from ttt.plugins import get_backbone

    text = EDITOR_LINE + preset_text(get_backbone(backbone), preset)
    if out is not None and is_standard_output(out):
        print(text, end="" if text.endswith("\n") else "\n")
        return
    target = Path(out if out is not None else f"{backbone}.yaml")
    require_replaceable(target, force=force)
    write_text(target, text)
    word = shell_word(target)
    show_note(f"Wrote {target}. Check it with `ttt check {word}`, run it with `ttt train {word}`.")
    schema = target.parent / SCHEMA_FILE
    if not schema.exists():
        show_note(f"For completion in your editor, put the schema beside it: `ttt schema --out {shell_word(schema)}`.")


def preset_text(backbone: Backbone, name: str) -> str:
    """A config that a backbone ships.

    Raises:
        PluginError: the plugin failed when it was asked.
        UsageError: it has no preset of that name; the message lists its presets.
    """
    from ttt.config.spelling import nearest
    from ttt.errors import UsageError

    presets = backbone.presets()
    if name not in presets:
        close = nearest(name, presets)
        hint = f" (did you mean {close!r}?)" if close else ""
        raise UsageError(f"the backbone {backbone.name} has no preset {name!r}{hint}; it has {', '.join(presets)}")
    return presets[name]
