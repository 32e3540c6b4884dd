"""The script for a first GPU works: every stage runs here, tiny, and one that fails or hangs stops no other."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import first_gpu
import forking
import pytest
from first_gpu import STAGES, Separate, run
from first_gpu_table import table
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import first_gpu_stages
import quick_interpreter

TINY = ["--device", "cpu", "--tiny"]


def _stage(arguments: Sequence[str], log: str) -> int:
    with open(log, "w", encoding="utf-8") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    quick_interpreter.install()
    first_gpu_stages.subprocess.run = _here  # type: ignore[assignment]  # in this process alone
    first_gpu_stages.main(list(arguments))
    return 0


def _here(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
    """Run another benchmark in this process, which has imported what that would import anew."""
    sys.argv = list(command[1:])
    runpy.run_path(sys.argv[0], run_name="__main__")
    return subprocess.CompletedProcess(command, 0)


class _Forked:
    """A stage in a process that need not import anything."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._process = forking.start(_stage, arguments, str(log))

    def wait(self, timeout: float) -> int:
        code = self._process.wait(timeout)
        self.kill()
        return code

    def kill(self) -> None:
        self._process.__exit__()  # its streams are closed too


def test_every_stage_runs_and_writes_its_figures(tmp_path: Path) -> None:
    told: list[str] = []
    limits = dict.fromkeys(STAGES, 300.0)
    found = run(tmp_path, TINY, stages=limits, seconds=3000, start=_Forked, tell=told.append)
    assert {name: one["ended"] for name, one in found.items()} == dict.fromkeys(STAGES, "done"), told
    assert json.loads((tmp_path / "first_gpu.json").read_text()) == found
    text = (tmp_path / "first_gpu.md").read_text()
    assert text.startswith("# First figures of a GPU: none\n")
    assert all(f"\n## {name}\n" in text for name in STAGES)
    results = {name: one["results"] for name, one in found.items()}
    assert results["environment"]["healthy"]
    assert {trial["implementation"] for trial in results["environment"]["trials"]} >= {"reference", "fused"}
    assert 0 < results["oracle"]["worst"] <= results["oracle"]["bound"]
    assert [row["waits"] for row in results["waits"]["rows"]] == [None] * 9
    graphs = {row["what"]: row for row in results["graphs"]["rows"]}
    assert not [row["error"] for row in graphs.values() if "error" in row]
    assert not any(row["captured"] for row in graphs.values())  # nothing claims what only a GPU can do
    assert all(row["difference"] == 0 for row in graphs.values())
    assert graphs["LMGen"]["frames"] > 4
    assert "| fused: as in a run | no: it needs CUDA |" in text
    assert len(results["ceilings"]["products"]) == 18
    assert all(row["teraflops"] > 0 for row in results["ceilings"]["products"])
    layers = results["layer"]["rows"]
    assert not [row["error"] for row in layers if "error" in row]
    assert [row["implementation"] for row in layers] == ["fused", "triton"]
    assert all(row["backward_launches"] > 10 for row in layers)
    assert results["kernels"]["disagree"] == 0
    assert all(0 < row["difference"] < row["bound"] for row in results["kernels"]["rows"])
    assert [(row["law"], row["broken"]) for row in results["laws"]["rows"]] == [(1, None), (5, None)]
    contenders = {row["contender"] for shape in results["scan"]["shapes"] for row in shape["rows"]}
    assert contenders >= {"published", "fused", "attention"}
    plain, with_ttt = results["moshi_7b"]["rows"][:2]
    assert plain["over_plain"] == 1
    assert with_ttt["over_plain"] == with_ttt["tokens_per_second"] / plain["tokens_per_second"]


class _Planned:
    """A stage that ends as its name says, in a process of its own."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        name, _, out = arguments[:3]
        code = {
            "fine": f"open({out!r}, 'w').write('{{\"rows\": [], \"worst\": 1}}')",
            "failing": f"open({out!r}, 'w').write('{{\"card\": \"part\"}}'); raise SystemExit('no kernel image')",
            "hanging": "import time; time.sleep(600)",
        }[name]
        with log.open("w") as written:
            self.process = subprocess.Popen([sys.executable, "-c", code], stdout=written, stderr=written)

    def wait(self, timeout: float) -> int:
        return self.process.wait(timeout)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_a_stage_that_fails_or_hangs_is_named_and_stops_no_other(tmp_path: Path) -> None:
    limits = {"hanging": 1.5, "failing": 60.0, "fine": 60.0}
    (tmp_path / "hanging.json").write_text('{"of": "an earlier run"}')
    found = run(tmp_path, stages=limits, start=_Planned, tell=lambda line: None)
    assert [one["ended"] for one in found.values()] == ["stopped after 2 s", "failed (no kernel image)", "done"]
    assert [one["results"] for one in found.values()] == [{}, {"card": "part"}, {"rows": [], "worst": 1}]
    text = (tmp_path / "first_gpu.md").read_text()
    assert "| hanging | stopped after 2 s |" in text
    assert "| failing | failed (no kernel image) |" in text
    assert json.loads((tmp_path / "first_gpu.json").read_text()) == found


def test_no_stage_begins_when_the_time_is_up(tmp_path: Path) -> None:
    found = run(tmp_path, stages={"hanging": 60.0, "fine": 60.0}, seconds=2, start=_Planned, tell=lambda line: None)
    assert [one["ended"] for one in found.values()] == ["stopped after 2 s", "not begun"]


def test_a_stage_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    (tmp_path / "first_gpu_stages.py").write_text(
        "import subprocess, sys, time\n"
        "code = 'import sys, time; time.sleep(1.5); open(sys.argv[1], \"w\")'\n"
        "subprocess.Popen([sys.executable, '-c', code, sys.argv[1]])\n"
        "print('begun', flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(first_gpu, "BENCHMARKS", tmp_path)
    log = tmp_path / "log"
    process = Separate([str(child)], log)
    deadline = time.monotonic() + 60
    while "begun" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.kill()
    time.sleep(2)
    assert not child.exists()


def test_the_shell_script_says_what_it_wants() -> None:
    script = Path(first_gpu.__file__).with_suffix(".sh")
    done = subprocess.run(["sh", str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--wheels" in done.stdout


def _closure(names: set[str], without: set[str]) -> set[str]:
    """The distributions of these names and all that they need here, by what is installed."""
    found, left = set(), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found or name in without:
            continue
        found.add(name)
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                left.append(canonicalize_name(needed.name))
    return found


def test_the_wheels_that_are_brought_along_need_no_others() -> None:
    """But for torch, Triton and numpy with what these bring, and what no stage imports."""
    made = (Path(first_gpu.ROOT) / "Makefile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^WHEELS := (.*)", made, re.MULTILINE)
    unused = {"matplotlib", "bitsandbytes", "sounddevice", "aiohttp", "hf-xet"}
    there = _closure({"torch", "triton", "numpy"}, set())
    needed = _closure({"ttt-adapters", "ttt-moshi"}, there | unused) - {"ttt-adapters", "ttt-moshi"}
    brought = set(line.split())
    assert needed <= brought
    assert brought - needed <= {"typing-extensions"}  # which torch brings too, but may be too old


def test_a_table_of_nothing_is_a_table() -> None:
    nothing = {name: {"ended": "not begun", "seconds": 0.0, "results": {}} for name in STAGES}
    assert table(nothing).count("| not begun |") == len(STAGES)
