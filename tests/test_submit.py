"""A run as a job of Slurm: what is refused, what the script says and does, and all of it on a real Slurm where one is.

`benchmarks/slurm_loopback.sh` starts that one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from fake_distributions import importable, install

from ttt.cluster.request import Request
from ttt.errors import UsageError
from ttt.files import lock
from ttt.train import pictures
from ttt_cli.main import main

ROOT = Path(__file__).parent.parent
LOOPBACK = ROOT / "benchmarks" / "slurm_loopback.sh"
PLUGIN = """\
import time
from toy import ToyBackbone
from ttt.plugins.hookspecs import hookimpl

class Slow(ToyBackbone):
    def loss(self, model, batch, config):
        time.sleep({pause})
        return super().loss(model, batch, config)

@hookimpl
def ttt_backbone():
    return Slow()
"""
CONFIG = """\
backbone: {name: toy, num_layers: 1, dim: 16, num_heads: 2}
ttt: {mini_batch_size: 4}
data: {window: 12}
train: {max_steps: 16, batch_size: 4, log_freq: 1, device: auto, cpu_threads: 1}
run_dir: runs/one
"""
CPU = ("--gpus", "0")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a config, and beside it the toy, installed, for this process and for a job's."""
    folder, work = tmp_path / "plugins", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    install(folder, "toy", "toy_plugin", PLUGIN.format(pause=0))
    monkeypatch.chdir(work)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT / "tests")]))
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    Path("c.yaml").write_text(CONFIG)
    with importable(folder):
        yield work


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a program before all others, which notes how it was called; returns the file of its calls."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, lines: str) -> Path:
        calls = folder / f"{name}.calls"
        (folder / name).write_text(f'#!/bin/bash\necho "$@" >> {calls}\n{lines}\n')
        (folder / name).chmod(0o755)
        return calls

    return put


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


