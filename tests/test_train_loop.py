"""The training loop on the toy backbone: exact resumption, evidence, control, and every way to stop."""

import contextlib
import errno
import faulthandler
import io
import json
import os
import pty
import shutil
import signal
import time
import warnings
from types import SimpleNamespace

import forking
import pytest
import safetensors.torch
import torch
from rich.console import Console
from safetensors.torch import load_file
from toy import Block, BlockWithTTT, ToyBackbone, ToyData, ToyOptions

from ttt import inject, interrupt
from ttt.adapter import TTTAdapter, carried
from ttt.adapter_file import MODEL, read_info
from ttt.check import load_config
from ttt.checkpoint_folder import read_checkpoint
from ttt.config import EvalConfig, RunConfig, TrainConfig, TTTConfig
from ttt.config.schema import ParallelConfig
from ttt.errors import (
    ConfigError,
    EnvironmentProblem,
    InactiveLayerError,
    NestedCheckpointWarning,
    NonFiniteError,
    PluginError,
    UsageError,
)
from ttt.files import read_header, write_tensors
from ttt.interrupt import SIGNALS, Interrupt, interruptible
from ttt.parallel.layout import Layout
from ttt.parallel.world import World
from ttt.plugins import LossOutput, Site
from ttt.plugins.rows import rows_of_step
from ttt.train import loop, pictures, saving, tasks, train
from ttt.train.checkpoint import OPTIMIZER
from ttt.train.evaluation import Evaluation, evaluate
from ttt.train.metrics import read_metrics
from ttt.train.optim import Optimizer
from ttt.train.order import WindowOrder
from ttt.train.passes import reset_rows
from ttt.train.rundir import RunDir
from ttt.train.setup import build, choose_device

