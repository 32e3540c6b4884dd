"""submitit's executor for Slurm, which submits a command instead of a pickled function.

submitit writes the script, knows the options of sbatch, and submits. Usually what runs is a function that it pickles,
with a handler that pickles it anew when the job is preempted. `ttt train --resume` is its own checkpoint, nothing that
this project loads is a pickle, and a script that says what runs can be read, changed and submitted by hand.

Its methods with an underscore are what submitit's plugins override (`submitit/core/core.py`, "@plugin-dev"). This
module imports submitit: import it where its absence is told.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from ttt.slurm import JOB

_CONF = "SLURM_CONF"
"""Where Slurm's own configuration is."""

REFUSED = FailedJobError
"""What submitit raises if sbatch does not take a job."""
UNCLEAR = FailedSubmissionError
"""What it raises if sbatch ends well and says no number."""


class SlurmCommand(submitit.SlurmExecutor):
    """One job that runs a command, once for each of its tasks."""

    def __init__(self, folder: Path, command: Sequence[str], parameters: Mapping[str, Any]) -> None:
        """Nothing is written.

        Args:
            folder: for the job's script and its log.
            command: what each task runs, word by word.
            parameters: submitit's for Slurm, as `nodes` and `setup`.
        """
        super().__init__(folder)
        self.update_parameters(**parameters)
        self._command = shlex.join(command)

    @classmethod
    def affinity(cls) -> int:
        """How well submitit may be used here: a script can be made where there is no Slurm."""
        return 2

    @property
    def script(self) -> str:
        """What sbatch is given."""
        return self._make_submission_file_text(self._command, uid="")

    def start(self) -> str:
        """Submit the job; returns its number. The folder is there.

        Raises:
            FailedJobError: sbatch refused it; the text is its own.
            FailedSubmissionError: sbatch did not say the job's number.
        """
        with _outside_a_job():
            return str(self._submit_command(self._command).job_id)


@contextlib.contextmanager
def _outside_a_job() -> Iterator[None]:
    """Inside, variables of the job in which this process may run are not there; those that a user sets are."""
    if JOB not in os.environ:
        yield
        return
    of_user = {name: value for name, value in os.environ.items() if name == _CONF or name.startswith("SBATCH_")}
    with clean_env():
        os.environ.update(of_user)
        yield
