"""How long `ttt check CONFIG` takes, from the start of the process to its end.

    python benchmarks/check_startup.py [--runs 40] [--limit 0.3] [CONFIG]

Each run is a process of its own; the first, which compiles bytecode, is not counted. CPU time is printed beside the
wall clock: where the two differ much, the machine was busy with something else. With `--limit`, exits with 1 if the
95th percentile of the wall clock is above so many seconds.
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

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "plugins" / "moshi" / "ttt_moshi" / "presets" / "demo.yaml"


def measure(config: Path, runs: int) -> tuple[list[float], list[float]]:
    """Wall clock and CPU seconds of each run."""
    command = [sys.executable, "-m", "ttt_cli", "check", str(config)]
    walls, cpus = [], []
    with tempfile.TemporaryDirectory() as cache:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = cache  # bytecode as an installed package has it, wherever this runs
        for _ in range(runs + 1):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            walls.append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return walls[1:], cpus[1:]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--limit", type=float, help="seconds of wall clock that the 95th percentile may have")
    arguments = parser.parse_args()
    walls, cpus = measure(arguments.config, arguments.runs)
    for name, values in (("wall clock", walls), ("CPU", cpus)):
        median, p95 = statistics.median(values), percentile(values, 0.95)
        print(f"{name:>10}: median {median * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms, least {min(values) * 1000:.0f} ms")
    return int(arguments.limit is not None and percentile(walls, 0.95) > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
