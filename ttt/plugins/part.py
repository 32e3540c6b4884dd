"""The part of a piece of work that this process does, beside others that a launcher started with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ttt.errors import EnvironmentProblem
from ttt.slurm import torchrun_variables

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The part of a process among `size` of them. What parts do, they do without each other."""

    rank: int = 0
    """This process among all, from 0."""
    size: int = 1

    @classmethod
    def of_launch(cls, environ: Mapping[str, str] = os.environ) -> Part:
        """As torchrun's variables have it, or srun's; all of it if there was no launcher.

        Raises:
            ttt.errors.EnvironmentProblem: there are several processes, and which this one is is not told.
        """
        told = {**environ, **torchrun_variables(environ)}
        rank, size = (_whole(told.get(name)) for name in ("RANK", "WORLD_SIZE"))
        if size is None or size < 2:
            return cls()
        if rank is None or rank >= size:
            given = f"RANK={told['RANK']}" if told.get("RANK") else "no RANK"
            raise EnvironmentProblem(
                f"WORLD_SIZE={size}, but {given}: ranks count from 0 to {size - 1}; start it with --nproc or torchrun, "
                f"or unset WORLD_SIZE"
            )
        return cls(rank, size)

    def of(self, things: Sequence[T]) -> list[T]:
        """This process's things: every `size`-th one, so that those that are done are spread evenly."""
        return list(things[self.rank :: self.size])

    def in_words(self) -> str:
        """What follows a sentence about it; empty if it is all of the work."""
        return "" if self.size == 1 else f" (part {self.rank + 1} of {self.size})"


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else None
