"""How far a piece of work is: a bar on a terminal; plain lines elsewhere, so that a log stays readable."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from ttt.printable import say
from ttt.words import duration_in_words

T = TypeVar("T")


def live_bar(console: Console, what: str, *columns: ProgressColumn) -> Progress | None:
    """A bar as wide as the terminal, not started yet; None if the console is not a terminal that can redraw a line.

    Args:
        console: where to.
        what: stands before the bar.
        columns: stand after it and the count; none is the time that is left.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    return Progress(
        TextColumn(what),
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
    """

    def __init__(self, console: Console, what: str, *, total: int, tenths: bool = False) -> None:
        self.completed = 0
        """Steps that are done."""
        self._console = console
        self._what = what
        self._total = total
        self._tenths = tenths
        self._started = time.monotonic()
        self._bar = live_bar(console, what)
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Steps:
        self._started = time.monotonic()
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
            left = (time.monotonic() - self._started) / self.completed * (self._total - self.completed)
            self.line(f"{self._what}: step {self.completed}/{self._total}, {duration_in_words(left)} left")

    def counted(self, things: Iterable[T]) -> Iterator[T]:
        """The things, each counted as a step when the next one is asked for."""
        for thing in things:
            yield thing
            self.advance()

    def line(self, text: str) -> None:
        """Say a line, if there is no bar."""
        if self._bar is None:
            say(self._console, text)

    def _is_told(self, before: int) -> bool:
        done, total = self.completed, self._total
        return before == 0 or done == total or done * 10 // total > before * 10 // total