# --- what is asked for ---


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800),
        ("24:00", 1440),  # minutes and seconds: Slurm's own, and told in words
        ("24:00:00", 86_400),
        ("2-12", 216_000),
        ("1-00:30", 88_200),
        ("1-02:03:04", 93_784),
    ],
)
def test_a_time_is_what_sbatch_takes_it_for(time: str, seconds: int) -> None:
    assert Request(time=time).seconds == seconds


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"time": "24h"}, "--time: '24h' is no time limit; write hours:minutes:seconds"),
        ({"time": "1:2:3:4"}, "--time: '1:2:3:4' is no time limit"),
        ({"time": ""}, "--time: '' is no time limit"),
        ({"time": "-5"}, "--time: '-5' is no time limit"),
        ({"time": "0"}, "--time: '0' is no time limit"),
        ({"time": "٣"}, "is no time limit"),
        ({"time": "999-00"}, "--time: 999-00 is more than a year"),
        ({"nodes": 0}, "--nodes: 0; write a number from 1 to"),
        ({"gpus": -1}, "--gpus: -1; write a number from 0 to"),
        ({"gpus": 0, "tasks_per_node": 0}, "--tasks-per-node: 0; write a number from 1"),
        ({"gpus": 8, "tasks_per_node": 2}, "--tasks-per-node: 2, but there is one process for each of the --gpus 8"),
        ({"cpus_per_task": 0}, "--cpus-per-task: 0"),
        ({"time": "5", "warn": 300}, "--warn: 300 seconds before its end a job of --time 5"),
        ({"warn": 0}, "--warn: 0"),
        ({"partition": " "}, "--partition: ' ' is no name"),
        ({"account": "a\nb"}, r"--account: 'a\nb' is no name"),
        ({"more": ["nodes=3"]}, "--sbatch nodes: has an option of its own, --nodes"),
        ({"more": ["array=0-3"]}, "--sbatch array: cannot be chosen: each of its jobs would train the same run"),
        ({"more": ["=3"]}, "--sbatch: '=3'; write an option of sbatch"),
        ({"more": ["a=1\n#SBATCH --uid=0"]}, "write an option of sbatch"),
        ({"setup": ["a\nb"]}, "--setup: one line of shell"),
    ],
)
def test_what_no_cluster_can_be_asked_for_is_refused_by_its_option(asked: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        Request(**asked)  # type: ignore[arg-type]
    assert words in str(refused.value)


def test_a_short_job_is_warned_in_its_last_quarter() -> None:
    assert (Request(time="2").warning, Request().warning, Request(warn=900).warning) == (30, 300, 900)


# --- the script ---


def script(capsys: pytest.CaptureFixture[str], *options: str, config: str = "c.yaml") -> str:
    assert main(["submit", config, "--dry-run", *options]) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_the_script_and_writes_nothing(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # a laptop without Slurm
    before = files(work)
    text = script(
        capsys,
        *("--nodes", "2", "--gpus", "2", "--time", "24:00:00", "--partition", "gpu", "--account", "lab"),
        *("--qos", "long", "--constraint", "a100", "--cpus-per-task", "12", "--mem", "400GB"),
        *("--sbatch", "exclusive", "--sbatch", "exclude=n7", "--setup", "module load cuda"),
    )
    assert files(work) == before
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    run = work / "runs" / "one"
    assert asked == {
        "account": "lab",
        "comment": str(run),
        "constraint": "a100",
        "cpus-per-task": "12",
        "exclude": "n7",
        "exclusive": "",
        "gpus-per-node": "2",
        "job-name": "ttt-one",
        "mem": "400GB",
        "nodes": "2",
        "ntasks-per-node": "2",
        "open-mode": "append",
        "output": f"{run}/slurm/%j_0_log.out",
        "partition": "gpu",
        "qos": "long",
        "requeue": "",
        "signal": "USR2@300",
        "time": "24:00:00",
    }
    (command,) = re.findall(r"^srun .*$", text, re.MULTILINE)
    assert command.endswith(f"{sys.executable} -u -m ttt_cli train {run}/slurm/submitted.yaml --resume")
    assert "--kill-on-bad-exit=0 --wait=300" in command, "the others end by themselves, or are killed"
    assert "--cpus-per-task=12" in command, "srun does not take it from sbatch"
    assert text.index("module load cuda") < text.index("srun ")
    assert subprocess.run(["/bin/bash", "-n"], input=text, text=True).returncode == 0


def test_a_run_without_a_name_gets_one_that_a_job_that_is_queued_again_finds(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(capsys, "--set", "run_dir=null")
    assert re.search(rf"^#SBATCH --comment={work}/runs/toy-\d{{8}}-\d{{6}}$", text, re.MULTILINE)


def test_cpus_are_asked_for_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, *CPU, "--tasks-per-node", "4")
    assert "gpus" not in text
    assert "#SBATCH --ntasks-per-node=4" in text


@pytest.mark.parametrize(
    ("code", "saves", "queued"),
    [(0, True, False), (3, True, False), (130, True, True), (130, False, True), (140, False, True), (9, False, False)],
)
def test_only_what_was_asked_to_stop_is_queued_again(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    program: Callable[[str, str], Path],
    code: int,
    saves: bool,
    queued: bool,
) -> None:
    saving = "mkdir -p runs/one/checkpoints/step_000003" if saves else ""
    ran = program("srun", f"{saving}\nexit {code}")
    again = program("scontrol", "")
    program("sleep", "")
    (work / "runs/one/slurm").mkdir(parents=True)
    environ = {**os.environ, "SLURM_JOB_ID": "7"}
    job = subprocess.run(["/bin/bash"], input=script(capsys), text=True, env=environ, capture_output=True)
    assert job.returncode == code
    assert len(ran.read_text().splitlines()) == 1
    assert (again.read_text() if again.exists() else "") == ("requeue 7\n" if queued else "")
    assert ("queued again" in job.stdout) is queued


def test_a_job_that_never_gets_to_save_is_not_queued_for_ever(
    work: Path, capsys: pytest.CaptureFixture[str], program: Callable[[str, str], Path]
) -> None:
    program("srun", '[ -e saves ] && mkdir -p "runs/one/checkpoints/step_$RANDOM$RANDOM$RANDOM"\nexit 130')
    again = program("scontrol", "")
    program("sleep", "")
    (work / "runs/one/slurm").mkdir(parents=True)
    text, environ = script(capsys), {**os.environ, "SLURM_JOB_ID": "7"}

    def tried() -> str:
        again.write_text("")
        return subprocess.run(["/bin/bash"], input=text, text=True, env=environ, stdout=subprocess.PIPE).stdout

    assert ["queued again, it" in tried() for _ in range(5)] == [True] * 4 + [False]
    assert again.read_text() == ""
    Path("saves").touch()
    assert "queued again, it" in tried()
    Path("saves").unlink()
    assert ["queued again, it" in tried() for _ in range(5)] == [True] * 4 + [False], "it counts from its last save"


def test_what_slurm_does_not_queue_again_says_how_to_go_on(
    work: Path, capsys: pytest.CaptureFixture[str], program: Callable[[str, str], Path]
) -> None:
    program("srun", "exit 130")
    program("scontrol", "exit 1")
    (work / "runs/one/slurm").mkdir(parents=True)
    job = subprocess.run(["/bin/bash"], input=script(capsys), text=True, capture_output=True)
    assert job.returncode == 130
    assert f"go on with: ttt submit {work}/runs/one\n" in job.stdout


# --- what is refused before anything is submitted ---


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--set", "train.lr=fast"], 2, "`train.lr` must be a number"),
        (["--set", "train.layrs=1"], 2, "unknown key `layrs`"),
        (["--set", "train.init_from=nowhere"], 3, "nowhere"),
        (["--nodes", "2", "--set", "train.parallel.shard=4"], 2, "train.parallel: the sizes make a multiple of 4 proc"),
        (["--gpus", "3"], 2, "train.batch_size: the 4 rows of a forward pass cannot be divided evenly among 3 proc"),
        ([*CPU, "--set", "train.device=cuda"], 2, "train.device: cuda, but --gpus 0 asks for none"),
        (["--set", "train.device=cpu"], 2, "train.device: cpu, but --gpus 1 asks for GPUs"),
        (["--time", "soon"], 2, "--time: 'soon' is no time limit"),
        (["--nodes", "two"], 2, "--nodes"),
        (["--set", "run_dir='runs/50%'"], 2, "Slurm replaces % and"),
        (["--set", "run_dir=c.yaml"], 3, "is a file"),
    ],
)
def test_nothing_is_submitted_that_would_not_train(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    program: Callable[[str, str], Path],
    options: Sequence[str],
    code: int,
    words: str,
) -> None:
    submitted, before = program("sbatch", "echo Submitted batch job 7"), files(work)
    program("squeue", "")
    assert main(["submit", "c.yaml", *options]) == code
    err = capsys.readouterr().err
    assert words in " ".join(err.split())
    assert "Traceback" not in err
    assert not submitted.exists()
    assert files(work) == before


