"""`ttt train` in several processes: started and watched by one, or each by another launcher.

The first process prints what one process would. The others are silent, and an error reaches the user once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

import typer


def require_number(count: int | None, *, most: int | None = None) -> None:
    """Refuse a number of processes that cannot be started.

    Raises:
        UsageError: it is below 1, or above `most`.
    """
    from ttt.errors import UsageError

    if count is not None and count < 1:
        raise UsageError(f"--nproc {count}: a run has at least one process; leave --nproc out for one")
    if count is not None and most is not None and count > most:
        raise UsageError(f"--nproc {count}: at most {most:,} processes")


@contextlib.contextmanager
def as_launcher_of(count: int) -> Iterator[None]:
    """A context in which configs are checked as of one of so many processes.

    Raises:
        UsageError: this process is one of several already.
    """
    from ttt.errors import UsageError
    from ttt.machine import processes_launched

    if processes_launched() > 1:
        raise UsageError(
            f"--nproc {count}: this is one of {processes_launched()} processes of a launch already; leave --nproc out, "
            f"or start ttt by itself"
        )
    told = {"WORLD_SIZE": str(count), "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    before = dict(os.environ)
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


def run_in_processes(count: int) -> NoReturn:
    """Run this process's own command line in several processes, and end as they do.

    Raises:
        Exit: with the exit code of the one that failed first.
        LostProcessError: one was killed.
    """
    from ttt.errors import LostProcessError
    from ttt.interrupt import INTERRUPTED
    from ttt.parallel.launching import LOST_SECONDS, launch

    sys.stdout.flush()
    ended = launch(_without_nproc(sys.argv[1:]), count)
    if ended.told and not ended.signalled:
        sys.stderr.write(ended.told)
    if ended.killed_by is None or ended.signalled:
        raise typer.Exit(INTERRUPTED if ended.signalled and ended.exit_code else ended.exit_code)
    raise LostProcessError(
        f"rank {ended.rank} was killed by {ended.killed_by}, and the others were ended within {LOST_SECONDS} s; the "
        f"last checkpoint is whole: --resume goes on from it"
    )


def _without_nproc(words: list[str]) -> list[str]:
    """A command line without `--nproc N` or `--nproc=N`."""
    kept, skip = [], False
    for word in words:
        if skip or word.startswith("--nproc="):
            skip = False
        elif word == "--nproc":
            skip = True
        else:
            kept.append(word)
    return kept


@contextlib.contextmanager
def told_by_launcher() -> Iterator[None]:
    """Inside, a process that `--nproc` started repeats nothing of what its launcher has shown already."""
    from ttt.parallel.launching import LAUNCHER

    with contextlib.ExitStack() as quiet:
        if os.environ.get(LAUNCHER):
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        yield


@contextlib.contextmanager
def as_one_of_several() -> Iterator[None]:
    """Inside, a process that is not the first prints nothing; an error is told by one process alone.

    Alone, nothing happens.

    Raises:
        Exit: another process tells the error; with that one's exit code.
    """
    from ttt.machine import processes_launched, rank_launched

    if processes_launched() == 1:
        yield
        return
    # before torch is imported: DDP warns in every process if a step happens to use every parameter
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with contextlib.ExitStack() as quiet:
        if rank_launched() > 0:
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
            quiet.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        try:
            yield
        except KeyboardInterrupt:
            raise
        except Exception as error:
            _end(error)
            raise


def _end(error: Exception) -> None:
    """Leave the error to another process, or add to it what the user has to know.

    Raises:
        Exit: another process tells it.
        LostProcessError: another process is gone without a word.
    """
    from ttt.errors import LostProcessError, TTTError
    from ttt.parallel.board import is_of_a_lost_process, verdict
    from ttt.parallel.launching import LAUNCHER

    said = verdict(error)
    lost = is_of_a_lost_process(error)
    if not said.speaks or (lost and os.environ.get(LAUNCHER)):  # the launcher knows which process it was, and how
        raise typer.Exit(LostProcessError.exit_code if said.exit_code is None else said.exit_code)
    if lost:
        ranks = ", ".join(map(str, said.missing)) or "unknown"
        which = f"rank {ranks}" if len(said.missing) == 1 else f"one of the ranks {ranks}"
        raise LostProcessError(
            f"{which} is gone without a word, so the run has ended; the last checkpoint is whole: --resume goes on "
            f"from it"
        ) from error
    if said.prefix and isinstance(error, TTTError):
        error.args = (f"{said.prefix}{error.args[0] if error.args else ''}", *error.args[1:])
