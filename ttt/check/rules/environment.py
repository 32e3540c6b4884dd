"""What the machine must have (TTT6xx)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ttt.check.rules.rule import Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.machine import processes_launched, why_unusable

_code = partial(Code, family=Family.ENVIRONMENT, blames=Blame.MACHINE, of_training=True, home=__name__)
TTT601 = _code("TTT601", "a run_dir that cannot be written", Severity.ERROR)
TTT602 = _code("TTT602", "one run in several processes", Severity.ERROR)


@rule(TTT601, reads=("run_dir",))
def run_dir_can_be_made(context: Context) -> Iterator[Finding]:
    """The run's folder can be created and written to."""
    run_dir = context.config.run_dir
    cause = None if run_dir is None else why_unusable(run_dir)
    if run_dir is not None and cause:
        yield TTT601.at(
            "run_dir",
            message=f"{_shortened(run_dir)!r} cannot hold the run: {cause}",
            fix="write a folder that can be made there, or null for a new one under runs/",
            value=run_dir,
        )


def _shortened(path: str) -> str:
    return path if len(path) <= 300 else f"{path[:300]}…"


@rule(TTT602, reads=())
def one_process(context: Context) -> Iterator[Finding]:
    """The run is one process on one device. A distributed launch would start it several times."""
    count = processes_launched()
    if count > 1:
        yield TTT602.at(
            "run_dir",
            message=(
                f"WORLD_SIZE={count}: this is one of {count} processes of a distributed launch, and a run is one "
                f"process on one device: each would train the same, into the same folder"
            ),
            fix="start ttt by itself, without torchrun or mpirun; num_microbatches makes larger batches",
            value=count,
        )