TINY = {"name": "toy", "num_layers": 2, "dim": 16, "num_heads": 2}
TIMES = {"tokens_per_second", "peak_memory_bytes"}


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Drawing takes longer than these runs do, so only the tests that look for pictures draw any."""
    if request.function is not test_a_run_learns_and_leaves_everything_it_promises:
        monkeypatch.setattr(pictures, "draw_run", lambda run: [])


def config(run_dir, *, backbone=None, ttt=None, data=None, train=None, evaluate=None):
    return RunConfig(
        backbone=ToyOptions(**{**TINY, **(backbone or {})}),
        ttt=TTTConfig(**{"mini_batch_size": 4, **(ttt or {})}),
        data=ToyData(**{"window": 12, **(data or {})}),
        train=TrainConfig(**{"max_steps": 6, "lr": 3e-3, "device": "cpu", **(train or {})}),
        eval=EvalConfig(**(evaluate or {})),
        run_dir=None if run_dir is None else str(run_dir),
    )


def run(settings, backbone=None, *, resume=False):
    """Train and return the result and what was printed."""
    text = io.StringIO()
    console = Console(file=text, width=80)
    result = train(settings, backbone or ToyBackbone(), resume=resume, console=console)
    return result, text.getvalue()


def lines(run_dir):
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def tensors(checkpoint):
    return {file.name: load_file(file) for file in checkpoint.glob("*.safetensors")}


def assert_same_tensors(first, second):
    before, after = tensors(first), tensors(second)
    assert before.keys() == after.keys()
    for file, content in before.items():
        assert content.keys() == after[file].keys()
        for name, tensor in content.items():
            assert torch.equal(tensor, after[file][name]), f"{file}: {name}"


# --- what a run leaves ---


def test_a_run_learns_and_leaves_everything_it_promises(tmp_path):
    settings = config(tmp_path / "run", train={"max_steps": 40, "trainable": "all", "batch_size": 4})
    result, text = run(settings)
    assert (result.steps, result.interrupted) == (40, False)
    written = lines(tmp_path / "run")
    assert [line["step"] for line in written] == list(range(1, 41))
    assert written[-1]["loss"] == result.loss
    assert sum(line["loss"] for line in written[-5:]) < 0.8 * sum(line["loss"] for line in written[:5])
    assert {"accuracy", "lr", "grad_norm"} <= written[0].keys()
    assert [line["step"] for line in written if "layers" in line] == [1, 10, 20, 30, 40]
    for site in ("layers.0.ttt", "layers.1.ttt"):
        layer = written[-1]["layers"][site]
        assert layer["inner_loss_after"] < layer["inner_loss_before"]
        assert layer["movement"] > 0
        assert layer["gate"] != written[0]["layers"][site]["gate"]
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "config.yaml", "metrics.jsonl", "loss.png", "inner_loss.png", "summary.json", "checkpoints", "tensorboard",
    }  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert tmp_path / "run" / summary["final_checkpoint"] == result.checkpoint
    assert summary["eval_loss"] == result.evaluation.loss == written[-1]["eval_loss"]
    assert "training windows (there is no held-out data)" in text
    assert f"with the gates closed {result.evaluation.loss_gates_closed:.4f}" in text
    assert str(result.checkpoint) in text
    assert read_info(tmp_path / "run").training["steps"] == 40


def test_plain_lines_come_every_log_freq_steps(tmp_path):
    _, text = run(config(tmp_path, train={"max_steps": 7, "log_freq": 3, "evidence_freq": 100}))
    assert [line.split()[1] for line in text.splitlines() if line.startswith("step ")] == ["1/7", "3/7", "6/7", "7/7"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 6, 7]


def test_the_gate_closed_control_is_the_plain_backbone(tmp_path):
    settings = config(tmp_path, train={"max_steps": 3, "batch_size": 5})
    result, _ = run(settings)
    backbone = ToyBackbone()
    plain = backbone.build(settings.backbone, device="cpu", dtype=torch.float32)
    dataset = backbone.dataset(settings, split="train", device="cpu")
    with torch.no_grad():
        losses = [
            backbone.loss(plain, dataset.collate([dataset[window]]), settings).loss.item()
            for window in range(len(dataset))
        ]
    assert result.evaluation.windows == len(dataset) == 12
    assert result.evaluation.loss_gates_closed == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert result.evaluation.loss != result.evaluation.loss_gates_closed


def test_held_out_data_is_evaluated_and_named(tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(" ".join(str(number % 7) for number in range(61)) + "\n")
    settings = config(tmp_path / "run", data={"eval_data": str(held_out)}, evaluate={"eval_freq": 2, "max_batches": 3})
    result, text = run(settings)
    assert (result.evaluation.split, result.evaluation.windows) == ("eval", 3)
    assert [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line] == [2, 4, 6]
    assert "outer loss on 3 of 5 held-out windows" in text


def test_evaluations_in_between_change_nothing(tmp_path):
    options = {"backbone": {"dropout": 0.2}, "train": {"trainable": "all"}}
    without, _ = run(config(tmp_path / "without", **options))
    often, _ = run(config(tmp_path / "often", **options, evaluate={"eval_freq": 1}))
    assert_same_tensors(without.checkpoint, often.checkpoint)


def test_measuring_evidence_changes_nothing(tmp_path):
    rarely, _ = run(config(tmp_path / "rarely", train={"evidence_freq": 100}))
    always, _ = run(config(tmp_path / "always", train={"evidence_freq": 1}))
    assert_same_tensors(rarely.checkpoint, always.checkpoint)


def test_what_must_be_known_of_the_data_is_said(tmp_path):
    class Telling(ToyBackbone):
        def dataset(self, config, *, split, device):
            dataset = super().dataset(config, split=split, device=device)
            dataset.notice = "This data is made up."
            return dataset

    _, text = run(config(tmp_path, train={"max_steps": 1}), Telling())
    assert text.count("This data is made up.") == 1


def test_the_threads_of_the_cpu_are_those_asked_for_while_it_runs(tmp_path):
    class Counting(ToyBackbone):
        threads = 0

        def loss(self, model, batch, config):
            self.threads = torch.get_num_threads()
            return super().loss(model, batch, config)

    before = torch.get_num_threads()
    backbone = Counting()
    run(config(tmp_path, train={"max_steps": 1, "cpu_threads": before + 1}), backbone)
    assert backbone.threads == before + 1
    assert torch.get_num_threads() == before


# --- exact arithmetic ---


def test_accumulation_equals_the_larger_batch(tmp_path):
    """Windows are equally long, so the mean of the means is the mean."""
    large, _ = run(config(tmp_path / "large", train={"batch_size": 6}))
    small, _ = run(config(tmp_path / "small", train={"batch_size": 2, "num_microbatches": 3}))
    for one, other in zip(lines(tmp_path / "large"), lines(tmp_path / "small"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for name, tensor in load_file(large.checkpoint / MODEL).items():
        torch.testing.assert_close(tensor, load_file(small.checkpoint / MODEL)[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("group_size", [0, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputation_changes_no_loss(tmp_path, group_size, checkpointing):
    options = {"mini_batch_size": 2, "persistent_states": True}
    common = {"data": {"shuffle": False}, "train": {"batch_size": 2}}
    run(config(tmp_path / "plain", ttt={**options, "scan_checkpoint_group_size": 16}, **common))
    with pytest.warns(NestedCheckpointWarning) if group_size == 1 else contextlib.nullcontext():
        recomputed = config(
            tmp_path / "recomputed",
            ttt={**options, "scan_checkpoint_group_size": group_size},
            data=common["data"],
            train={**common["train"], "gradient_checkpointing": checkpointing},
        )
    run(recomputed)
    for one, other in zip(lines(tmp_path / "plain"), lines(tmp_path / "recomputed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


class Watched(ToyBackbone):
    """Remembers in which types its layers multiplied."""

    def __init__(self):
        self.seen = set()

    def build(self, options, *, device, dtype):
        model = super().build(options, device=device, dtype=dtype)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda _, __, out, name=name: self.seen.add((name, out.dtype)))
        return model

    def dtypes(self):
        return {dtype for _, dtype in self.seen}


def test_autocast_multiplies_in_bfloat16_and_spares_ttt(tmp_path):
    common = {"max_steps": 4, "batch_size": 3, "trainable": "all"}
    plain, mixed = Watched(), Watched()
    exact, _ = run(config(tmp_path / "float32", train=common), plain)
    rounded, _ = run(config(tmp_path / "bfloat16", train={**common, "autocast": "bfloat16"}), mixed)
    assert plain.dtypes() == {torch.float32}
    assert mixed.dtypes() == {torch.bfloat16}  # while it trains and while it is evaluated
    differences = [
        abs(one["loss"] - other["loss"])
        for one, other in zip(lines(tmp_path / "float32"), lines(tmp_path / "bfloat16"), strict=True)
    ]
    assert 0 < max(differences) < 0.05
    for evaluated in ("loss", "loss_gates_closed"):
        assert 0 < abs(getattr(exact.evaluation, evaluated) - getattr(rounded.evaluation, evaluated)) < 0.05
    # parameters, moments and what TTT learns while it reads stay in float32
    for file, content in tensors(rounded.checkpoint).items():
        assert {tensor.dtype for tensor in content.values()} == {torch.float32}, file


def test_the_gate_closed_control_of_autocast_is_the_plain_backbone_in_autocast(tmp_path):
    settings = config(tmp_path, train={"max_steps": 2, "batch_size": 4, "autocast": "bfloat16"})
    result, _ = run(settings)
    backbone = ToyBackbone()
    plain = backbone.build(settings.backbone, device="cpu", dtype=torch.float32)
    dataset = backbone.dataset(settings, split="train", device="cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = [
            backbone.loss(plain, dataset.collate([dataset[window + row] for row in range(4)]), settings).loss.item()
            for window in range(0, len(dataset), 4)
        ]
    assert result.evaluation.loss_gates_closed == sum(losses) / len(losses)


@pytest.mark.parametrize("group_size", [0, 2])
def test_recomputation_in_autocast_changes_nothing(tmp_path, group_size):
    """Bit for bit: what runs again runs in the types that it ran in before."""
    runs = []
    for checkpointing in (False, True):
        settings = config(
            tmp_path / str(checkpointing),
            ttt={"mini_batch_size": 2, "scan_checkpoint_group_size": group_size},
            train={"trainable": "all", "autocast": "bfloat16", "gradient_checkpointing": checkpointing},
        )
        runs.append(run(settings)[0])
    assert lines(tmp_path / "False") == lines(tmp_path / "True")
    assert_same_tensors(*(result.checkpoint for result in runs))


def test_a_weight_used_under_no_grad_first_still_learns_in_autocast(tmp_path):
    """PyTorch's cache of casts would hand on a cast without history (pytorch/pytorch, issue 112583)."""

    class Twice(ToyBackbone):
        def loss(self, model, batch, config):
            with torch.no_grad():
                super().loss(model, batch, config)
            return super().loss(model, batch, config)

    common = {"trainable": "all", "autocast": "bfloat16"}
    once, _ = run(config(tmp_path / "once", train=common))
    twice, _ = run(config(tmp_path / "twice", train=common), Twice())
    assert_same_tensors(once.checkpoint, twice.checkpoint)


