"""`ttt check`."""

from __future__ import annotations

import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ttt_cli.options import BackboneName, Overrides
from ttt_cli.terminal import show_error, show_findings

if TYPE_CHECKING:
    from ttt.config import Finding


class Format(str, Enum):
    """How findings are printed."""

    TEXT = "text"
    JSON = "json"


def check(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="Config files.")],
    backbone: BackboneName = None,
    overrides: Overrides = None,
    output: Annotated[Format, typer.Option("--format", help="Text for people, or JSON.")] = Format.TEXT,
) -> None:
    """Say what is wrong with a config before it costs a run. Exits with 1 where there are errors."""
    from ttt.config import load_config, render_json
    from ttt.config.diagnostics import has_errors, summary
    from ttt.errors import ConfigError, EnvironmentProblem

    everything: list[Finding] = []
    unread = 0
    for config in configs:
        try:
            findings = load_config(config, backbone=backbone, overrides=overrides or []).findings
        except ConfigError as error:
            findings = error.findings
        except EnvironmentProblem as problem:
            show_error(str(problem))
            unread = problem.exit_code
            continue
        everything.extend(findings)
        if output is Format.TEXT:
            show_findings(findings, stream=sys.stdout)
            print(f"{config}: {summary(findings)}")
    if output is Format.JSON:
        print(render_json(everything))
    code = unread or int(has_errors(everything))
    if code:
        raise typer.Exit(code)
