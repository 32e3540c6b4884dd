"""Several processes on one run: which does what, and which rows each reads."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forking
import pytest
import several
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ttt.config.schema import ParallelConfig, TrainConfig
from ttt.parallel.engine import Engine
from ttt.parallel.layout import Layout, layout_of, uneven
from ttt.parallel.world import DIMENSIONS, World
from ttt.plugins import LossOutput
from ttt.train import tasks
from ttt.train.checkpoint import Content
from ttt.train.evaluation import Evaluation
from ttt.train.learnable import Learnable
from ttt.train.optim import Optimizer
from ttt.train.rescue import Rescue


def _parallel(**sizes: object) -> ParallelConfig:
    return ParallelConfig.model_validate(sizes)


@pytest.mark.parametrize(
    ("sizes", "processes", "layout"),
    [
        ({}, 1, Layout()),
        ({}, 4, Layout(replicate=4)),
        ({"shard": 2}, 4, Layout(replicate=2, shard=2)),
        ({"shard": 2, "tensor": 2}, 8, Layout(2, 2, 2)),
        ({"replicate": 1, "shard": "auto"}, 4, Layout(shard=4)),
        ({"shard": "auto"}, 4, Layout(shard=4)),
        ({"replicate": 2, "shard": "auto", "tensor": 3}, 12, Layout(2, 2, 3)),
        ({"replicate": 1, "shard": 2, "tensor": 2}, 4, Layout(1, 2, 2)),
    ],
)
def test_an_auto_size_is_what_the_others_leave(sizes: dict[str, object], processes: int, layout: Layout) -> None:
    assert layout_of(_parallel(**sizes), processes) == layout
    assert layout.size == processes


@pytest.mark.parametrize(
    ("sizes", "processes", "made"),
    [
        ({"shard": 2}, 3, "a multiple of 2 processes"),
        ({"replicate": 1, "shard": 2}, 4, "make 2 processes"),
        ({"replicate": 4}, 1, "make 4 processes"),
        ({"replicate": 2, "shard": "auto", "tensor": 3}, 8, "a multiple of 6 processes"),
        ({"replicate": 1, "shard": 1, "tensor": 1}, 2, "make 1 processes"),
    ],
)
def test_sizes_that_do_not_make_the_processes_are_refused(sizes: dict[str, object], processes: int, made: str) -> None:
    with pytest.raises(ValueError, match=made):
        layout_of(_parallel(**sizes), processes)


def test_two_sizes_cannot_both_be_what_is_left() -> None:
    with pytest.raises(ValueError, match="both be what the other leaves"):
        _parallel(replicate="auto", shard="auto")


def test_every_row_is_read_once_and_by_each_of_a_tensor_group() -> None:
    layout = Layout(2, 3, 2)
    worlds = [World(rank, layout) for rank in range(layout.size)]
    assert [world.data_rank for world in worlds] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [world.tensor_rank for world in worlds] == [0, 1] * 6
    rows = list(range(12))
    assert [row for world in worlds[::2] for row in rows[world.rows(12)]] == rows
    assert all(worlds[rank].rows(12) == worlds[rank + 1].rows(12) for rank in range(0, 12, 2))
    assert [world.first for world in worlds] == [True] + [False] * 11
    with pytest.raises(ValueError, match="13 rows cannot be divided evenly among 6 processes"):
        worlds[0].rows(13)


def test_rows_that_cannot_be_divided_are_told() -> None:
    assert uneven(TrainConfig(batch_size=4), Layout(2, 2, 3)) is None
    said = uneven(TrainConfig(batch_size=3), Layout(replicate=2))
    assert said == "the 3 rows of a forward pass cannot be divided evenly among 2 processes (replicate 2)"


def test_alone_nothing_is_asked_of_anybody() -> None:
    world = World()
    tensor = torch.ones(3, requires_grad=True)
    assert world.sum(tensor) is tensor
    assert (world.any(True), world.any(False)) == (True, False)
    assert world.rows(7) == slice(0, 7)
    assert (world.mesh, world.alone, world.first, world.size, world.data_size) == (None, True, True, 1, 1)


def test_what_is_kept_in_float32_because_it_is_split_is_written_as_it_is_used() -> None:
    lora = nn.Parameter(torch.tensor([1.001, 2.0]))
    optimizer = Optimizer([Learnable("lora", lora, "lora", decays=True)], TrainConfig(), used_in={"lora": torch.half})
    injection: Any = SimpleNamespace(state_dict=lambda: {"lora": lora.detach(), "w": torch.ones(1)})
    content = Content.gathered(injection, {}, optimizer, None, World())
    assert (content.adapters["lora"].dtype, content.adapters["w"].dtype) == (torch.half, torch.float32)
    assert content.optimizer is not None
    torch.testing.assert_close(content.optimizer["master.lora"], lora.detach(), rtol=0, atol=0)


def test_no_process_runs_shared_heads_alone_to_find_a_cause() -> None:
    """The others have left by then, and would be waited for."""
    parts: Any = SimpleNamespace(
        world=World(layout=Layout(tensor=2)),
        engine=SimpleNamespace(is_sharded=False),
        eval_dataset=SimpleNamespace(describe=lambda window: f"window {window}"),
        directory=SimpleNamespace(resume_command=lambda: "ttt train c.yaml --resume"),
    )
    of_run: Any = SimpleNamespace(done=3, saved="step_000003")
    evaluation = Evaluation("eval", 1, float("nan"), 1.0, first_not_finite=(0,))
    told = str(Rescue(parts, of_run, of_run).of_evaluation(evaluation))
    assert told.endswith("all steps are saved in step_000003, and `ttt train c.yaml --resume` in one process says why")


# --- two processes ---


class Mixed(nn.Module):
    """Parameters in half precision and in float32, as of a backbone and its adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.adapter = nn.Linear(3, 3).to(torch.bfloat16), nn.Linear(3, 1)