def test_one_of_several_processes_that_cannot_find_the_others_is_refused_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(EnvironmentProblem, match=r"no RANK, no MASTER_ADDR, no MASTER_PORT; start the run with `ttt"):
        run(config(tmp_path / "run"))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match=r"train.parallel: the sizes make 2 processes, but this is one process; "):
        run(config(tmp_path / "run", train={"parallel": ParallelConfig(replicate=1, shard=2), "batch_size": 2}))
    assert not (tmp_path / "run").exists()


def test_checkpoints_written_beside_the_run_are_those_of_their_steps(tmp_path, monkeypatch):
    """Whatever the run changes while they are written, slowly; and one that cannot be written ends the run."""
    common = {"max_steps": 7, "ckpt_freq": 2, "ckpt_keep": None, "trainable": "all"}
    states = {"data": {"shuffle": False}, "ttt": {"persistent_states": True}}
    before, _ = run(config(tmp_path / "before", train=common, **states))
    written = saving.write_content

    def slowly(*arguments, **more):
        time.sleep(0.2)
        written(*arguments, **more)

    monkeypatch.setattr(saving, "write_content", slowly)
    beside, _ = run(config(tmp_path / "beside", train={**common, "ckpt_async": True}, **states))
    assert beside.checkpoint == tmp_path / "beside" / "checkpoints" / "step_000007"
    for step in (2, 4, 6, 7):
        folder = f"checkpoints/step_{step:06d}"
        assert_same_tensors(tmp_path / "before" / folder, tmp_path / "beside" / folder)
        assert read_checkpoint(tmp_path / "beside" / folder).state["line"]["step"] == step
    assert before.loss == beside.loss

    def full(*arguments, **more):
        raise EnvironmentProblem("the disk is full")

    monkeypatch.setattr(saving, "write_content", full)
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        run(config(tmp_path / "full", train={**common, "ckpt_async": True}))
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []


def test_a_checkpoint_that_is_being_written_outlives_what_ends_the_run(tmp_path, monkeypatch):
    written = saving.write_content

    def slowly(*arguments, **more):
        time.sleep(0.2)
        written(*arguments, **more)

    def failing(*arguments, **more):
        raise ZeroDivisionError

    monkeypatch.setattr(saving, "write_content", slowly)
    train = {"max_steps": 4, "ckpt_freq": 2, "ckpt_async": True}
    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate", failing)
        with pytest.raises(ZeroDivisionError):
            run(config(tmp_path / "evaluation", train=train, evaluate={"eval_freq": 2}))
    assert [path.name for path in (tmp_path / "evaluation" / "checkpoints").iterdir()] == ["step_000002"]
    read_checkpoint(tmp_path / "evaluation" / "checkpoints" / "step_000002")
    updated = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, step: failing() if step == 2 else updated(self, step))
    with pytest.raises(ZeroDivisionError):
        run(config(tmp_path / "step", train=train))
    assert [path.name for path in (tmp_path / "step" / "checkpoints").iterdir()] == ["step_000002"]


def test_whether_to_stop_between_tasks_is_asked_of_all_processes(monkeypatch):
    """One alone that stopped would leave the others in a task that they run together."""

    class AnotherWasAsked(World):
        def any(self, flag):
            assert not flag
            return True

    parts = SimpleNamespace(world=AnotherWasAsked(), config=SimpleNamespace(train=None))
    monkeypatch.setattr(loop, "with_averages", lambda parts, losses: Evaluation("eval", 1, 1.0, 1.0))
    monkeypatch.setattr(loop, "measure", lambda parts, step, *, stop, display: None if stop() else {})
    of_run = SimpleNamespace(done=1, display=None)
    stepping = loop.Loop(parts, of_run, None, of_run, None, None, Interrupt())
    assert stepping._evaluate() is None


@pytest.mark.parametrize(("sharded", "tensor"), [(False, 1), (True, 1), (False, 2)])
def test_a_task_that_fails_ends_the_run_only_if_others_may_wait_for_this_process(monkeypatch, sharded, tensor):
    def fails(chosen, context):
        raise MemoryError

    monkeypatch.setattr(tasks, "_measured", fails)
    monkeypatch.setattr(tasks, "in_its_name", lambda plugin, error: "MemoryError")
    said = []
    parts = SimpleNamespace(
        world=World(layout=Layout(tensor=tensor)),
        engine=SimpleNamespace(is_sharded=sharded, unsplit=lambda: None, settle=lambda: None),
        directory=SimpleNamespace(resume_command=lambda: "ttt train run --resume"),
        tasks=[SimpleNamespace(task=SimpleNamespace(name="words"), plugin=None)],
        injection=SimpleNamespace(adapters={}),
        **dict.fromkeys(("backbone", "config", "eval_dataset", "device")),
        model=torch.nn.Linear(1, 1),
    )
    display = SimpleNamespace(measuring=lambda name: None, say=said.append)
    with contextlib.ExitStack() as ends:
        if sharded or tensor > 1:
            ends.enter_context(
                pytest.raises(PluginError, match=r"task words failed .* cannot go on without each other")
            )
        assert tasks.measure(parts, 3, stop=lambda: False, display=display) == {}
    assert len(said) == (not sharded and tensor == 1)


def test_carried_states_reach_the_next_window_and_stop_at_the_next_file(tmp_path):
    """The same windows in the same order, with and without carrying, differ just where a file goes on."""
    common = {"data": {"shuffle": False, "windows_of_files": (3, 2)}, "train": {"max_steps": 5, "lr": 1e-12}}
    persistent = {"persistent_states": True, "initial_gating_alpha": 0.5}
    result, _ = run(config(tmp_path / "carried", ttt=persistent, **common))
    run(config(tmp_path / "fresh", ttt={"initial_gating_alpha": 0.5}, **common))
    differ = [
        abs(one["loss"] - other["loss"]) > 1e-4
        for one, other in zip(lines(tmp_path / "carried"), lines(tmp_path / "fresh"), strict=True)
    ]
    assert differ == [False, True, True, False, True]

    # the weights hardly learned, so evaluation, which carries too, finds what training found
    expected = sum(line["loss"] for line in lines(tmp_path / "carried")) / 5
    assert result.evaluation.loss == pytest.approx(expected, abs=1e-5)
    side_by_side = {**common, "train": {**common["train"], "batch_size": 2}}
    result, _ = run(config(tmp_path / "side by side", ttt=persistent, **side_by_side))
    assert result.evaluation.windows == 5
    assert result.evaluation.loss == pytest.approx(expected, abs=1e-5)


