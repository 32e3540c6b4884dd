"""What the machine must have (TTT6xx)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ttt.check.rules.rule import Context, rule
from ttt.config.findings import Finding, Severity
from ttt.reading import other_kind


@rule("run_dir")
def run_dir_can_be_made(context: Context) -> Iterator[Finding]:
    """The run's folder can be made and written."""
    run_dir = context.config.run_dir
    cause = None if run_dir is None else why_unusable(run_dir)
    if run_dir is not None and cause:
        yield Finding(
            code="TTT601",
            severity=Severity.ERROR,
            path="run_dir",
            message=f"{_shortened(run_dir)!r} cannot hold the run: {cause}",
            fix="write a folder that can be made there, or null for a new one under runs/",
            value=run_dir,
        )


def _shortened(path: str) -> str:
    return path if len(path) <= 300 else f"{path[:300]}…"


_LEVELS = 100
_BYTES = 3_800
"""Of a path; Linux takes 4,096, and a checkpoint's unfinished files lie up to 200 further down."""


def why_unusable(path: str) -> str | None:
    """Why a folder cannot be made or written there, in words; None where it can."""
    if "\0" in path:
        return "a name with a null character"
    try:
        target = Path(path).absolute()
        if len(target.parts) > _LEVELS or len(os.fsencode(target)) > _BYTES:
            return (
                f"{len(target.parts):,} levels and {len(os.fsencode(target)):,} bytes; a run's path has at most "
                f"{_LEVELS} levels and {_BYTES:,} bytes"
            )
        nearest = next(folder for folder in (target, *target.parents) if folder.exists())
        if not nearest.is_dir():
            return f"{nearest} is {other_kind(nearest) or 'a file'}"
        return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is not writable"
    except (OSError, ValueError) as error:  # a name that no folder can have
        return str(getattr(error, "strerror", None) or error)


def processes_launched() -> int:
    """How many processes a distributed launcher started, of which this is one; 1 where none did.

    Source: torchrun's documentation, "Environment Variables": `WORLD_SIZE`.
    """
    count = os.environ.get("WORLD_SIZE", "").strip()
    return int(count) if count.isascii() and count.isdigit() and len(count) < 10 else 1


@rule()
def one_process(context: Context) -> Iterator[Finding]:
    """Training is one process on one device; a distributed launch would start the same run several times."""
    count = processes_launched()
    if count > 1:
        yield Finding(
            code="TTT602",
            severity=Severity.ERROR,
            path="run_dir",
            message=(
                f"WORLD_SIZE={count}: this is one of {count} processes of a distributed launch, and a run is one "
                f"process on one device: each would train the same, into the same folder"
            ),
            fix="start ttt by itself, without torchrun or mpirun; num_microbatches makes larger batches",
            value=count,
        )


RULES = (run_dir_can_be_made, one_process)