def test_without_slurm_or_submitit_one_sentence_says_so(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(work)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        assert main(["submit", "c.yaml"]) == 3
    assert capsys.readouterr().err.startswith("error: there is no sbatch here")
    monkeypatch.delitem(sys.modules, "ttt.cluster.executor", raising=False)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["submit", "c.yaml", "--dry-run"]) == 3
    assert capsys.readouterr().err == (
        "error: jobs are made by submitit, which is not installed; pip install 'ttt-adapters[cluster]'\n"
    )
    assert files(work) == before


def test_a_job_is_submitted_and_its_folder_holds_what_it_runs(
    work: Path, capsys: pytest.CaptureFixture[str], program: Callable[[str, str], Path]
) -> None:
    asked = program("squeue", "echo '6|RUNNING|/elsewhere/runs/one'")
    program("sbatch", "echo Submitted batch job 7")
    assert main(["submit", "c.yaml", *CPU, "--set", "train.max_steps=9"]) == 0
    out = capsys.readouterr().out
    assert "submitted job 7: 1 process on the CPUs of 1 node, for at most 24 h 00 min at a time\n" in out
    assert f"log: {work}/runs/one/slurm/7_0_log.out" in out
    assert files(work / "runs") == ["one", "one/slurm", "one/slurm/7_submission.sh", "one/slurm/submitted.yaml"]
    assert "--name=ttt-one" in asked.read_text()
    Path("c.yaml").unlink()  # the job trains what was checked
    assert main(["train", "runs/one/slurm/submitted.yaml", "--resume"]) == 0
    assert json.loads(Path("runs/one/summary.json").read_text())["steps"] == 9
    capsys.readouterr()
    assert main(["submit", "runs/one", *CPU]) == 2
    assert "done already, 9 steps; raise train.max_steps to go on" in capsys.readouterr().err
    assert main(["submit", "runs/one", *CPU, "--set", "train.max_steps=12"]) == 0
    assert "goes on after step 9" in capsys.readouterr().err
    assert main(["train", "runs/one/slurm/submitted.yaml", "--resume"]) == 0
    assert json.loads(Path("runs/one/summary.json").read_text())["steps"] == 12
    capsys.readouterr()
    assert main(["submit", "runs/one", *CPU, "--set", "train.lr=0.5", "--set", "train.max_steps=20"]) == 2
    assert "train.lr" in capsys.readouterr().err
    assert main(["runs", "runs"]) == 0
    assert len(re.findall("finished", capsys.readouterr().out)) == 1


