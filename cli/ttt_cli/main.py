"""The command `ttt`: its entry point and its exit code.

Exit codes: 0 done, 1 findings, 2 wrong usage or config, 3 environment (a missing file, weights, disk), 4 non-finite
loss, 130 interrupted by SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 or SIGUSR2. A foreseeable error is one sentence on
standard error; a bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ttt.interrupt import INTERRUPTED, Interrupt  # alone: signals are handled before anything else is imported


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ttt` and return its exit code.

    Args:
        arguments: without the program's name; None takes the process's.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    # `train` saves before it ends; no other command has anything to lose
    with Interrupt(at_once=words[:1] != ["train"], own_process=arguments is None) as interrupt:
        try:
            code = _main(words, own_process=arguments is None)
        except KeyboardInterrupt:
            return INTERRUPTED
        return INTERRUPTED if interrupt.requested and code == 0 else code


def _main(words: list[str], *, own_process: bool) -> int:
    import gc

    from ttt_cli.outcome import flush_output

    # Without this pydantic looks for plugins of its own, and reads the metadata of every installed distribution for it.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if own_process:
        _open_closed_streams()
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        from ttt.slurm import take_torchrun_variables

        take_torchrun_variables()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter must not stop the command
    short = own_process and names_files_only(words)
    if short:
        gc.disable()  # the process ends before a collection, mostly of modules, could pay
    code = _run(words)
    if short:
        gc.freeze()  # skip the collection at exit too
    return flush_output(code, lasting=words[:1] == ["train"])


def _open_closed_streams() -> None:
    """Open standard streams that were closed at the start; else the next file to be opened would take their place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - for as long as the process
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _run(words: list[str]) -> int:
    from ttt_cli.outcome import exit_code_of

    if names_files_only(words):
        from ttt_cli.check_files import check_files

        return exit_code_of(lambda: check_files(words[1:]))
    from ttt_cli.app import app

    try:
        app(args=words, prog_name="ttt")
    except SystemExit as end:
        if type(end.__context__).__name__ == "Abort":  # typer turns a KeyboardInterrupt into this
            return INTERRUPTED
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def names_files_only(words: Sequence[str]) -> bool:
    """Whether a command line is `ttt check FILE…` without any option.

    Editors and hooks run this for every saved file. It has no options to parse, and importing typer would take about as
    long as the check.
    """
    command, *rest = words or [""]
    return command == "check" and bool(rest) and not any(word.startswith("-") and word != "-" for word in rest)
