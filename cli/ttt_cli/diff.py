"""`ttt diff`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ttt_cli.options import BackboneName
from ttt_cli.terminal import show, show_error, show_findings, width_of

if TYPE_CHECKING:
    from ttt.check.diff import ConfigDiff


def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="A config file.")],
    right: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    backbone: BackboneName = None,
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON object.")] = False,
) -> None:
    """Say what differs between two configs, defaults included.

    They are compared as a run sees them, however they are written: keys grouped by section, then the findings that only
    one of the two has.

    Exit codes: 0 no difference, 1 differences, 2 a config that means nothing, 3 a file that cannot be read.
    """
    from ttt.check import check_config
    from ttt.check.diff import diff_configs, render_json
    from ttt.errors import UsageError

    checked = [check_config(name, backbone=backbone) for name in (left, right)]
    unclear = [each for each in checked if each.config is None]
    for each in unclear:
        show_findings(each.findings, stream=sys.stderr)
        show_error(f"{each.source.file}: cannot be compared before these errors are mended")
    if unclear:
        raise typer.Exit(UsageError.exit_code)
    compared = diff_configs(*checked)
    if as_json:
        print(render_json(compared))
    else:
        _show(compared)
    if compared:
        raise typer.Exit(1)


def _show(compared: ConfigDiff) -> None:
    from ttt.check.diff import render_values

    if not compared:
        show(f"{compared.left} and {compared.right} are the same run")
        return
    show(f"{compared.left}  →  {compared.right}", style="1")
    if compared.values:
        print()
        for line in render_values(compared, width=width_of(sys.stdout)).split("\n"):
            show(line)
    for name, findings in ((compared.left, compared.only_left), (compared.right, compared.only_right)):
        if findings:
            print()
            show(f"found in {name} only:", style="1")
            show_findings(findings, stream=sys.stdout)
