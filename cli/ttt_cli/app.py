"""The commands of `ttt` and their options, by typer. A command's module is imported when it is asked for."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ttt.printable import as_line
from ttt_cli.outcome import exit_code_of

COMMANDS = {
    "train": "ttt_cli.train:train",
    "submit": "ttt_cli.submit:submit",
    "eval": "ttt_cli.eval:evaluate",
    "sample": "ttt_cli.sample:sample",
    "init": "ttt_cli.init:init",
    "check": "ttt_cli.check:check",
    "diff": "ttt_cli.diff:diff",
    "runs": "ttt_cli.runs:runs",
    "import-config": "ttt_cli.import_config:import_config",
    "import-weights": "ttt_cli.import_weights:import_weights",
    "precompute": "ttt_cli.precompute:precompute",
    "index": "ttt_cli.index:index",
    "schema": "ttt_cli.schema:schema",
    "new-backbone": "ttt_cli.new_backbone:new_backbone",
    "plugins": "ttt_cli.plugins:plugins",
    "info": "ttt_cli.info:info",
    "doctor": "ttt_cli.doctor:doctor",
}
"""The module of each command's function, in the order of the help; its signature gives the options, its docstring the
help."""

HELP = """Test-time-training adapters for sequence models: check a run, train it, look at what came out.

Exit codes: 0 done, 1 findings, 2 wrong usage or config, 3 environment (a missing file, weights, disk), 4 non-finite
loss, 130 interrupted. SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 all interrupt: `ttt train`
finishes its step and saves, a second one stops at once.
"""


class _Lazy(Mapping[str, Any]):
    """The commands by name, each made when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        module, _, function = COMMANDS[name].partition(":")
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name)(getattr(importlib.import_module(module), function))
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Commands(TyperGroup):
    """Turns a command's errors into a sentence and an exit code."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: Any = _Lazy()

    def make_context(self, *args: Any, **keywords: Any) -> Any:
        """Parse the arguments up to the command's name."""
        with _usage_errors_in_one_line():
            return super().make_context(*args, **keywords)

    def invoke(self, ctx: Any) -> None:
        """Parse the command's own arguments and run it."""
        with _usage_errors_in_one_line():
            code = exit_code_of(lambda: super(_Commands, self).invoke(ctx))
        if code:
            raise typer.Exit(code)


@contextlib.contextmanager
def _usage_errors_in_one_line() -> Iterator[None]:
    """Make the text of a usage error safe to print: it quotes arguments that are not understood."""
    try:
        yield
    except Exception as error:
        # each version of typer takes click's exceptions from another module
        if hasattr(error, "format_message"):
            text = as_line(error.format_message())
            error.format_message = lambda: text
        raise


app = typer.Typer(
    cls=_Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
