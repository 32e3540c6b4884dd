"""The command `ttt`: its entry point, and how a failure ends it.

Exit codes: 0 done, 1 findings, 2 wrong usage or config, 3 environment (a missing file, weights, disk), 4 non-finite
loss, 130 interrupted. A foreseeable error is one sentence on standard error; a bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ttt_cli import check, diff, import_config, info, init, plugins, schema, train
from ttt_cli.terminal import show_error, show_findings

INTERRUPTED = 130
PIPE_CLOSED = 141  # as a shell reports a program that SIGPIPE ended

HELP = """Test-time-training adapters for sequence models: check a run, train it, look at what came out.

Exit codes: 0 done, 1 findings, 2 wrong usage or config, 3 environment (a missing file, weights, disk), 4 non-finite
loss, 130 interrupted.
"""


class _Commands(TyperGroup):
    """Turns what a command raises into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        from ttt.errors import ConfigError, TTTError

        try:
            return super().invoke(ctx)
        except ConfigError as error:
            if error.findings:
                show_findings(error.findings, stream=sys.stderr)
                show_error(str(error).rsplit("\n", 1)[-1])
            else:
                show_error(str(error))
            raise typer.Exit(error.exit_code) from None
        except TTTError as error:
            show_error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(_silence_output()) from None


app = typer.Typer(
    cls=_Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("init")(init.init)
app.command("check")(check.check)
app.command("diff")(diff.diff)
app.command("import-config")(import_config.import_config)
app.command("schema")(schema.schema)
app.command("plugins")(plugins.plugins)
app.command("info")(info.info)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ttt import __version__

        print(f"ttt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _silence_output() -> int:
    """Let nothing more be written to an output that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ttt` and return its exit code.

    Args:
        arguments: without the program's name; None takes the process's.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to fail
    try:
        app(args=None if arguments is None else list(arguments), prog_name="ttt")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        code = 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _silence_output()
    return code
