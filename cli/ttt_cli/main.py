"""The command `ttt`: its entry point, and the code that it ends with.

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
    # `train` ends when it has saved; nothing else has anything to lose
    with Interrupt(at_once=words[:1] != ["train"], own_process=arguments is None) as interrupt:
        try:
            code = _main(words, own_process=arguments is None)
        except KeyboardInterrupt:
            return INTERRUPTED
        return INTERRUPTED if interrupt.requested and code == 0 else code


def _main(words: list[str], *, own_process: bool) -> int:
    import gc

    from ttt_cli.outcome import flush_output

    # Plugins of pydantic watch validations, and to look for them it reads what every installed distribution declares.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if own_process:
        _open_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter must not stop the command
    short = own_process and names_files_only(words)
    if short:
        gc.disable()  # it is over before a collection, of modules mostly, could pay
    code = _run(words)
    if short:
        gc.freeze()  # nor would the one at the end
    return flush_output(code, lasting=words[:1] == ["train"])


def _open_closed_streams() -> None:
    """Where a process was started with a standard stream closed, the next file it opens would stand in for it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
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
        if type(end.__context__).__name__ == "Abort":  # typer's word for a KeyboardInterrupt
            return INTERRUPTED
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def names_files_only(words: Sequence[str]) -> bool:
    """Whether a command line is `ttt check FILE…` without any option.

    Editors and hooks run that for every file that is saved. There is nothing to parse in it, and importing typer would
    take about as long as the check.
    """
    command, *rest = words or [""]
    return command == "check" and bool(rest) and not any(word.startswith("-") and word != "-" for word in rest)
