"""What `srun` tells a process, in torchrun's words."""

from __future__ import annotations

import pytest

from ttt.machine import processes_launched
from ttt.slurm import first_host, torchrun_variables
from ttt_cli.main import main

STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "n[1-3],m9",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_CPUS_PER_TASK": "6",
}
"""Of one process of seven, as Slurm 22.05 sets them; of the sixth."""


def test_a_task_of_srun_is_a_process_of_torchrun() -> None:
    assert torchrun_variables(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "15041",
        "OMP_NUM_THREADS": "6",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    alone_on_its_core = {name: value for name, value in STEP.items() if name != "SLURM_CPUS_PER_TASK"}
    assert torchrun_variables(alone_on_its_core)["OMP_NUM_THREADS"] == "1"
    last = {**STEP, "SLURM_NODEID": "3", "SLURM_LOCALID": "0", "SLURM_PROCID": "6"}
    assert torchrun_variables(last)["LOCAL_WORLD_SIZE"] == "1"


def test_every_job_restart_and_step_listens_elsewhere() -> None:
    ports = {
        torchrun_variables({**STEP, **more})["MASTER_PORT"]
        for more in ({}, {"SLURM_JOB_ID": "42"}, {"SLURM_RESTART_COUNT": "2"}, {"SLURM_STEP_ID": "3"})
    }
    assert len(ports) == 4
    far = torchrun_variables({**STEP, "SLURM_JOB_ID": "987654321"})["MASTER_PORT"]
    assert 15_000 <= int(far) < 30_000


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {name: value for name, value in STEP.items() if name != "SLURM_STEP_NUM_TASKS"},  # a job's script, `salloc`
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty bash`
        {**STEP, "WORLD_SIZE": "16"},  # torchrun in a task
        {**STEP, "SLURM_STEP_NUM_TASKS": "many"},
        {**STEP, "SLURM_PROCID": ""},
    ],
)
def test_whoever_srun_did_not_start_beside_others_is_alone(environ: dict[str, str]) -> None:
    assert torchrun_variables(environ) == {}


def test_what_the_user_chose_stays() -> None:
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "3", "TORCH_CPP_LOG_LEVEL": "INFO"}
    assert torchrun_variables({**STEP, **chosen}).items() >= chosen.items()


@pytest.mark.parametrize(("hosts", "address"), [("localhost", "localhost"), ("n[1-2].invalid", "10.1.2.3")])
def test_a_host_whose_name_is_not_known_is_called_by_its_address(hosts: str, address: str) -> None:
    step = {**STEP, "SLURM_STEP_NODELIST": hosts, "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3"}
    assert torchrun_variables(step)["MASTER_ADDR"] == address


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n[01-04,07],m2", "n01"),
        ("gpu-a[3,5-7]-ib,gpu-b1", "gpu-a3-ib"),
        ("rack[1-2]n[10-12]", "rack1n10"),
        ("a.b.c,d", "a.b.c"),
        ("", "localhost"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_a_command_under_srun_knows_how_many_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in torchrun_variables(STEP):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0
    assert processes_launched() == 7