def test_a_run_that_is_trained_or_waits_already_is_not_submitted(
    work: Path, capsys: pytest.CaptureFixture[str], program: Callable[[str, str], Path]
) -> None:
    submitted = program("sbatch", "echo Submitted batch job 7")
    program("squeue", f"echo '6|PENDING|{work}/runs/one'")
    assert main(["submit", "c.yaml"]) == 2
    assert "job 6 of this run is in the queue already (pending); wait for it, or end it" in capsys.readouterr().err
    assert not Path("runs").exists()
    program("squeue", "")
    Path("runs/one").mkdir(parents=True)
    with open("runs/one/metrics.jsonl", "wb") as metrics:
        lock(metrics, Path("runs/one/metrics.jsonl"))
        assert main(["submit", "c.yaml"]) == 2
    assert "another process is training in this run_dir" in capsys.readouterr().err
    assert not submitted.exists()


@pytest.mark.parametrize("name", ["sbatch", "squeue"])
def test_what_slurm_refuses_is_told_in_its_words_and_leaves_nothing(
    work: Path, capsys: pytest.CaptureFixture[str], program: Callable[[str, str], Path], name: str
) -> None:
    program("sbatch", "echo Submitted batch job 7")
    program("squeue", "")
    program(name, f"echo '{name}: error: Batch job submission failed: no such account' >&2; exit 1")
    before = files(work)
    assert main(["submit", "c.yaml"]) == 3
    err = capsys.readouterr().err
    assert err == f"error: {name}: Batch job submission failed: no such account; nothing was submitted\n"
    assert files(work) == before


def test_what_another_run_writes_meanwhile_stays_if_slurm_refuses(
    work: Path, capsys: pytest.CaptureFixture[str], program: Callable[[str, str], Path]
) -> None:
    program("squeue", "")
    program("sbatch", "mkdir -p runs/other; echo kept > runs/other/config.yaml; echo no >&2; exit 1")
    assert main(["submit", "c.yaml", "--set", "run_dir=runs/own"]) == 3
    assert (work / "runs" / "other" / "config.yaml").read_text() == "kept\n"
    assert not (work / "runs" / "own").exists()
    assert "nothing was submitted" in capsys.readouterr().err


