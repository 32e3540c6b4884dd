"""The display of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from ttt.amounts import show_bytes
from ttt.printable import say
from ttt.progress import live_bar
from ttt.words import duration_in_words

TELL_SECONDS = 10.0
"""Seconds between two lines about an evaluation if there is no bar; longer if one batch takes longer."""


class Display:
    """The live bar on a terminal, plain lines elsewhere.

    Args:
        console: the console to write to.
        total: optimiser steps of the run.
        done: how many of them are already done.
        log_freq: steps between plain lines.
    """

    def __init__(self, console: Console, *, total: int, done: int, log_freq: int) -> None:
        self._console = console
        self._total = total
        self._first = done
        self._log_freq = log_freq
        self._started = self._evaluating = self._told = time.monotonic()
        self._bar = live_bar(
            console,
            _Text(lambda task: task.fields["told"], "cyan"),
            _Text(lambda task: f"{task.fields['left']} left" if task.fields["left"] else "", "green"),
        )
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=total, completed=done, told="", left="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        say(self._console, text)

    def evaluating(self, done: int, total: int) -> None:
        """Show that an evaluation has read `done` of `total` windows: in the bar, or in a line every `TELL_SECONDS`."""
        now = time.monotonic()
        if done == 0:
            self._evaluating = self._told = now
        text = f"evaluating: {done} of {total} windows"
        if self._bar is not None:
            self._bar.update(self._task, told=text if done < total else "", left="")
        elif 0 < done < total and now - self._told >= TELL_SECONDS:
            left = duration_in_words((now - self._evaluating) / done * (total - done))
            self.say(f"{text}, {left} left")
            self._told = now

    def measuring(self, task: str | None) -> None:
        """Show in the bar which task is being measured; None clears it."""
        if self._bar is not None:
            self._bar.update(self._task, told=f"evaluating: {task}" if task else "", left="")

    def step(self, line: Mapping[str, Any]) -> None:
        """Show that a step is done."""
        step = line["step"]
        seconds = time.monotonic() - self._started
        left = duration_in_words(seconds / (step - self._first) * (self._total - step))
        speed, memory = line["tokens_per_second"], show_bytes(line["peak_memory_bytes"])
        if self._bar is not None:
            told = f"loss {line['loss']:.4f}  {speed:,.0f} tok/s  {memory}"
            self._bar.update(self._task, completed=step, told=told, left=left)
        elif step % self._log_freq == 0 or step in (1, self._total):
            self.say(
                f"step {step:>{len(str(self._total))}}/{self._total}  loss {line['loss']:.4f}  "
                f"lr {line['lr']:.2e}  {speed:,.0f} tokens/s  peak {memory}  {left} left"
            )


class _Text(ProgressColumn):
    """A column whose text is a function of the task; rich draws it again at every refresh."""

    def __init__(self, text: Callable[[Task], str], style: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._text, self._style = text, style

    def render(self, task: Task) -> Text:
        return Text(self._text(task), style=self._style)
