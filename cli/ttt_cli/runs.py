"""`ttt runs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttt_cli.options import is_standard_output
from ttt_cli.terminal import show_note, show_warning, width_of

if TYPE_CHECKING:
    from ttt.runs.table import Table

_FORMATS = ("table", "csv", "html")
_PICTURES = (".png", ".svg")


def runs(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder with runs in it, at any depth.")] = "runs",
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="table|csv|html",
            help="csv has every number in full; html is one file that sorts itself and shows the curves. [default: by "
            "the ending of --out, else table]",
            show_default=False,
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option("--sort", metavar="KEY", help="By a column, as loss, eval_gain or train.lr. [default: run]"),
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="The last first.")] = False,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Where the table goes. [default: standard output]")
    ] = None,
    picture: Annotated[
        str | None,
        typer.Option("--picture", metavar="FILE", help="Draw the curves of the runs over each other, as .png or .svg."),
    ] = None,
) -> None:
    """Put the runs of a folder side by side, one line a run.

    How each stands, the keys of their configs in which they differ, losses as trained and of the plain backbone
    (`closed`), gates, how far fast weights moved, what `ttt eval` found, parameters that learned, tokens, time. What is
    no run that can be read is named and left out.

    Exit codes: 0 done, 2 wrong usage, 3 no run there, or a file that cannot be written.
    """
    chosen = _format(form, out)
    _require_places(out, picture)
    from ttt.runs.table import table_of

    table = table_of(Path(folder))
    if sort is not None:
        table = table.sorted_by(sort, reverse=reverse)
    elif reverse:
        table = table.reversed()
    text = _text(table, chosen, folder, to_file=out is not None and not is_standard_output(out))
    drawn = None if picture is None else _drawn(table, svg=picture.endswith(".svg"))
    if out is None or is_standard_output(out):
        print(text, end="")
    else:
        _write(Path(out), text.encode("utf-8", "backslashreplace"))
    if picture is not None:
        _write_picture(Path(picture), drawn)
    for note in table.notes:
        show_note(note)
    for left_out in table.left_out:
        show_warning(str(left_out))


_ENDINGS = {"": "table", ".txt": "table", ".csv": "csv", ".html": "html", ".htm": "html"}
"""What the ending of a file means."""


def _format(form: str | None, out: str | None) -> str:
    """The format that is asked for, or that the ending of the file means."""
    from ttt.errors import UsageError

    if form is None:
        ending = "" if out is None or is_standard_output(out) else Path(out).suffix.lower()
        if ending not in _ENDINGS:
            raise UsageError(
                f"--out: {out}: {ending} does not say which format it is to have; write --format, or a file that ends "
                f"in .csv, .html or .txt"
            )
        return _ENDINGS[ending]
    if form not in _FORMATS:
        raise UsageError(f"--format: {form!r} is none of {', '.join(_FORMATS)}")
    return form


def _require_places(out: str | None, picture: str | None) -> None:
    """Refuse files that cannot be written before runs are read."""
    from ttt.errors import UsageError
    from ttt.files import require_place
    from ttt.reading import other_kind

    if picture is not None and not picture.endswith(_PICTURES):
        raise UsageError(f"--picture: {picture}: name a file that ends in {' or '.join(_PICTURES)}")
    for option, file in (("--out", out), ("--picture", picture)):
        if file is None or (option == "--out" and is_standard_output(file)):
            continue
        if other_kind(file) == "a folder":
            raise UsageError(f"{option}: {file}: a folder; name a file in it")
        require_place(Path(file))


def _text(table: Table, form: str, folder: str, *, to_file: bool) -> str:
    if form == "csv":
        from ttt.runs.text import csv_of

        return csv_of(table)
    if form == "html":
        from ttt.runs.page import page_of

        return page_of(table, title=f"Runs in {folder}", picture=_drawn(table, svg=True))
    from ttt.runs.text import text_of

    return f"{text_of(table, width=None if to_file else width_of(sys.stdout))}\n"


def _drawn(table: Table, *, svg: bool) -> bytes | None:
    """The picture of the curves; None if no run has any."""
    from ttt.runs.picture import curves_figure, drawn_runs, picture_bytes

    figure = curves_figure(drawn_runs(table.runs, tell=show_warning))
    return None if figure is None else picture_bytes(figure, svg=svg)


def _write(file: Path, content: bytes) -> None:
    from ttt.files import write_bytes, writing

    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content)
    show_note(f"wrote {file}")


def _write_picture(file: Path, content: bytes | None) -> None:
    if content is None:
        show_warning(f"{file}: is not drawn: no run has a line in its metrics yet")
    else:
        _write(file, content)
