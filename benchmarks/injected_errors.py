"""Errors of the disk at system calls of choice: one sentence, exit code 3, the last checkpoint whole, and it goes on.

Each try lets one call fail with ENOSPC, EIO, EDQUOT, EROFS or EACCES, each at another call: those by which a run
changes its files, and those by which a run that goes on reads its config, its data and its checkpoint. What a run can
do without (TensorBoard's files, pictures, the removal of what is not needed any more) may fail with a warning and exit
code 0. Then the same command runs undisturbed; what is left is compared as in `kills.py`.

    python benchmarks/injected_errors.py --jobs 2          200 tries
"""

from __future__ import annotations

import errno
import random
import shutil
from pathlib import Path

import disturbed
import tracing
from disturbed import COMMAND, CONFIG, DATA, RUN, Ended, Outcome

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)
WRITING, READING = "writing", "reading"
_OPTIONAL = ("tensorboard", "loss.png", "inner_loss.png")


class Fail:
    """Lets the call of a number fail, among those that a run makes on its own files."""

    def __init__(self, folder: Path, kind: str, number: int, error: int) -> None:
        self._run, self._folder = str(folder / RUN), str(folder)
        self._kind, self._number, self._error = kind, number, error
        self.count = 0
        self.place = ""

    def __call__(self, tracer: tracing.Tracer, call: tracing.Call) -> int | None:
        """Count a call; fail where its turn has come."""
        if self._kind == WRITING:
            ours = disturbed.changes(call, self._run)
        else:
            path = call.path or ""
            ours = not (call.name in ("open", "openat") and call.changes) and (
                path.startswith(self._run) or path in (f"{self._folder}/{CONFIG}", f"{self._folder}/{DATA}")
            )
        if not ours:
            return None
        self.count += 1
        if self.count != self._number:
            return None
        self.place = f"{call.name} {call.path}: {errno.errorcode[self._error]}"
        return self._error


def names(kind: str) -> frozenset[str]:
    """The calls that may fail."""
    return tracing.CHANGING if kind == WRITING else tracing.READING


def started_before(folder: Path) -> None:
    """Put a run into the folder that was stopped after some steps."""
    shutil.copytree(disturbed.world().reference / RUN, folder / RUN)
    run = folder / RUN
    (run / "summary.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])


def count(kind: str) -> int:
    """How many calls an undisturbed run makes."""
    if kind == WRITING:
        return len(disturbed.world().counts.changed)
    folder = disturbed.fresh()
    started_before(folder)
    counter = Fail(folder, kind, 0, 0)
    disturbed.forked(folder, COMMAND, counter, names=names(kind))
    disturbed.forget(folder)
    return counter.count


def one(task: tuple[str, int, int]) -> Outcome:
    """One try: kind, number of the call, error."""
    kind, number, error = task
    folder = disturbed.fresh()
    if kind == READING:
        started_before(folder)
    fail = Fail(folder, kind, number, error)
    ended = disturbed.forked(folder, COMMAND, fail, names=names(kind))
    if not fail.place:
        disturbed.forget(folder)
        told = [] if ended.code == 0 else [f"exit {ended.code}: {(ended.err or ended.out).strip()[-400:]}"]
        return Outcome(kind, "no such call", told, f"call {number}")
    problems = _spoken(ended, fail.place)
    damage = disturbed.newest_checkpoint(folder)
    if damage:
        problems.append(f"not a whole checkpoint: {damage}")
    again = disturbed.forked(folder, COMMAND)
    if again.code:
        problems.append(f"the same command ended with {again.code}: {(again.err or again.out).strip()[-400:]}")
    else:
        problems += disturbed.differences(disturbed.world().expected, disturbed.whole(folder))
    disturbed.forget(folder)
    return Outcome(f"{kind}, {errno.errorcode[error]}", f"exit {ended.code}", problems, fail.place)


def _spoken(ended: Ended, place: str) -> list[str]:
    """What is wrong with how a run ended."""
    said = f"{ended.err.strip()[-500:]}"
    if ended.traceback:
        return [f"exit {ended.code} with a traceback: {(ended.err + ended.out).strip()[-900:]}"]
    if ended.code == 0:
        optional = any(name in place for name in _OPTIONAL)
        told = "arning" in ended.err + ended.out
        return ["nothing was said"] if optional and not told and place.split()[0] not in ("fsync",) else []
    if ended.code != 3:
        return [f"exit {ended.code}: {said or ended.out.strip()[-500:]}"]
    if any(name in place for name in _OPTIONAL):
        return [f"the run ended for want of what it can do without: {said}"]
    sentences = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    return [] if len(sentences) == 1 else [f"{len(sentences)} sentences instead of one: {said}"]


def main(words: list[str] | None = None) -> int:
    """Make the tries; 1 if one ended otherwise than it should."""
    options = disturbed.arguments(__doc__.splitlines()[0], runs=200).parse_args(words)
    drawn = random.Random(options.seed)
    with disturbed.tries(options.jobs) as make:
        places = [(kind, number) for kind in (WRITING, READING) for number in range(1, next(make(count, [kind])) + 1)]
        drawn.shuffle(places)
        tasks = [(*place, drawn.choice(ERRORS)) for place in places[: options.runs]]
        while len(tasks) < options.runs:  # fewer calls than tries: again, with another error
            kind, number, error = tasks[len(tasks) - len(places)]
            tasks.append((kind, number, ERRORS[(ERRORS.index(error) + 1) % len(ERRORS)]))
        return disturbed.report(make(one, tasks), total=len(tasks), first="calls, error", file=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