def _loss(model: Any, x: Tensor) -> LossOutput:
    return LossOutput(model.adapter(model.backbone(x.bfloat16()).float()).sum(), tokens=1)


def _gradients_of_two_passes(rank: int, world: World) -> None:
    """Gradients in half precision are taken over after each pass, as the optimiser does; the others are added up."""
    model, alone, taken = Mixed(), Mixed(), {}
    engine = Engine(model, _loss, world)
    for number in range(2):
        batches = torch.arange(12.0).view(2, 2, 3) + number
        with engine.backward(last=number == 1):
            engine.loss(batches[rank]).loss.backward()
            for name, parameter in model.backbone.named_parameters():
                taken[name] = taken.get(name, 0) + parameter.grad.float()
                parameter.grad = None
        for batch in batches:
            _loss(alone, batch).loss.backward()
    for name, parameter in alone.adapter.named_parameters():
        torch.testing.assert_close(model.adapter.get_parameter(name).grad, parameter.grad)
    for name, parameter in alone.backbone.named_parameters():
        torch.testing.assert_close(taken[name], parameter.grad.float(), rtol=0.02, atol=0.02)


def _a_task_beside_split_parameters(world: World) -> None:
    """Parameters that are gathered for a task are not taken for ones that it has changed."""
    model = nn.Linear(4, 2)
    engine = Engine(model, lambda model, x: LossOutput(model(x).sum(), tokens=1), world)
    engine.loss(torch.ones(1, 4)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    engine.settle()
    tasks._measured = lambda chosen, context: {"a": 1.0}
    parts: Any = SimpleNamespace(
        **dict.fromkeys(("backbone", "config", "eval_dataset", "device")),
        **{"model": model, "engine": engine, "world": world, "injection": SimpleNamespace(adapters={})},
        tasks=[SimpleNamespace(task=SimpleNamespace(name="a"), plugin=None)],
    )
    display: Any = SimpleNamespace(measuring=lambda name: None)
    assert tasks.measure(parts, 1, stop=lambda: False, display=display) == {"a": 1.0}


def _both(rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World(rank, Layout(replicate=2), init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=DIMENSIONS))
    _gradients_of_two_passes(rank, world)
    split = World(rank, Layout(shard=2), init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=DIMENSIONS))
    _a_task_beside_split_parameters(split)
    dist.destroy_process_group()


def _in_two_processes() -> int:
    return several.together(2, _both)


def test_gradients_count_once_beside_half_precision_and_tasks_see_whole_parameters() -> None:
    with forking.start(_in_two_processes) as process:
        _, err = process.communicate(120)
    assert process.returncode == 0, err


KILLED = """
import forking, os, signal, sys, time

def sleep():
    os.write(int(sys.argv[1]), b"s")
    time.sleep(120)

def parent():
    alone = os.getpid()
    if os.fork() == 0:
        forking.end_with(alone)
    sleep()

forking._SOON_NEEDED = ()
forking.begin()
forking.start(parent)
time.sleep(120)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system can end processes with their parent")
def test_forked_processes_end_with_tests_that_are_killed() -> None:
    ours, theirs = os.pipe()
    words = [sys.executable, "-c", KILLED, str(theirs)]
    told = b""
    with subprocess.Popen(words, pass_fds=[theirs], env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}) as it:
        os.close(theirs)
        while len(told) < 2:
            told += os.read(ours, 2)
        it.kill()
    assert select.select([ours], [], [], 60)[0], "a process lives on"
    assert os.read(ours, 1) == b""
    os.close(ours)
