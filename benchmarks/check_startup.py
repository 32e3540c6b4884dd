"""How long `ttt check CONFIG` takes, from the start of the process to its end.

    python benchmarks/check_startup.py [--runs 40] [--limit 0.3] [CONFIG]

Each run is a process of its own; the first of each command, which compiles bytecode, is not counted. Beside it, in turn
with it, run commands that no check can be faster than, so that the figures mean something on a machine that is busy or
slow: a Python that does nothing, one that imports pydantic and typer, and one that validates a model of pydantic's and
has PyYAML. With `--limit`, exits with 1 if the 95th percentile of the wall clock is above so many seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "plugins" / "moshi" / "ttt_moshi" / "presets" / "demo.yaml"

FLOORS = {
    "python -c pass": "pass",
    "import pydantic, typer": "import pydantic, typer",
    "a pydantic model, PyYAML": (
        "import yaml\n"
        "from pydantic import BaseModel\n"
        "class Model(BaseModel):\n    number: int = 1\n"
        "Model.model_validate({'number': 2})"
    ),
}
"""Programs to compare with, by what they are called in the report."""


class Run(NamedTuple):
    """Seconds of one process."""

    wall: float
    cpu: float


def installed_command() -> list[str]:
    """`ttt` as it is installed beside this Python, or else as a module."""
    script = Path(sys.executable).with_name("ttt")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "ttt_cli"]


def measure(commands: dict[str, list[str]], runs: int) -> dict[str, list[Run]]:
    """Each command so many times, in turn."""
    found: dict[str, list[Run]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as cache:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = cache  # bytecode as an installed package has it, wherever this runs
        for number in range(runs + 1):
            for name, command in commands.items():
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                start = time.perf_counter()
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                wall = time.perf_counter() - start
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                if number:
                    found[name].append(Run(wall, cpu))
    return found


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def report(found: dict[str, list[Run]], checked: str) -> str:
    """A table: each command's median and 95th percentile, and how many times its median the check's is."""
    widest = max(map(len, found))
    lines = [f"{'':{widest}}   wall ms: median    p95    least   CPU ms: median    p95   check's CPU is"]
    check = statistics.median(run.cpu for run in found[checked])
    for name, runs in found.items():
        walls, cpus = [run.wall * 1000 for run in runs], [run.cpu * 1000 for run in runs]
        times = check * 1000 / max(statistics.median(cpus), 1e-9)
        lines.append(
            f"{name:{widest}}   {statistics.median(walls):15.0f} {percentile(walls, 0.95):6.0f} {min(walls):8.0f}"
            f"   {statistics.median(cpus):14.0f} {percentile(cpus, 0.95):6.0f}"
            + (f"   {times:.2f} times" if name != checked else "")
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--limit", type=float, help="seconds of wall clock that the 95th percentile may have")
    arguments = parser.parse_args()
    checked = "ttt check CONFIG"
    commands = {checked: [*installed_command(), "check", str(arguments.config)]}
    commands["the same, with --strict"] = [*commands[checked], "--strict"]  # an option is parsed by typer
    commands |= {name: [sys.executable, "-c", program] for name, program in FLOORS.items()}
    found = measure(commands, arguments.runs)
    print(report(found, checked))
    return int(arguments.limit is not None and percentile([run.wall for run in found[checked]], 0.95) > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