def test_with_files_shuffled_carried_states_reach_the_next_window_and_stop_at_the_next_file(tmp_path):
    """Again what differs from fresh states is every window but a file's first, wherever the file comes."""
    data = {"windows_of_files": (3, 2, 1)}
    common = {"data": {**data, "shuffle": "files"}, "train": {"max_steps": 12, "lr": 1e-12}}
    run(config(tmp_path / "carried", ttt={"persistent_states": True, "initial_gating_alpha": 0.5}, **common))
    run(config(tmp_path / "fresh", ttt={"initial_gating_alpha": 0.5}, **common))
    differ = [
        abs(one["loss"] - other["loss"]) > 1e-4
        for one, other in zip(lines(tmp_path / "carried"), lines(tmp_path / "fresh"), strict=True)
    ]
    order = WindowOrder([range(0, 3), range(3, 5), range(5, 6)], batch_size=1, shuffle="files", seed=0)
    read = [order.at(number) for number in range(12)]
    assert [reading.windows for reading in read[:6]] != [(number,) for number in range(6)]
    assert differ == [not reading.starts[0] for reading in read]


def test_rows_that_start_a_file_are_fresh_and_learn_the_initial_weights(tmp_path):
    backbone = ToyBackbone()
    model = backbone.build(ToyOptions(**TINY), device="cpu", dtype=torch.float32)
    injection = inject.apply(model, backbone.sites(model), TTTConfig(mini_batch_size=4))
    with carried(injection) as carry:
        model(torch.randint(16, (3, 10)))
    layer, before = injection.adapters["layers.0.ttt"].layer, carry.states["layers.0.ttt"]
    after = reset_rows(injection, carry.states, (False, True, False))["layers.0.ttt"]
    assert torch.equal(after.weights[0][[0, 2]], before.weights[0][[0, 2]])
    assert torch.equal(after.weights[0][1], layer.W1)
    assert after.opened().count.tolist() == [2, 0, 2]
    assert after.weights[0].requires_grad
    assert not before.weights[0].requires_grad
    assert reset_rows(injection, carry.states, (True, True, True)) == {}
    assert reset_rows(injection, carry.states, (False,) * 3)["layers.0.ttt"] is before


def test_both_losses_of_an_evaluation_see_the_same_random_numbers(tmp_path):
    class Noisy(ToyBackbone):
        """A loss at a random point, as a diffusion model's is."""

        def loss(self, model, batch, config):
            output = super().loss(model, batch, config)
            return LossOutput(output.loss * (1 + torch.rand(())), output.tokens)

    result, _ = run(config(tmp_path, ttt={"layers": "none"}, train={"trainable": "all"}), Noisy())
    assert result.evaluation.loss == result.evaluation.loss_gates_closed


def test_a_loss_can_ask_where_its_rows_stand_in_the_step(tmp_path):
    """In training, in an evaluation with open and with closed gates, and outside of both."""

    class Asking(ToyBackbone):
        def loss(self, model, batch, config):
            asked.append((model.training, rows_of_step(len(next(iter(batch.values()))))))
            return super().loss(model, batch, config)

    asked = []
    settings = config(tmp_path / "run", train={"max_steps": 2, "batch_size": 2, "num_microbatches": 3})
    result, _ = run(settings, Asking())
    trained = [rows for training, rows in asked if training]
    assert [(rows.first, rows.count, rows.total) for rows in trained] == [(0, 2, 6), (2, 2, 6), (4, 2, 6)] * 2
    assert [len({rows.seed for rows in trained[i : i + 3]}) for i in (0, 3)] == [1, 1]
    assert trained[0].seed != trained[3].seed
    evaluated = [rows for training, rows in asked if not training]
    assert evaluated[::2] == evaluated[1::2], "the same with open and with closed gates"
    windows = result.evaluation.windows
    assert {rows.total for rows in evaluated} == {windows}
    assert {rows.seed for rows in evaluated}.isdisjoint({rows.seed for rows in trained})
    assert len({rows.seed for rows in evaluated}) == 1
    assert [i for rows in evaluated[::2] for i in range(windows)[rows.slice]] == list(range(windows))
    assert rows_of_step(2).total == 2
    asked.clear()
    run(config(tmp_path / "run", train={"max_steps": 3, "batch_size": 2, "num_microbatches": 3}), Asking(), resume=True)
    assert [rows.first for training, rows in asked if training] == [0, 2, 4]
    assert asked[0][1].seed not in {rows.seed for rows in trained}


# --- resumption ---

RESUMED = {
    "shuffled": {"train": {"batch_size": 5}},
    "accumulated": {"train": {"batch_size": 2, "num_microbatches": 3, "warmup_steps": 3}},
    "states carried": {
        "ttt": {"persistent_states": True, "mini_batch_size": 5},
        "data": {"shuffle": False},
        "train": {"batch_size": 3, "num_microbatches": 2},
    },
    "states carried, files shuffled": {
        "ttt": {"persistent_states": True, "mini_batch_size": 5},
        "data": {"shuffle": "files"},
        "train": {"batch_size": 3, "num_microbatches": 2},
    },
    "everything learns, with dropout": {"backbone": {"dropout": 0.1}, "train": {"trainable": "all", "batch_size": 3}},
    "bfloat16": {"train": {"trainable": "ttt+attention", "param_dtype": "bfloat16", "batch_size": 3}},
    "autocast": {
        "train": {"trainable": "all", "autocast": "bfloat16", "gradient_checkpointing": True, "batch_size": 3}
    },
    "mlp, recomputed": {
        "ttt": {"layer_type": "mlp", "mini_batch_size": 2, "scan_checkpoint_group_size": 2},
        "train": {"gradient_checkpointing": True},
    },
}


@pytest.fixture(scope="module", params=RESUMED)
def whole_run(request, tmp_path_factory):
    """A run of nine steps that nobody kills: its folder, its result and its options."""
    options = {key: dict(value) for key, value in RESUMED[request.param].items()}
    options["train"] |= {"max_steps": 9, "ckpt_freq": 2, "ckpt_keep": None, "evidence_freq": 4}
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_run", lambda run: [])
        return folder, run(config(folder, **options, evaluate={"eval_freq": 4}))[0], options


@pytest.mark.parametrize("stopped_after", [2, 8])
def test_a_killed_run_resumes_bit_for_bit(whole_run, tmp_path, stopped_after):
    """A run that was killed between two checkpoints: lines beyond the last one are written, and written anew."""
    folder, whole, options = whole_run
    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    (killed / "summary.json").unlink()
    for checkpoint in (killed / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > stopped_after:
            shutil.rmtree(checkpoint)
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')  # cut short

    resumed, text = run(config(killed, **options, evaluate={"eval_freq": 4}), resume=True)
    assert f"resumed after step {stopped_after} of 9" in text
    assert lines(killed) == lines(folder)
    assert resumed.evaluation == whole.evaluation
    assert_same_tensors(whole.checkpoint, resumed.checkpoint)


def test_a_run_that_lacks_only_its_closing_evaluation_gets_it(tmp_path):
    whole, _ = run(config(tmp_path / "whole"))
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    (killed / "summary.json").unlink()
    kept = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]
    (killed / "metrics.jsonl").write_text("".join(kept))
    resumed, _ = run(config(killed), resume=True)
    assert lines(killed) == lines(tmp_path / "whole")
    assert resumed.evaluation == whole.evaluation
    assert (killed / "summary.json").exists()


