"""Which of several processes says why a run has ended, so that the user reads it once.

Each process that fails posts why to the store in which they met, and looks for a while what the others post. If all
have failed alike, as of a wrong config, the first says it. If one has failed alone, it says so with its rank, and those
that only lost it are silent. If one is gone without a word, the lowest of those that are left says which.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ttt.errors import LostProcessError, OtherProcessError
from ttt.machine import launch_is_incomplete, processes_launched, rank_launched
from ttt.parallel.world import World
from ttt.words import first_line

_PATIENCE_SECONDS = 3.0
"""How long a process waits for what the others post."""
_GONE = ("closed by peer", "reset by peer", "gloo", "nccl", "broken pipe", "timed out", "store")
"""Words in the errors of collectives whose other end is gone."""


@dataclass(frozen=True)
class Verdict:
    """What a process that failed does."""

    speaks: bool
    prefix: str = ""
    """Before its sentence, as `rank 1: `."""
    exit_code: int | None = None
    """Another process's; None is its own."""
    missing: tuple[int, ...] = ()
    """The ranks that posted nothing, if none said why it failed."""


def is_of_a_lost_process(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that of a collective whose other end is gone."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (LostProcessError, OtherProcessError)):
            return True
        if isinstance(error, RuntimeError) and not isinstance(error, (NotImplementedError, RecursionError)):
            from torch import distributed as dist

            told = str(error).lower()
            if isinstance(error, dist.DistError) or ("gloo" in told and any(word in told for word in _GONE)):
                return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def noticing_losses(world: World, when: Callable[[], str]) -> Iterator[None]:
    """A context in which the error of a collective whose other end is gone becomes one sentence.

    Raises:
        LostProcessError: another process is gone.
    """
    try:
        yield
    except Exception as error:
        if world.alone or isinstance(error, (LostProcessError, OtherProcessError)) or not is_of_a_lost_process(error):
            raise
        raise LostProcessError(
            f"another process of the run is gone, so it ended {when()}; --resume goes on from the last checkpoint"
        ) from error


def verdict(error: BaseException) -> Verdict:
    """What this process does about its error; waits up to `_PATIENCE_SECONDS` for the others."""
    rank, size = rank_launched(), processes_launched()
    if launch_is_incomplete():  # nobody can be met, and each says so
        return Verdict(True)
    post = {
        "lost": is_of_a_lost_process(error),
        "relayed": isinstance(error, OtherProcessError),
        "told": first_line(error),
        "code": getattr(error, "exit_code", 1),
    }
    try:
        posts = _exchanged(post, rank, size)
    except Exception:  # the store went with the process that held it, which is the first
        speaks = rank == 1 and not post["relayed"] if post["lost"] else True
        return Verdict(speaks, prefix=f"rank {rank}: ", missing=(0,))
    failed = [other for other, each in posts.items() if not each["lost"]]
    speaker = min(failed or posts)
    if not failed:
        return Verdict(rank == speaker, missing=tuple(other for other in range(size) if other not in posts))
    told = {each["told"] for each in posts.values() if not each["relayed"]}
    alike = len(posts) == size and len(told) == 1  # a wrong config, or what the first did for all
    return Verdict(rank == speaker, "" if alike else f"rank {rank}: ", int(posts[speaker]["code"]))


def _exchanged(post: dict[str, Any], rank: int, size: int) -> dict[int, dict[str, Any]]:
    """Post, and read what is posted until all have or patience ends."""
    store = _store()
    store.set(_key(rank), json.dumps(post))
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        there = [other for other in range(size) if other == rank or store.check([_key(other)])]
        if len(there) == size or time.monotonic() > until:
            break
        time.sleep(0.05)
    posts = {other: json.loads(store.get(_key(other))) for other in there}
    if rank == 0:
        time.sleep(0.3)  # it may hold the store, and the others still read
    return posts


def _key(rank: int) -> str:
    return f"ttt/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _store() -> Any:
    """The store in which the processes met, or will."""
    from torch import distributed as dist

    from ttt.parallel.joining import met_in

    if (store := met_in()) is not None:
        return store
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank_launched() == 0 and not held,
        wait_for_workers=False,
        timeout=timedelta(seconds=10 * _PATIENCE_SECONDS),
    )
