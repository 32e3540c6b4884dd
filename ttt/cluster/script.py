"""The script of a job that trains a run: what Slurm is asked for, `srun ttt train`, and what happens once that ends."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt.checkpoint_folder import CHECKPOINTS
from ttt.cluster.request import Request
from ttt.errors import EnvironmentProblem
from ttt.interrupt import INTERRUPTED
from ttt.printable import shell_word

if TYPE_CHECKING:
    from ttt.cluster.executor import SlurmCommand

FOLDER = "slurm"
"""Of a run: scripts and logs of its jobs, and the config with which the newest of them was submitted."""
SUBMITTED = "submitted.yaml"

_FRUITLESS = 5
"""So many times in a row a job that saved nothing is queued again: it may be preempted before its first step."""
_OTHERS_SECONDS = 300
"""How long srun lets the other processes run once one has ended, before it kills them: they end by themselves, the
first by saving. With `--kill-on-bad-exit` they would get SIGTERM at once, as of a scheduler that asks them to stop, and
a job with a wrong config would be queued again."""
_STARTING = (10, 12, 15)
"""SIGUSR1, SIGUSR2 and SIGTERM on Linux end a process that has not got as far as hearing them."""


def job_name(run: Path) -> str:
    """What the jobs of a run are called; runs of other places may have the same name."""
    return f"ttt-{run.name}"


def of_run(run: Path, request: Request) -> SlurmCommand:
    """The job that trains a run in `run`, with the config in its folder `slurm`.

    Args:
        run: the run's folder, absolute; it need not exist.
        request: what is asked for.

    Raises:
        EnvironmentProblem: submitit is not installed.
    """
    try:
        from ttt.cluster.executor import SlurmCommand
    except ModuleNotFoundError as error:
        if error.name not in ("submitit", "cloudpickle"):
            raise
        raise EnvironmentProblem(
            f"jobs are made by {error.name}, which is not installed", fix="pip install 'ttt-adapters[cluster]'"
        ) from None

    folder = run / FOLDER
    command = [sys.executable, "-u", "-m", "ttt_cli", "train", str(folder / SUBMITTED), "--resume"]
    return SlurmCommand(folder, command, _parameters(run, request))


def _parameters(run: Path, request: Request) -> dict[str, Any]:
    """The job in submitit's words."""
    each = [f"--cpus-per-task={request.cpus_per_task}"] if request.cpus_per_task else []  # srun does not take sbatch's
    return {
        "job_name": job_name(run),
        "comment": str(run),
        "nodes": request.nodes,
        "ntasks_per_node": request.tasks,
        "gpus_per_node": request.gpus or None,
        "cpus_per_task": request.cpus_per_task,
        "mem": request.mem,
        "time": request.time.strip(),
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "signal_delay_s": request.warning,
        "stderr_to_stdout": True,
        "srun_args": ["--open-mode=append", "--kill-on-bad-exit=0", f"--wait={_OTHERS_SECONDS}", *each],
        "additional_parameters": {"requeue": True, **request.options},
        "setup": [*request.setup, *_before(run)],
        "teardown": _after(run),
        "wckey": None,  # submitit's own, which a cluster may not know
    }


_BEFORE = """\
newest() {{ ls -v {checkpoints} 2>/dev/null | grep '^step_' | tail -n 1; }}
before=$(newest)
fruitless={folder}/"$SLURM_JOB_ID"_fruitless"""

_AFTER = """\
code=$?
[ "$(newest)" = "$before" ] || rm -f "$fruitless"
case $code in
{codes}) ;;  # asked to stop: it has saved, or had not begun
*) rm -f "$fruitless"; exit $code ;;
esac
[ "$(newest)" = "$before" ] && echo >> "$fruitless"
if [ -f "$fruitless" ] && [ "$(wc -l < "$fruitless")" -ge {most} ]; then
  echo "asked to stop {most} times before it had saved anything: not queued again; give it a longer --time"
  rm -f "$fruitless"
elif scontrol requeue "$SLURM_JOB_ID"; then
  echo "asked to stop: queued again, it goes on from its last checkpoint"
  sleep 60  # until Slurm ends this script
else
  echo "asked to stop, and Slurm does not queue it again; go on with: {again}"
fi
exit $code
"""


def _before(run: Path) -> list[str]:
    text = _BEFORE.format(checkpoints=shlex.quote(str(run / CHECKPOINTS)), folder=shlex.quote(str(run / FOLDER)))
    return text.splitlines()


def _after(run: Path) -> list[str]:
    """A run that was asked to stop is queued again; the same command goes on with it."""
    codes = "|".join(map(str, (INTERRUPTED, *(128 + number for number in _STARTING))))
    again = f"ttt submit {shell_word(run)}"
    return _AFTER.format(codes=codes, most=_FRUITLESS, again=again.replace('"', '\\"')).split("\n")