def test_resuming_a_finished_run_says_so_and_touches_nothing(tmp_path):
    first, _ = run(config(tmp_path / "run"))
    before = {
        file: file.read_bytes()
        for file in (tmp_path / "run").rglob("*")
        if file.name != "config.yaml" and file.is_file()
    }
    again, text = run(config(tmp_path / "run"), resume=True)
    assert "done already, 6 steps; raise train.max_steps" in text
    assert again == first
    assert {file: file.read_bytes() for file in before} == before


def test_max_steps_can_be_raised_but_not_lowered_below_what_is_done(tmp_path):
    run(config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"max_steps: 4, but .* has done 6"):
        run(config(tmp_path / "run", train={"max_steps": 4}), resume=True)
    result, _ = run(config(tmp_path / "run", train={"max_steps": 8}), resume=True)
    assert result.steps == 8
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 9))


def test_the_summary_of_a_run_that_goes_on_goes(tmp_path):
    class Impatient(ToyBackbone):
        """Somebody presses Ctrl-C in the first step."""

        def loss(self, model, batch, config):
            signal.raise_signal(signal.SIGINT)
            return super().loss(model, batch, config)

    run(config(tmp_path / "run"))
    assert (tmp_path / "run" / "summary.json").exists()
    result, _ = run(config(tmp_path / "run", train={"max_steps": 9}), Impatient(), resume=True)
    assert (result.steps, result.interrupted) == (7, True)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_half_written_or_foreign_checkpoint_is_passed_over(tmp_path):
    options = {"train": {"max_steps": 6, "ckpt_freq": 2, "ckpt_keep": None}}
    whole, _ = run(config(tmp_path / "run", **options))
    checkpoints = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "summary.json").unlink()
    optimizer = checkpoints / "step_000006" / OPTIMIZER
    os.truncate(optimizer, optimizer.stat().st_size - 8)
    (checkpoints / "step_000099").mkdir()
    (checkpoints / ".writing-abc-step_000007").mkdir()
    shutil.copytree(whole.checkpoint, checkpoints / "step_000098")
    result, text = run(config(tmp_path / "run", **options), resume=True)
    assert "resumed after step 4 of 6" in text
    assert text.count("passed over") == 3
    assert lines(tmp_path / "run")[-1]["step"] == 6
    assert result.steps == 6
    assert not (checkpoints / ".writing-abc-step_000007").exists()


def test_the_wrong_backbone_weights_are_noticed_on_resumption(tmp_path):
    class Changed(ToyBackbone):
        def build(self, options, *, device, dtype):
            model = super().build(options, device=device, dtype=dtype)
            with torch.no_grad():
                model.head.weight.mul_(1.5)
            return model

    run(config(tmp_path / "run"))
    with pytest.raises(UsageError, match="the backbone's weights"):
        run(config(tmp_path / "run", train={"max_steps": 7}), Changed(), resume=True)


# --- interruption ---


class Slow(ToyBackbone):
    """The toy, each pass of which takes so many seconds longer."""

    pause = 0.0

    def loss(self, model, batch, config):
        time.sleep(self.pause)
        return super().loss(model, batch, config)


def train_slowly(run_dir, options, pause):
    warnings.simplefilter("error")
    backbone = Slow()
    backbone.pause = pause
    return 130 if train(config(run_dir, **options), backbone).interrupted else 0


