"""Whether an evaluation reads what training reads: the same file under any name, or one inside the other's folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def overlap(evaluated: str, trained: Iterable[str]) -> str | None:
    """What a source of held-out data has to do with those of training, as the rest of a sentence; None if nothing.

    Folders are read at any depth, so a file in a folder is read with it.

    Args:
        evaluated: a source of the evaluation, as the config names it.
        trained: those of training.
    """
    return next((told for source in trained if (told := _overlap_of_two(evaluated, source)) is not None), None)


def _overlap_of_two(evaluated: str, trained: str) -> str | None:
    try:
        ours, theirs = Path(os.path.realpath(evaluated)), Path(os.path.realpath(trained))
        one = ours == theirs or (ours.exists() and theirs.exists() and ours.samefile(theirs))
    except (OSError, ValueError):  # a name that no file can have
        return "is" if evaluated == trained else None
    if one:
        return "is" if evaluated == trained else f"is {trained!r}, which is"
    if theirs in ours.parents:
        return f"lies in {trained!r}, which is"
    return f"holds {trained!r}, which is" if ours in theirs.parents else None


def shared(evaluated: Iterable[str], trained: Iterable[str]) -> int:
    """How many of the recordings of an evaluation are recordings of training too, whatever lists name them."""
    known = {os.path.realpath(file) for file in trained}
    return sum(os.path.realpath(file) in known for file in evaluated)