def test_a_job_without_a_number_may_be_there_and_keeps_its_config(
    work: Path, capsys: pytest.CaptureFixture[str], program: Callable[[str, str], Path]
) -> None:
    program("squeue", "")
    program("sbatch", "echo welcome")
    assert main(["submit", "c.yaml", "--set", "run_dir=runs/own"]) == 3
    err = capsys.readouterr().err
    assert "squeue --name ttt-own" in err
    assert "nothing was submitted" not in err
    assert (work / "runs" / "own" / "slurm" / "submitted.yaml").is_file()


# --- on a real Slurm ---


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slurm with two nodes on this machine, for as long as the test."""
    if "TTT_TEST_SLURM" not in os.environ:
        pytest.skip("a minute on a quiet machine; TTT_TEST_SLURM=1 runs it")
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {missing[0]}: apt-get install slurmctld slurmd slurm-client munge")
    if os.getuid() != 0:
        pytest.skip("slurmd starts a job as whoever submitted it, so it needs root")
    folder = tmp_path / "slurm"
    started = subprocess.run([LOOPBACK, "up", folder], capture_output=True, text=True, timeout=90)
    if started.returncode:
        pytest.skip(f"Slurm does not start here: {started.stderr.strip()}")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    try:
        yield
    finally:
        subprocess.run([LOOPBACK, "down", folder], check=True, timeout=90)


def awaited(what: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "there is no log"
        time.sleep(0.2)


def state(number: str) -> str:
    command = ["squeue", "--noheader", f"--job={number}", "--states=all", "--format=%T"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.mark.usefixtures("slurm")
def test_a_job_that_is_warned_saves_is_queued_again_and_ends_as_if_it_had_not_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm itself takes the script, warns its processes, and starts the job again."""
    assert main(["train", "c.yaml", "--set", "run_dir=whole"]) == 0
    (tmp_path / "plugins" / "toy_plugin.py").write_text(PLUGIN.format(pause=0.2))
    capsys.readouterr()
    checked = subprocess.run(["sbatch", "--test-only"], input=script(capsys, *CPU), text=True, capture_output=True)
    assert "to start at" in checked.stderr, checked.stderr

    assert main(["submit", "c.yaml", *CPU, "--time", "10"]) == 0
    (number,) = re.findall(r"submitted job (\d+)", capsys.readouterr().out)
    metrics, log = Path("runs/one/metrics.jsonl"), Path(f"runs/one/slurm/{number}_0_log.out")
    awaited(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) >= 3, log)
    assert main(["submit", "c.yaml", *CPU]) == 2, "another job of this run"
    assert main(["submit", "c.yaml", *CPU, "--partition", "nowhere", "--set", "run_dir=other"]) == 3
    assert "nvalid partition" in capsys.readouterr().err
    subprocess.run(["scancel", "--signal=USR2", number], check=True)
    awaited(lambda: state(number) == "PENDING", log)
    assert "saved" in log.read_text()
    assert len(list(Path("runs/one/checkpoints").iterdir())) == 1
    capsys.readouterr()
    assert main(["submit", "c.yaml", *CPU]) == 2
    assert f"job {number} of this run is in the queue already (pending)" in capsys.readouterr().err

    def is_completed() -> bool:
        """What is queued again waits for two minutes, which begin once its nodes are cleaned up."""
        subprocess.run(["scontrol", "update", f"jobid={number}", "starttime=now"], capture_output=True)
        return state(number) == "COMPLETED"

    awaited(is_completed, log)
    whole, resumed = (
        [(line["step"], line["loss"]) for line in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())]
        for run in ("whole", "runs/one")
    )
    assert [step for step, _ in resumed] == list(range(1, 17))
    assert resumed == whole