def start(run_dir, options, *, pause):
    """The same run in a process of its own, slowed down, once it has written its third line."""
    process = forking.start(train_slowly, run_dir, options, pause)
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 3:
        assert process.poll() is None, process.communicate(120)
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def test_a_signal_finishes_the_step_saves_and_the_run_resumes_bit_for_bit(tmp_path):
    options = {
        "backbone": {"dropout": 0.1},
        "ttt": {"persistent_states": True},
        "data": {"shuffle": False},
        # Sums depend on the number of threads, and the other process would choose its own.
        "train": {"max_steps": 12, "batch_size": 3, "num_microbatches": 2, "trainable": "all", "cpu_threads": 1},
    }
    whole, _ = run(config(tmp_path / "whole", **options))
    stopped = tmp_path / "stopped"
    process = start(stopped, options, pause=0.05)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopping after this step" in err
    done = lines(stopped)[-1]["step"]
    assert 3 <= done < 12
    assert f"interrupted after step {done} of 12, saved" in out
    assert f"resume with: ttt train {stopped / 'config.yaml'} --resume" in out
    assert [checkpoint.name for checkpoint in (stopped / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    assert (stopped / "loss.png").exists()
    assert not (stopped / "summary.json").exists()

    resumed, _ = run(config(stopped, **options), resume=True)
    assert lines(stopped) == lines(tmp_path / "whole")
    assert_same_tensors(whole.checkpoint, resumed.checkpoint)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    process = start(tmp_path / "run", {"train": {"max_steps": 1000, "cpu_threads": 1}}, pause=0.5)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    time.sleep(2 * interrupt._SAME_REQUEST_SECONDS)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)  # to its end the run would take 500 s
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_second_signal_waits_while_a_line_is_written(monkeypatch):
    monkeypatch.setattr(interrupt, "_SAME_REQUEST_SECONDS", 0.0)
    written = []

    def write() -> None:
        with Interrupt() as asked, asked.held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            written.append(asked.requested)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert written == [True]


def test_in_a_job_of_slurm_its_repeated_signals_leave_the_step_time_to_be_saved(tmp_path, monkeypatch):
    """As it sends them: a warning, SIGTERM as preemption begins, and SIGTERM once more before SIGKILL."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    process = start(tmp_path / "run", {"train": {"max_steps": 1000, "cpu_threads": 1}}, pause=1.0)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(1.2 * interrupt._SAME_REQUEST_SECONDS)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "saved" in out
    assert err.count("stopping after this step") == 1
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("number", SIGNALS)
def test_in_a_job_of_slurm_only_a_second_ctrl_c_orders(monkeypatch, number):
    monkeypatch.setattr(interrupt, "_SAME_REQUEST_SECONDS", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with Interrupt() as asked:
        signal.raise_signal(number)
        for again in set(SIGNALS) - {signal.SIGINT}:
            signal.raise_signal(again)
        assert asked.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_asks_once_and_orders_twice(monkeypatch, number):
    monkeypatch.setattr(interrupt, "_SAME_REQUEST_SECONDS", 0.0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(number)
    with Interrupt() as asked:
        signal.raise_signal(number)
        assert asked.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_signals_that_come_together_are_one_request(monkeypatch):
    """As `timeout` and a closed terminal send them."""
    monkeypatch.setattr(interrupt, "_SAME_REQUEST_SECONDS", 60.0)
    with Interrupt() as asked:
        for number in SIGNALS:
            signal.raise_signal(number)
        assert asked.requested


def test_handlers_of_others_stay():
    """Those of an application that trains as a part of it; and what nohup asks for."""
    calls = []

    def own(number, frame):
        calls.append(number)

    before = {number: signal.signal(number, own) for number in (signal.SIGUSR1, signal.SIGINT)}
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as asked:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGHUP)
            assert (calls, asked.requested) == ([signal.SIGUSR1], False)
            signal.raise_signal(signal.SIGINT)
            assert (calls, asked.requested) == ([signal.SIGUSR1], True)
        assert signal.getsignal(signal.SIGINT) is own
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hung_up)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_is_caught_outside_python_stays():
    faulthandler.register(signal.SIGUSR2)
    try:
        with Interrupt() as asked:
            assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL, "the library took over what faulthandler has"
        with Interrupt(own_process=True) as asked:
            asked.begin()
            signal.raise_signal(signal.SIGUSR2)
            assert asked.requested, "a program of its own heeds every signal"
    finally:
        faulthandler.unregister(signal.SIGUSR2)
        for number in SIGNALS:  # a program of its own leaves them ignored
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def test_inside_another_a_request_is_the_same():
    with Interrupt() as outer, interruptible() as inner:
        signal.raise_signal(signal.SIGTERM)
        assert inner is outer
        assert outer.requested
    with interruptible() as later:
        assert not later.requested


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_leaves_signals_to_its_parent_and_ends_by_sigterm():
    """Workers that read data share the terminal with the run that they work for."""
    with Interrupt():
        child = os.fork()
        if child == 0:
            for number in SIGNALS:
                if number != signal.SIGTERM:
                    signal.raise_signal(number)
                    signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_before_the_first_step_nothing_is_written(tmp_path):
    class Impatient(ToyBackbone):
        """Somebody asks to stop while the data is read."""

        built = False

        def dataset(self, config, *, split, device):
            signal.raise_signal(signal.SIGTERM)
            return super().dataset(config, split=split, device=device)

        def build(self, options, *, device, dtype):
            self.built = True
            return super().build(options, device=device, dtype=dtype)

    backbone = Impatient()
    result, text = run(config(tmp_path / "run"), backbone)
    assert (result.interrupted, result.steps, result.checkpoint) == (True, 0, None)
    assert "nothing was written: the same command starts it again" in text
    assert not (tmp_path / "run").exists()
    assert not backbone.built, "it went on to the next stage"


def test_a_signal_while_pictures_are_drawn_lets_them_be_finished(tmp_path, monkeypatch):
    def drawn(path):
        signal.raise_signal(signal.SIGUSR1)
        (path / "loss.png").touch()
        return []

    monkeypatch.setattr(pictures, "draw_run", drawn)
    result, text = run(config(tmp_path / "run"))
    assert not result.interrupted
    assert "nothing is left to do" in text
    assert (tmp_path / "run" / "loss.png").exists()


@pytest.mark.parametrize("gone", ["terminal", "pipe"])
def test_a_run_outlives_its_output(tmp_path, gone):
    """The terminal is closed, or what reads the pipe ends: printing fails from then on, the run does not."""
    reader, writer = pty.openpty() if gone == "terminal" else os.pipe()
    output = open(writer, "w", encoding="utf-8")  # noqa: SIM115 - closed below, as far as it can be

    class Closing(ToyBackbone):
        passes = 0

        def loss(self, model, batch, config):
            self.passes += 1
            if self.passes == 2:
                os.close(reader)
            return super().loss(model, batch, config)

    result = train(config(tmp_path / "run"), Closing(), console=Console(file=output))
    with pytest.raises(OSError, match="Input/output error" if gone == "terminal" else "Broken pipe"):
        output.close()
    assert (result.steps, result.interrupted) == (6, False)
    assert len(lines(tmp_path / "run")) == 6
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_interrupted_closing_evaluation_is_done_when_resumed(tmp_path):
    class Impatient(ToyBackbone):
        """Somebody presses Ctrl-C while the closing evaluation runs."""

        pressed = False

        def loss(self, model, batch, config):
            if not model.training and not self.pressed:
                self.pressed = True
                signal.raise_signal(signal.SIGINT)
            return super().loss(model, batch, config)

    whole, _ = run(config(tmp_path / "whole"))
    before = signal.getsignal(signal.SIGINT)
    stopped, text = run(config(tmp_path / "stopped"), Impatient())
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.interrupted
    assert stopped.steps == 6
    assert "resume with" in text
    resumed, _ = run(config(tmp_path / "stopped"), resume=True)
    assert resumed.evaluation == whole.evaluation
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


# --- what is not finite ---


def test_a_loss_that_is_not_finite_names_its_window_and_keeps_the_steps_before(tmp_path):
    options = {"data": {"shuffle": False}, "train": {"max_steps": 6, "batch_size": 2}}
    poisoned = {**options, "data": {"shuffle": False, "poisoned": (7,)}}
    with pytest.raises(NonFiniteError) as caught:
        run(config(tmp_path / "run", **poisoned))
    message = str(caught.value)
    assert message.startswith("step 4: the loss is nan on stream 1, tokens 12-24; stream 2, tokens 0-12; stopped")
    saved = tmp_path / "run" / "checkpoints" / "step_000003"
    assert f"the 3 steps before it are saved in {saved}" in message
    assert "\n" not in message

    clean, _ = run(config(tmp_path / "clean", train={**options["train"], "ckpt_freq": 3}, data=options["data"]))
    assert_same_tensors(clean.checkpoint.with_name("step_000003"), saved)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_carried_states_of_the_steps_before_are_kept_too(tmp_path):
    """The second of three passes fails, when the first has carried its states on already."""
    options = {"ttt": {"persistent_states": True}, "train": {"max_steps": 3, "num_microbatches": 3}}
    with pytest.raises(NonFiniteError, match="step 3"):
        run(config(tmp_path / "run", **options, data={"shuffle": False, "poisoned": (7,)}))
    options["train"]["ckpt_freq"] = 1
    run(config(tmp_path / "clean", **options, data={"shuffle": False}))
    assert_same_tensors(*(tmp_path / name / "checkpoints" / "step_000002" for name in ("clean", "run")))


def test_weights_that_may_be_half_updated_are_not_saved(tmp_path, monkeypatch):
    step = Optimizer.step

    def interrupted_step(self, number):
        rates = step(self, number)
        if number == 2:
            raise RuntimeError("can't allocate memory: the rest of the update")
        return rates

    monkeypatch.setattr(Optimizer, "step", interrupted_step)
    with pytest.raises(EnvironmentProblem, match="out of memory"):
        run(config(tmp_path / "run"))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_gradient_that_is_not_finite_stops_before_the_optimiser_step(tmp_path):
    class Exploding(ToyBackbone):
        """A loss that is finite, with a gradient that is not, on the third pass."""

        passes = 0

        def loss(self, model, batch, config):
            output = super().loss(model, batch, config)
            if model.training:
                self.passes += 1
            if self.passes == 3:
                output.loss.register_hook(lambda gradient: gradient * float("inf"))
            return output

    with pytest.raises(NonFiniteError, match=r"step 3: the gradient is (nan|inf) on stream \d"):
        run(config(tmp_path / "run"), Exploding())
    clean, _ = run(config(tmp_path / "clean", train={"ckpt_freq": 2}))
    assert_same_tensors(clean.checkpoint.with_name("step_000002"), tmp_path / "run" / "checkpoints" / "step_000002")


def test_a_first_step_that_is_not_finite_leaves_no_run_behind(tmp_path):
    with pytest.raises(NonFiniteError, match="step 1"):
        run(config(tmp_path / "run", data={"poisoned": tuple(range(12))}))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    run(config(tmp_path / "run"))


def test_a_metric_that_is_not_finite_is_null(tmp_path):
    class Odd(ToyBackbone):
        def loss(self, model, batch, config):
            output = super().loss(model, batch, config)
            return type(output)(output.loss, output.tokens, {"odd": torch.tensor(float("nan"))})

    run(config(tmp_path / "run", train={"ckpt_freq": 1}), Odd())
    assert all(line["odd"] is None for line in lines(tmp_path / "run"))


# --- layers that do nothing ---


class BlockThatForgets(BlockWithTTT):
    def after_attention(self, x, cache):
        return x


class AdapterWithoutRate(TTTAdapter):
    """Inner learning at a rate of exactly 0."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.layer.register_forward_pre_hook(self._silence)

    def _silence(self, layer, args):
        with torch.no_grad():
            layer.learnable_ttt_lr_weight.zero_()
            layer.learnable_ttt_lr_bias.fill_(-1e9)


class AdapterWithoutGradient(TTTAdapter):
    def forward(self, x, *, rotary=None):
        return x + (super().forward(x, rotary=rotary) - x).detach()


def sabotaged(**changes):
    class Sabotaged(ToyBackbone):
        def sites(self, model):
            return [Site(**{**vars(site), **changes}) if site.layer == 1 else site for site in super().sites(model)]

    return Sabotaged()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subclass": BlockThatForgets}, r"layers\.1\.ttt: .* never reached it"),
        ({"adapter": AdapterWithoutRate}, r"layers\.1\.ttt: the fast weights .* did not move"),
        ({"adapter": AdapterWithoutGradient}, r"layers\.1\.ttt: no gradient reaches"),
    ],
)
def test_a_layer_that_does_nothing_fails_on_the_first_step(tmp_path, changes, message):
    with pytest.raises(InactiveLayerError, match=message):
        run(config(tmp_path / "run"), sabotaged(**changes))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


