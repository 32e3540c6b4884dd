"""The command `ttt`: its entry point, and the code that it ends with.

Exit codes: 0 done, 1 findings, 2 wrong usage or config, 3 environment (a missing file, weights, disk), 4 non-finite
loss, 130 interrupted. A foreseeable error is one sentence on standard error; a bug keeps its traceback.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

from ttt_cli.outcome import exit_code_of, silence_output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ttt` and return its exit code.

    Args:
        arguments: without the program's name; None takes the process's.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    # Plugins of pydantic watch validations, and to look for them it reads what every installed distribution declares.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to fail
    short = arguments is None and names_files_only(words)
    if short:
        gc.disable()  # it is over before a collection, of modules mostly, could pay
    try:
        code = _run(words)
        if short:
            gc.freeze()  # nor would the one at the end
        sys.stdout.flush()
    except BrokenPipeError:
        return silence_output()
    return code


def _run(words: list[str]) -> int:
    if names_files_only(words):
        from ttt_cli.checking import check_files

        return exit_code_of(lambda: check_files(words[1:]))
    from ttt_cli.app import app

    try:
        app(args=words, prog_name="ttt")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def names_files_only(words: Sequence[str]) -> bool:
    """Whether a command line is `ttt check FILE…` without any option.

    Editors and hooks run that for every file that is saved. There is nothing to parse in it, and importing typer would
    take about as long as the check.
    """
    command, *rest = words or [""]
    return command == "check" and bool(rest) and not any(word.startswith("-") and word != "-" for word in rest)
