"""What sentences are put together from: the first few of several things, an error's first line, a duration.

A message that lists everything hides what it says. This module imports nothing of the rest, and nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_few(things: Sequence[object], most: int = 3, *, separator: str = ", ") -> str:
    """The first few of several things in one phrase, and how many more there are: "a, b, c and 2 more".

    Args:
        things: in the order in which they are told.
        most: how many are told.
        separator: between two of them.
    """
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return separator.join(str(thing) for thing in things[:most]) + more


def first_entries(things: Sequence[str], most: int) -> list[str]:
    """The first few of several things, and as the last entry how many more there are, "and 2 more"."""
    return [*things[:most], *([f"and {len(things) - most} more"] if len(things) > most else [])]


def first_line(error: BaseException, *, otherwise: str | None = None) -> str:
    """The first line of what an error says.

    Args:
        error: whatever was raised.
        otherwise: what to tell if it says nothing; None is the name of its class.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__ if otherwise is None else otherwise


def duration_in_words(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
