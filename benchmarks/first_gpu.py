"""What a GPU is asked first: stage after stage, each a process with a time limit, results written as they come.

    sh benchmarks/first_gpu.sh FOLDER                            # on a machine where `ttt` is installed
    sh benchmarks/first_gpu.sh FOLDER --wheels dist/wheels       # on one with torch and triton alone: see `make wheels`
    sh benchmarks/first_gpu.sh FOLDER --device cpu --tiny        # the same program, to see that it works

FOLDER then has `first_gpu.md`, a table; `first_gpu.json`, all of its numbers and the card's name; and of each stage its
own `.json` and `.log`. A stage that fails or takes too long stops no other, and the table names it. This file needs
Python alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from first_gpu_table import table

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
SECONDS = 570.0
"""For all stages together."""
STAGES: Mapping[str, float] = {
    "environment": 45,
    "oracle": 45,
    "waits": 30,
    "graphs": 50,
    "ceilings": 30,
    "layer": 60,
    "kernels": 110,
    "laws": 80,
    "scan": 60,
    "moshi_7b": 110,
}
"""Seconds that each may take at most, in their order; together they may take less."""


class Process(Protocol):
    """What runs a stage."""

    def wait(self, timeout: float) -> int:
        """Its exit code; an error if it runs on after so many seconds."""

    def kill(self) -> None:
        """End it and what it started."""


Starter = Callable[[Sequence[str], Path], Process]
"""Starts a stage with these arguments of `first_gpu_stages.py`, its output going to a file."""


class Separate:
    """A stage as a process of its own, in a process group of its own."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        command = [sys.executable, str(BENCHMARKS / "first_gpu_stages.py"), *arguments]
        with log.open("w", encoding="utf-8") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, timeout: float) -> int:
        return self._process.wait(timeout)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run(
    out: Path,
    arguments: Sequence[str] = (),
    *,
    stages: Mapping[str, float] = STAGES,
    seconds: float = SECONDS,
    start: Starter = Separate,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the stages, and write what there is after each.

    Args:
        out: the folder for results; it is made.
        arguments: for every stage: `--device`, `--tiny`.
        stages: names, and the most seconds of each.
        seconds: after which no stage goes on.
        start: how a stage is started.
        tell: is told how each ended.

    Returns:
        What `first_gpu.json` has: for each stage how it ended, its seconds, and its results as far as they came.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {name: {"ended": "not begun", "seconds": 0.0, "results": {}} for name in stages}
    begun = time.monotonic()
    for name, limit in stages.items():
        left = min(limit, seconds - (time.monotonic() - begun))
        if left > 1:
            found[name] = _stage(name, left, out, arguments, start)
        tell(f"{name}: {found[name]['ended']}, {found[name]['seconds']:.0f} s")
        _write(out / "first_gpu.json", json.dumps(found, indent=1) + "\n")
        _write(out / "first_gpu.md", table(found))
    return found


def _stage(name: str, limit: float, out: Path, arguments: Sequence[str], start: Starter) -> dict[str, Any]:
    results, log = out / f"{name}.json", out / f"{name}.log"
    results.unlink(missing_ok=True)  # of an earlier run
    begun = time.monotonic()
    process = start([name, "--out", str(results), *arguments], log)
    try:
        code = process.wait(limit)
        ended = "done" if code == 0 else f"failed ({_last_line(log) or f'exit {code}'})"
    except (subprocess.TimeoutExpired, TimeoutError):
        process.kill()
        ended = f"stopped after {limit:.0f} s"
    except KeyboardInterrupt:
        process.kill()
        raise
    came: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    return {"ended": ended, "seconds": round(time.monotonic() - begun, 1), "results": came}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def _write(path: Path, text: str) -> None:
    """Whole or not at all: it may be read at any time."""
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def install(wheels: Path, site: Path) -> None:
    """Unpack wheels into a folder of their own; nothing is fetched, and nothing that is installed changes."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        sys.exit(f"{wheels} has no wheels; `make wheels` makes some")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--upgrade", "--target", str(site), *files], check=True)


def main() -> None:
    """Run every stage, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the results")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of what this machine's Python lacks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this program")
    parser.add_argument("--only", nargs="*", choices=STAGES, help="these stages")
    arguments = parser.parse_args()
    begun = time.monotonic()
    sources = [ROOT, ROOT / "cli", *(ROOT / "plugins" / name for name in ("moshi", "videodit", "transformers"))]
    paths = [str(BENCHMARKS), *map(str, sources)]
    if arguments.wheels is not None:
        site = arguments.out.resolve() / "site"
        install(arguments.wheels, site)
        paths.append(str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("NO_TORCH_COMPILE", "1")  # kyutai's package would compile its norm for 20 s
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    stages = {name: limit for name, limit in STAGES.items() if not arguments.only or name in arguments.only}
    passed_on = ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    patience = 1 if arguments.device == "cuda" else 10
    stages = {name: patience * limit for name, limit in stages.items()}
    found = run(arguments.out, passed_on, stages=stages, seconds=patience * SECONDS - (time.monotonic() - begun))
    print((arguments.out / "first_gpu.md").read_text(encoding="utf-8"))
    sys.exit(any(one["ended"] != "done" for one in found.values()))


if __name__ == "__main__":
    main()