class BlockThatKeepsTheState(BlockWithTTT):
    """Calls the adapter beside its forward, so that what `carried` hands out and takes in never meets it."""

    def after_attention(self, x, cache):
        return self.ttt.adapt(x)[0]


def test_states_that_nobody_hands_on_are_an_error_in_the_first_step(tmp_path):
    backbone = sabotaged(subclass=BlockThatKeepsTheState)
    result, _ = run(config(tmp_path / "fresh"), backbone)
    assert result.steps == 6
    carried_on = config(tmp_path / "run", ttt={"persistent_states": True}, data={"shuffle": False})
    with pytest.raises(InactiveLayerError, match=r"layers\.1\.ttt: ttt.persistent_states.* the backbone toy does not"):
        run(carried_on, backbone)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_states_that_nobody_hands_on_are_an_error_in_an_evaluation_too():
    class OnlyInTraining(BlockThatKeepsTheState):
        def after_attention(self, x, cache):
            return self.ttt(x) if self.training else super().after_attention(x, cache)

    backbone = sabotaged(subclass=OnlyInTraining)
    wanted = config("unused", ttt={"persistent_states": True}, data={"shuffle": False})
    device = torch.device("cpu")
    model, injection = build(wanted, backbone, device)
    dataset = backbone.dataset(wanted, split="train", device=device)
    with pytest.raises(InactiveLayerError, match=r"layers\.1\.ttt: ttt.persistent_states"):
        evaluate(model, injection, backbone, wanted, dataset, split="train", device=device)


def test_a_gate_at_zero_that_cannot_learn_is_refused(tmp_path):
    with pytest.raises(InactiveLayerError, match="alpha_lr_multiplier"):
        run(config(tmp_path / "run", ttt={"initial_gating_alpha": 0.0}, train={"alpha_lr_multiplier": 0.0}))


@pytest.mark.parametrize(
    "options",
    [
        {"ttt": {"initial_gating_alpha": 0.0}},
        {"ttt": {"mini_batch_size": 64}},
        {"ttt": {"layers": "none"}, "train": {"trainable": "all"}},
        {"train": {"weight_lr_multiplier": 0.0}},
    ],
    ids=["gate at zero", "less than a mini-batch", "no layers", "gates alone learn"],
)
def test_unusual_runs_that_are_sound_go_through(tmp_path, options):
    result, _ = run(config(tmp_path / "run", **options))
    assert result.steps == 6


