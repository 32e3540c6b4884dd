"""How far a piece of work is: a bar on a terminal; plain lines elsewhere, so that a log stays readable."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from ttt.printable import say
from ttt.words import duration_in_words

T = TypeVar("T")
_TELL_SECONDS = 10.0
"""Seconds between two lines about one step, if there is no bar."""


def live_bar(console: Console, *columns: ProgressColumn) -> Progress | None:
    """A bar as wide as the terminal, not started yet; None if the console is not a terminal that can redraw a line.

    The description of its task stands before it.

    Args:
        console: where to.
        columns: stand after it and the count; none is the time that is left.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),  # takes what the numbers leave
        MofNCompleteColumn(),
        *(columns or (TimeRemainingColumn(),)),
        console=console,
        expand=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


class Steps:
    """Counts steps: in a bar on a terminal; elsewhere in a line for about every tenth of them, if asked for.

    Args:
        console: where to.
        what: what is done, or what is counted: "sample", "frames".
        total: how many steps there are.
        tenths: without a bar, say a line at the first step, the last, and each tenth of them. If not, whoever counts
            says lines of its own by `line`.
        done: how many were done before. They took no time of now, so they tell nothing about what is left.
        rated: what a step is, as "item", if lines and bar shall say how many of them are done in a second.
    """

    def __init__(
        self,
        console: Console,
        what: str,
        *,
        total: int,
        tenths: bool = False,
        done: int = 0,
        rated: str | None = None,
    ) -> None:
        self.completed = done
        """Steps that are done."""
        self._done_before = done
        self._rated = rated
        self._console = console
        self._what = what
        self._total = total
        self._tenths = tenths
        self._started = self._told = time.monotonic()
        self._bar = live_bar(console, *([] if rated is None else [_Rate(rated), TimeRemainingColumn()]))
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> Steps:
        self._started = self._told = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        before, self.completed = self.completed, self.completed + count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif self._tenths and self._is_told(before):
            self.line(f"{self._what}: {self._rated or 'step'} {self.completed}/{self._total}, {self._pace()}")

    def _pace(self) -> str:
        """How fast it goes, and how long it will take."""
        seconds, done = time.monotonic() - self._started, self.completed - self._done_before
        left = f"{duration_in_words(seconds / done * (self._total - self.completed))} left"
        return left if self._rated is None else f"{_a_second(done / max(seconds, 1e-9), self._rated)}, {left}"

    def counted(self, things: Iterable[T]) -> Iterator[T]:
        """The things, each counted as a step when the next one is asked for."""
        for thing in things:
            yield thing
            self.advance()

    def within(self, text: str) -> None:
        """Say how far the step is that is being done: beside the bar, or in a line if the last is 10 s old."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._what}, {text}")
        elif time.monotonic() - self._told >= _TELL_SECONDS:
            self.line(f"{self._what}: {text}")
            self._told = time.monotonic()

    def line(self, text: str) -> None:
        """Say a line, if there is no bar."""
        if self._bar is None:
            say(self._console, text)

    def _is_told(self, before: int) -> bool:
        done, total = self.completed, self._total
        return before == self._done_before or done == total or done * 10 // total > before * 10 // total


class _Rate(ProgressColumn):
    """How many are done in a second.

    Args:
        what: what one is.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def render(self, task: Task) -> Text:
        """The rate; nothing before the first is done."""
        return Text("" if not task.speed else _a_second(task.speed, self._what))


def _a_second(rate: float, what: str) -> str:
    return f"{rate:.2g} {what}s a second" if rate < 100 else f"{rate:,.0f} {what}s a second"
