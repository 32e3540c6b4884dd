"""What a job asks the cluster for, and whether that can be asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ttt.errors import UsageError
from ttt.words import duration_in_words

_TIME = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
"""What `man sbatch` takes for `--time`."""
_SECONDS = {"days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}
_LONGEST = 365 * 86_400
_FIRST_WARNING, _SHARE_OF_TIME = 300, 4
"""Seconds before the end at which a job is warned, or this part of a shorter job."""
_LONGEST_WARNING = 65_535
"""Slurm's own."""
_PER_NODE = 128
_NODES = 16_384

_OWN = {
    "nodes": "--nodes",
    "gpus": "--gpus",
    "gpus-per-node": "--gpus",
    "time": "--time",
    "signal": "--warn",
    "ntasks": "--tasks-per-node",
    "ntasks-per-node": "--tasks-per-node",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "constraint": "--constraint",
    "mem": "--mem",
    "cpus-per-task": "--cpus-per-task",
}
"""Options of sbatch that have one here."""
_FIXED = {
    "array": "each of its jobs would train the same run",
    "comment": "by it the jobs of a run are found",
    "error": "the log is in the run's folder",
    "open-mode": "the log of a job that is queued again goes on",
    "output": "the log is in the run's folder",
    "requeue": "a job is always queued again",
    "no-requeue": "a job is always queued again",
    "wrap": "the job has a script",
}
"""Options of sbatch that a run decides."""


@dataclass(frozen=True)
class Request:
    """What a job asks for. It is checked when it is made.

    Raises:
        UsageError: the cluster could not be asked for that; the message names the option.
    """

    nodes: int = 1
    gpus: int = 1
    """Of each node; a process trains on each."""
    time: str = "24:00:00"
    """The longest that one job may take, as sbatch reads it."""
    tasks_per_node: int | None = None
    """Processes of each node, where they train on CPUs; None is one for each GPU, or one."""
    warn: int | None = None
    """Seconds before the end of its time at which a job is asked to save; None is 300, or a quarter of the time."""
    cpus_per_task: int | None = None
    mem: str | None = None
    """Memory of a node, as `64GB`."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    more: Sequence[str] = field(default=())
    """Further options of sbatch, each as `key=value`, or `key` alone."""
    setup: Sequence[str] = field(default=())
    """Lines of shell to run before the processes start."""

    def __post_init__(self) -> None:
        _require_in("--nodes", self.nodes, 1, _NODES)
        _require_in("--gpus", self.gpus, 0, _PER_NODE)
        if self.tasks_per_node is not None:
            _require_in("--tasks-per-node", self.tasks_per_node, 1, _PER_NODE)
            if self.gpus and self.tasks_per_node != self.gpus:
                raise UsageError(
                    f"--tasks-per-node: {self.tasks_per_node}, but there is one process for each of the --gpus "
                    f"{self.gpus} of a node; leave it out, or write --gpus 0 to train on CPUs"
                )
        if self.cpus_per_task is not None:
            _require_in("--cpus-per-task", self.cpus_per_task, 1, 1024)
        _require_time(self.time, self.seconds)
        _require_in("--warn", self.warning, 1, _LONGEST_WARNING)
        if self.warning >= self.seconds:
            raise UsageError(
                f"--warn: {self.warning} seconds before its end a job of --time {self.time} (of {self.seconds} "
                f"seconds) has not started yet; write a longer --time, or a shorter --warn"
            )
        for option in self.more:
            _require_free(option)
        for option in ("partition", "account", "qos", "constraint", "mem"):
            _require_a_word(f"--{option}", getattr(self, option))
        for line in self.setup:
            if "\n" in line:
                raise UsageError("--setup: one line of shell; repeat the option for more")

    @property
    def tasks(self) -> int:
        """Processes of a node."""
        return self.tasks_per_node or self.gpus or 1

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.nodes * self.tasks

    @property
    def seconds(self) -> int:
        """What `time` means; 0 if it means nothing."""
        return _seconds(self.time)

    @property
    def warning(self) -> int:
        """How many seconds before its end a job is asked to save."""
        return self.warn if self.warn is not None else max(1, min(_FIRST_WARNING, self.seconds // _SHARE_OF_TIME))

    @property
    def options(self) -> dict[str, str | bool]:
        """The further options of sbatch, those without a value True."""
        split = (option.partition("=") for option in self.more)
        return {name.removeprefix("--"): value if given else True for name, given, value in split}

    def in_words(self) -> str:
        """How many processes there are, and for how long: Slurm reads `24:00` as 24 minutes."""
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        each = " each" if self.nodes > 1 else ""
        if self.gpus:
            where = f"{nodes} with {self.gpus} {'GPU' if self.gpus == 1 else 'GPUs'}{each}"
        else:
            where = f"the CPUs of {nodes}"
        kind = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{kind} on {where}, for at most {duration_in_words(self.seconds)} at a time"


def _seconds(time: str) -> int:
    for pattern in _TIME:
        if match := re.fullmatch(pattern, time.strip(), re.ASCII):
            return sum(int(value) * _SECONDS[unit] for unit, value in match.groupdict().items() if value)
    return 0


def _require_time(time: str, seconds: int) -> None:
    if seconds <= 0 or len(time) > 20:
        raise UsageError(
            f"--time: {time[:60]!r} is no time limit; write hours:minutes:seconds, as 24:00:00, or days-hours, as 2-12"
        )
    if seconds > _LONGEST:
        raise UsageError(f"--time: {time} is more than a year; write hours:minutes:seconds, as 24:00:00")


def _require_in(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{option}: {value}; write a number from {low} to {high:,}")


def _require_a_word(option: str, value: str | None) -> None:
    if value is not None and (not value.strip() or not value.isprintable()):
        raise UsageError(f"{option}: {value!r} is no name; write what `sinfo` or your cluster's pages call it")


def _require_free(option: str) -> None:
    name = option.partition("=")[0].removeprefix("--")
    if not re.fullmatch(r"[a-z][a-z-]*", name) or not option.isprintable():
        raise UsageError(
            f"--sbatch: {option!r}; write an option of sbatch, as --sbatch exclude=n7 or --sbatch exclusive"
        )
    if name in _OWN:
        raise UsageError(f"--sbatch {name}: has an option of its own, {_OWN[name]}; write that")
    if name in _FIXED:
        raise UsageError(f"--sbatch {name}: cannot be chosen: {_FIXED[name]}; leave it out")