# --- before anything is written ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ttt": {"persistent_states": True}}, ConfigError, "write data.shuffle: false"),
        (
            {"ttt": {"persistent_states": True}, "data": {"shuffle": False}, "train": {"batch_size": 5}},
            ConfigError,
            "batch_size: 5 .* has 4",
        ),
        ({"ttt": {"layers": "none"}}, ConfigError, "nothing would learn"),
        ({"ttt": {"layers": [2]}}, UsageError, "layer 2 does not exist"),
        ({"data": {"train_data": "missing.txt"}}, EnvironmentProblem, "missing.txt"),
    ],
)
def test_what_cannot_run_writes_nothing(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run(config(tmp_path / "run", **options))
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_for_a_checkpoint_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("ttt.files.places.free_bytes", lambda path: 1000)
    with pytest.raises(EnvironmentProblem, match=r"one checkpoint of this run takes .* only 1000 bytes are free"):
        run(config(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_used_run_dir_is_refused_with_the_way_on(tmp_path):
    run(config(tmp_path / "run", train={"max_steps": 1}))
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(UsageError, match=r"already holds a run; continue it with `ttt train .*config\.yaml --resume`"):
        run(config(tmp_path / "run"))
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"train\.device: cuda, but .* no CUDA device; write auto or cpu"):
        run(config(tmp_path / "run", train={"device": "cuda"}))
    assert list(tmp_path.iterdir()) == []
    assert choose_device("auto") == torch.device("cpu")


# --- the disk fills up while training ---


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(tmp_path, monkeypatch):
    options = {"train": {"max_steps": 6, "ckpt_freq": 2}}
    whole, _ = run(config(tmp_path / "whole", **options))
    save, written = safetensors.torch.save_file, []

    def full_later(tensors, path, metadata=None):
        written.append(path)
        if len(written) > 3:  # the second file of the second checkpoint
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full_later)
        with pytest.raises(EnvironmentProblem, match="no space left on the disk") as caught:
            run(config(tmp_path / "run", **options))
    assert "\n" not in str(caught.value)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    resumed, _ = run(config(tmp_path / "run", **options), resume=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert_same_tensors(whole.checkpoint, resumed.checkpoint)


def test_a_failure_inside_a_step_keeps_the_steps_before(tmp_path):
    class Breaking(ToyBackbone):
        """A recording that turns out to be unreadable."""

        def dataset(self, config, *, split, device):
            dataset = super().dataset(config, split=split, device=device)
            read = type(dataset).__getitem__

            class Broken(type(dataset)):
                def __getitem__(self, index):
                    if index == 4:
                        raise EnvironmentProblem("recording 4: cannot be read")
                    return read(self, index)

            dataset.__class__ = Broken
            return dataset

    with pytest.raises(EnvironmentProblem, match=r"recording 4: cannot be read; the 4 steps before it are saved in"):
        run(config(tmp_path / "run", data={"shuffle": False}), Breaking())
    assert RunDir(tmp_path / "run").latest()[0].step == 4


def test_a_plain_run_config_keeps_the_backbones_own_options(tmp_path):
    run(config(tmp_path / "run", train={"max_steps": 1}))
    assert "dim: 16" in (tmp_path / "run" / "config.yaml").read_text()
    assert isinstance(ToyBackbone().build(ToyOptions(**TINY), device="cpu", dtype=torch.float32).layers[0], Block)


def test_out_of_memory_says_what_takes_less(tmp_path):
    class Greedy(ToyBackbone):
        def loss(self, model, batch, config):
            torch.empty(1 << 60)
            return super().loss(model, batch, config)

    with pytest.raises(EnvironmentProblem, match=r"out of memory: .* What takes less: a smaller train\.batch_size"):
        run(config(tmp_path / "run"), Greedy())


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((1.0, 2.0), "TTT lowers it by 50.00%"),
        ((3.0, 2.0), "TTT RAISES it by 50.00%"),
        ((2.0, 2.0), "TTT makes no difference"),
        ((float("nan"), 2.0), "TTT cannot be compared"),
    ],
)
def test_the_control_is_told_in_words(losses, words):
    assert Evaluation("eval", 3, *losses).in_words().endswith(words)


# --- what is told beside the metrics is never the end of a run ---


def test_pictures_that_cannot_be_drawn_are_warned_of(tmp_path, monkeypatch):
    def fails(run):
        raise RuntimeError("Failed to find font DejaVu Sans")

    monkeypatch.setattr(pictures, "draw_run", fails)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file in its place")
    said = io.StringIO()
    settings = config(tmp_path / "run", train={"max_steps": 1})
    result = train(settings, ToyBackbone(), console=Console(file=said, width=200))
    assert (result.run_dir / "summary.json").is_file()
    warnings = [line for line in said.getvalue().splitlines() if line.startswith("warning: ")]
    assert warnings == [
        f"warning: nothing more is written for TensorBoard in {tmp_path / 'run' / 'tensorboard'} (File exists); "
        "the run goes on",
        f"warning: the pictures in {tmp_path / 'run'} cannot be drawn (RuntimeError: Failed to find font DejaVu Sans); "
        "the run goes on",
    ]
    assert "pictures:" not in said.getvalue()


def from_before_the_targets_own_epsilon(folder):
    """A run as a ttt without `target_eps` wrote it: no file of it has the key, and the adapter's format is 2."""
    text = (folder / "config.yaml").read_text()
    old = "".join(line for line in text.splitlines(keepends=True) if "target_eps" not in line)
    content, _, _ = old.rpartition("# sha256")
    (folder / "config.yaml").write_text(content if content else old)
    for checkpoint in (folder / "checkpoints").iterdir():
        file = checkpoint / "adapter_model.safetensors"
        metadata = read_header(file).metadata
        settings = json.loads(metadata["adapter_config"])
        settings["version"] = 2
        del settings["ttt"]["target_eps"]
        write_tensors(file, load_file(file), {**metadata, "adapter_config": json.dumps(settings)})
        (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        del state["config"]["ttt"]["target_eps"]
        del state["sha256"]
        state["files"] = {name: (checkpoint / name).stat().st_size for name in state["files"]}
        (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "version": 1}))


def test_a_run_from_before_the_targets_own_epsilon_goes_on_with_the_one_that_it_had(tmp_path):
    ttt = {"normalize_target": True, "ln_eps": 0.25}
    options = {"train": {"max_steps": 4, "ckpt_freq": 2, "ckpt_keep": None}}
    whole, _ = run(config(tmp_path / "whole", ttt={**ttt, "target_eps": 0.25}, **options))
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    (killed / "summary.json").unlink()
    shutil.rmtree(killed / "checkpoints" / "step_000004")
    from_before_the_targets_own_epsilon(killed)

    with pytest.raises(ConfigError, match=r"ttt\.target_eps: 0\.25 in the run, 1e-08 now\); take these back"):
        run(config(killed, ttt=ttt, **options), resume=True)
    stored = load_config(killed / "config.yaml", backbone=ToyBackbone(), resuming=True).config
    assert stored.ttt.target_eps == 0.25
    resumed, text = run(stored.model_copy(update={"run_dir": str(killed)}), resume=True)
    assert "resumed after step 2 of 4" in text
    assert_same_tensors(whole.checkpoint, resumed.checkpoint)
    assert "target_eps: 0.25" in (killed / "config.yaml").read_text()
