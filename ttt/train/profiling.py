"""`ttt train --profile`: where the time of ten steps goes, by PyTorch's profiler: a table, and a trace for a browser.

profile.txt      the tables: parts of a step, and operations
trace.json.gz    every operation of these steps, for https://ui.perfetto.dev or chrome://tracing
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from ttt.errors import UsageError
from ttt.files import temporary_beside, write_text, writing
from ttt.train.parts import Parts
from ttt.train.parts_of_a_step import Marks
from ttt.train.profile_tables import TTT_LAYERS, tables_of
from ttt.train.progress import Progress
from ttt.train.terminal import cause

SKIPPED, WARM_UP, STEPS = 2, 1, 10
"""Steps that the profiler leaves out, that it runs in without keeping them, and that it measures."""
NEEDED = SKIPPED + WARM_UP + STEPS
PROFILE, TRACE = "profile.txt", "trace.json.gz"


def require_steps(parts: Parts, progress: Progress) -> None:
    """Refuse to profile a run that has too few steps left.

    Raises:
        UsageError: the message says how many there are.
    """
    left = parts.config.train.max_steps - progress.done
    if left < NEEDED:
        raise UsageError(
            f"--profile takes {NEEDED} steps, {SKIPPED + WARM_UP} to warm up and {STEPS} that are measured, and this "
            f"run has {left} left; raise train.max_steps, or leave --profile out"
        )


@contextlib.contextmanager
def profiled(parts: Parts, *, wanted: bool) -> Iterator[Callable[[], None]]:
    """A context that gives what is to be called after each step; it does nothing unless a profile is wanted.

    What fails in it is told, and the run goes on.
    """
    if not wanted:
        yield lambda: None
        return
    run = _Profile(parts)
    try:
        yield run.step
    finally:
        run.close()


class _Profile:
    """The profile of a run, from its start until the steps are measured."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._stack = contextlib.ExitStack()
        self._left = NEEDED
        activities = [ProfilerActivity.CPU]
        if parts.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._stack.enter_context(_marked(parts))
        self._profiler = self._stack.enter_context(
            profile(
                activities=activities,
                schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=STEPS, repeat=1),
                on_trace_ready=self._write,
                acc_events=True,
            )
        )

    def step(self) -> None:
        """A step is done."""
        if self._left:
            self._left -= 1
            self._profiler.step()
            if not self._left:
                self._stack.close()
                del self._profiler  # with every event of these steps; the run may go on for weeks

    def close(self) -> None:
        """The run ends."""
        if self._left:
            self._stack.close()
            self._parts.say(f"no profile: the run stopped {self._left} steps before it was complete")
            self._left = 0

    def _write(self, profiler: profile) -> None:
        if self._left:  # closed before its time
            return
        folder = self._parts.directory.path
        try:
            tables = tables_of(profiler, steps=STEPS)
            with writing(folder / TRACE):
                _export(profiler, folder / TRACE)
            write_text(folder / PROFILE, tables + "\n")
        except Exception as error:
            self._parts.say(f"warning: the profile is lost ({cause(error)}); the run goes on")
            return
        for line in tables.split("\n"):
            self._parts.say(line)
        self._parts.say(
            f"the same in {folder / PROFILE}; every operation in {folder / TRACE} (ui.perfetto.dev opens it)"
        )


def _export(profiler: profile, path: Path) -> None:
    """Write the trace under another name, and rename it."""
    temporary = temporary_beside(path).with_suffix(".json.gz")
    try:
        profiler.export_chrome_trace(str(temporary))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _marked(parts: Parts) -> Iterator[None]:
    """A context in which the parts of a step and the calls of TTT layers are ranges in the trace."""
    open_ranges: list[torch.profiler.record_function] = []

    def begin(*_: object) -> None:
        open_ranges.append(torch.profiler.record_function(TTT_LAYERS))
        open_ranges[-1].__enter__()

    def end(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles = [handle for adapter in parts.injection.adapters.values() for handle in _hooked(adapter, begin, end)]
    Marks.on = True
    try:
        yield
    finally:
        Marks.on = False
        for handle in handles:
            handle.remove()


def _hooked(
    adapter: nn.Module, begin: Callable[..., None], end: Callable[..., None]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    yield adapter.register_forward_pre_hook(begin)
    yield adapter.register_forward_hook(end, always_call=True)
