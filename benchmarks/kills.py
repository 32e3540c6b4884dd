"""`kill -9` at random system calls: whatever the moment, the same command goes on, and the end is the same bit for bit.

A third of the tries are whole programs killed while they start (imports, config, data, model, run folder); the others
are killed around a change of a file of the run (checkpoints, removal of old ones, metrics, pictures, the summary), half
of them twice: what goes on with it is killed too. Then the same command runs undisturbed, and what is left is compared
with a run that nobody disturbed: every byte of every checkpoint's tensors, the metrics and the summary but for times,
the pictures, and nothing beside. One try in fifteen kills `ttt precompute` of Video-DiT on its demo's video, where that
is installed. See `disturbed.py` for what is run.

    python benchmarks/kills.py --jobs 2          300 tries
    python benchmarks/kills.py --runs 6 --seed 3
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import shutil
from pathlib import Path

import disturbed
import tracing
from disturbed import COMMAND, RUN, Ended, Outcome

STARTING, RUNNING, TWICE, PRECOMPUTE = "while it starts", "while it runs", "twice", "while it precomputes"


class At:
    """Kills a process at a place of choice: after so many changes of the run's files, so many calls further on."""

    def __init__(self, run: Path, changes: int, further: int) -> None:
        self._run = str(run)
        self._changes = changes
        self._further = further
        self.place = ""

    def __call__(self, tracer: tracing.Tracer, call: tracing.Call) -> None:
        """Count the call, and kill where its turn has come."""
        if self._changes > 0:
            self._changes -= disturbed.changes(call, self._run)
            return
        self._further -= 1
        if self._further < 0 and not self.place:
            self.place = f"{call.name} {call.path or ''}"
            tracer.kill()


def one(task: tuple[int, str, int]) -> Outcome:
    """One try: number, kind, seed."""
    number, kind, seed = task
    drawn = random.Random(f"{seed} {number}")
    if kind == PRECOMPUTE:
        return _precompute(drawn)
    folder = disturbed.fresh()
    run = folder / RUN
    places, problems = [], []
    if kind == STARTING:
        at = At(run, 0, drawn.randrange(disturbed.world().first["metrics"]))
        disturbed.started(folder, COMMAND, at)
        places.append(at.place)
    else:
        for _ in range(2 if kind == TWICE else 1):
            at = At(run, drawn.randrange(len(disturbed.world().counts.changed) + 1), drawn.randrange(12))
            disturbed.forked(folder, COMMAND, at)
            places.append(at.place)
    problems += [f"not a whole checkpoint: {problem}" for problem in [disturbed.newest_checkpoint(folder)] if problem]
    ended = disturbed.forked(folder, COMMAND)
    problems += _problems(ended, folder)
    outcome = Outcome(kind, "same in the end", problems, "; ".join(filter(None, places)))
    disturbed.forget(folder)
    return outcome


# --- precompute ---

_PRECOMPUTE = ["precompute", "p.yaml"]


def _videos() -> Path:
    """A folder with a video and a list of pieces of it."""
    from ttt_videodit import demo

    folder = disturbed.fresh()
    shutil.copy(demo.CLIP, folder / "city.mp4")
    os.utime(folder / "city.mp4", (1, 1))  # what is made of a video is named by its size and time too
    pieces = ({"path": "city.mp4", "captions": [f"the city, {start:g}"], "start_sec": start} for start in (0.0, 0.5, 1))
    (folder / "videos.jsonl").write_text("".join(f"{json.dumps(piece)}\n" for piece in pieces), encoding="utf-8")
    (folder / "p.yaml").write_text(
        "backbone: {name: videodit, attn_length: 4}\ndata: {videos: videos.jsonl, train_data: train.jsonl}\n"
        "train: {device: cpu}\n",
        encoding="utf-8",
    )
    return folder


def _made(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, locks aside."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if _is_content(path)}


def _is_content(path: Path) -> bool:
    return path.is_file() and path.name != ".lock"


@functools.cache
def _precomputed() -> tuple[dict[str, bytes], int]:
    """What `ttt precompute` makes undisturbed, and by how many changes of files."""
    folder = _videos()
    counts = disturbed.Counts(folder)
    ended = disturbed.forked(folder, _PRECOMPUTE, counts)
    assert ended.code == 0, ended
    made = _made(folder)
    disturbed.forget(folder)
    return made, len(counts.changed)


def _precompute(drawn: random.Random) -> Outcome:
    expected, changes = _precomputed()
    folder = _videos()
    at = At(folder, drawn.randrange(changes + 1), drawn.randrange(12))
    disturbed.forked(folder, _PRECOMPUTE, at)
    ended = disturbed.forked(folder, _PRECOMPUTE)
    if ended.code:
        problems = [f"the same command ended with {ended.code}: {(ended.err or ended.out).strip()[-400:]}"]
    else:
        problems = disturbed.differences(expected, _made(folder))
    disturbed.forget(folder)
    return Outcome(PRECOMPUTE, "same in the end", problems, at.place)


# --- the tries ---


def _problems(ended: Ended, folder: Path) -> list[str]:
    if ended.code:
        return [f"the same command ended with {ended.code}: {(ended.err or ended.out).strip()[-400:]}"]
    return disturbed.differences(disturbed.world().expected, disturbed.whole(folder))


def _last_kind() -> str:
    return RUNNING if importlib.util.find_spec("ttt_videodit") is None else PRECOMPUTE


def main(words: list[str] | None = None) -> int:
    """Make the tries; 1 if one ended otherwise than it should."""
    options = disturbed.arguments(__doc__.splitlines()[0], runs=300).parse_args(words)
    kinds = (STARTING, RUNNING, TWICE) * 4 + (STARTING, RUNNING, _last_kind())
    tasks = [(number, kinds[number % len(kinds)], options.seed) for number in range(options.runs)]
    with disturbed.tries(options.jobs) as make:
        return disturbed.report(make(one, tasks), total=len(tasks), first="killed", file=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
