"""The name under which a dashboard knows a run: kept in the run's folder, so that a resumed run goes on under it."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from ttt.files import write_text

_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def dashboard_id(run_dir: Path, dashboard: str, *, first_step: int, wanted: str | None = None) -> str:
    """The run's name for a dashboard, from `RUN/DASHBOARD_run.txt`; a run that starts gets a new one.

    Args:
        run_dir: the run's folder.
        dashboard: the name of the dashboard's package.
        first_step: the run's next step.
        wanted: the name that the user gave the run.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    file = run_dir / f"{dashboard}_run.txt"
    kept = _read(file) if first_step > 1 else None
    if kept is None or wanted:
        kept = wanted or uuid.uuid4().hex[:12]
        write_text(file, f"{kept}\n")
    return kept


def _read(file: Path) -> str | None:
    """What the file says; None if there is no such file, or something else is in it."""
    try:
        written = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return written if _ID.fullmatch(written) else None
