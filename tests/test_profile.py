"""`ttt train --profile`: where the time of ten steps goes, by part and by operation; the run is the same."""

import gzip
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from test_train_loop import assert_same_tensors, config, lines
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from toy import ToyBackbone

from ttt.errors import EnvironmentProblem, UsageError
from ttt.train import pictures, profiling, train
from ttt.train.parts_of_a_step import BACKWARD, DATA, FORWARD, NUMBERS, OPTIMIZER, PARTS, PREFIX, Marks
from ttt.train.profile_tables import TTT_LAYERS, times_of_parts
from ttt.train.profiling import NEEDED, PROFILE, SKIPPED, STEPS, TRACE, WARM_UP
from ttt_cli.main import main


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])


def profiled(settings, capsys, *, profile=True, resume=False):
    capsys.readouterr()
    result = train(settings, ToyBackbone(), profile=profile, resume=resume)
    return result, capsys.readouterr().out


SMALL = {"backbone": {"num_layers": 1}, "ttt": {"mini_batch_size": 12}}


def fewer(monkeypatch, steps):
    """Measure fewer steps: what PyTorch makes of ten takes it some time."""
    assert (STEPS, NEEDED) == (10, 13)
    monkeypatch.setattr(profiling, "STEPS", steps)
    monkeypatch.setattr(profiling, "NEEDED", SKIPPED + WARM_UP + steps)


def rows(text):
    """The rows of the first table: name, ms, share."""
    table = text.split("\n\n")[0].split("\n")[1:]
    return {line[:20].strip(): [float(cell.rstrip("%")) for cell in line[20:].split()] for line in table}


def test_a_run_is_profiled_and_stays_the_same(tmp_path, capsys, monkeypatch):
    """With recomputation, whose forward passes of the TTT layers are in backward."""
    fewer(monkeypatch, 1)
    train_keys = {"max_steps": 5, "gradient_checkpointing": True}
    result, told = profiled(config(tmp_path / "run", **SMALL, train=train_keys), capsys)
    plain, _ = profiled(config(tmp_path / "plain", **SMALL, train=train_keys), capsys, profile=False)
    assert lines(tmp_path / "run") == lines(tmp_path / "plain")
    assert_same_tensors(result.checkpoint, plain.checkpoint)
    assert not Marks.on
    assert not {PROFILE, TRACE} & {file.name for file in (tmp_path / "plain").iterdir()}

    text = (tmp_path / "run" / PROFILE).read_text()
    assert text.split("\n")[0] in told
    table = rows(text)
    layers = "of it TTT layers"
    assert [*table] == [DATA, FORWARD, layers, BACKWARD, OPTIMIZER, NUMBERS, "other", "a step"]
    parts = sum(table[name][0] for name in (*PARTS, "other"))
    assert parts == pytest.approx(table["a step"][0], abs=0.1)
    assert table["a step"][1] == 100
    assert 0 < table[layers][0] < table[BACKWARD][0]
    operations = text.split("\n\n")[1]
    assert operations.startswith("operation")
    assert "ttt" not in operations.split("\n")[0]

    trace = json.loads(gzip.decompress((tmp_path / "run" / TRACE).read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count(f"{PREFIX}{BACKWARD}") == 1
    assert names.count(TTT_LAYERS) == 2  # and once more in backward


def test_too_few_steps_are_told_before_anything_begins(tmp_path, capsys):
    settings = config(tmp_path / "run", train={"max_steps": NEEDED - 1})
    with pytest.raises(
        UsageError, match=r"^--profile takes 13 steps, 3 .* this run has 12 left; raise train.max_steps"
    ):
        profiled(settings, capsys)
    assert not (tmp_path / "run").exists()
    profiled(settings, capsys, profile=False)
    with pytest.raises(UsageError, match="this run has 1 left"):
        profiled(config(tmp_path / "run", train={"max_steps": NEEDED}), capsys, resume=True)
    assert main(["train", str(tmp_path / "run" / "config.yaml"), "--resume", "--profile"]) == 2


class Failing(ToyBackbone):
    """Fails in its second step, as data may."""

    calls = 0

    def loss(self, model, batch, config):
        self.calls += 1
        if self.calls == 2:
            raise EnvironmentProblem("a file is gone")
        return super().loss(model, batch, config)


def test_a_run_that_stops_before_has_no_profile(tmp_path, capsys):
    with pytest.raises(EnvironmentProblem, match="a file is gone"):
        train(config(tmp_path / "run", train={"max_steps": NEEDED}), Failing(), profile=True)
    assert "no profile: the run stopped 12 steps before it was complete" in capsys.readouterr().out
    assert not Marks.on
    assert not (tmp_path / "run" / PROFILE).exists()


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    def full(profiler, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiling, "_export", full)
    fewer(monkeypatch, 1)
    result, told = profiled(config(tmp_path / "run", **SMALL, train={"max_steps": 4}), capsys)
    assert result.steps == 4
    assert "warning: the profile is lost" in told
    assert "the run goes on" in told
    assert not (tmp_path / "run" / PROFILE).exists()


# --- times, of events that are known ---


@dataclass
class Event:
    name: str
    start: float
    end: float
    sequence_nr: int = -1
    thread: int = 1
    fwd_thread: int = 0
    scope: int = 0
    kernels: list = field(default_factory=list)
    device_type: DeviceType = DeviceType.CPU

    @property
    def time_range(self):
        return SimpleNamespace(start=self.start, end=self.end, elapsed_us=lambda: self.end - self.start)


def kernel(duration):
    return SimpleNamespace(duration=duration)


def node(start, end, number, *, launched=0):
    kernels = [kernel(launched)] if launched else []
    name = "autograd::engine::evaluate_function: MmBackward0"
    return Event(name, start, end, number, thread=1, fwd_thread=1, kernels=kernels)


EVENTS = [
    Event("ProfilerStep#3", 0, 100),
    Event(PREFIX + DATA, 0, 10),
    Event(PREFIX + DATA, 2, 9),  # inside the other
    Event(PREFIX + FORWARD, 10, 40),
    Event("aten::mm", 11, 15, 5, kernels=[kernel(7)]),  # of the backbone
    Event("aten::linear", 14, 15.5, 6),  # sees the number that the layer's first node will have
    Event(TTT_LAYERS, 16, 30),
    Event("aten::mm", 17, 20, 6, kernels=[kernel(11)]),
    Event("aten::mm", 31, 33, 7),
    Event(PREFIX + BACKWARD, 40, 80),
    node(41, 45, 7, launched=3),
    node(45, 60, 6, launched=13),
    node(60, 62, 5),
    Event(TTT_LAYERS, 62, 70),  # recomputed
    Event(PREFIX + OPTIMIZER, 80, 90, kernels=[kernel(2)]),
    Event("aten::copy_", 95, 96, kernels=[kernel(1)]),
]


def test_the_time_of_each_part():
    parts, whole = times_of_parts(EVENTS)
    assert {name: time.host for name, time in parts.items()} == {
        DATA: 10, FORWARD: 30, BACKWARD: 40, OPTIMIZER: 10, NUMBERS: 0,
    }  # fmt: skip
    assert {name: time.device for name, time in parts.items()} == {
        DATA: 0, FORWARD: 18, BACKWARD: 16, OPTIMIZER: 2, NUMBERS: 0,
    }  # fmt: skip
    assert (parts[FORWARD].of_ttt.host, parts[FORWARD].of_ttt.device) == (14, 11)
    assert (parts[BACKWARD].of_ttt.host, parts[BACKWARD].of_ttt.device) == (15 + 8, 13)
    assert (whole.host, whole.device) == (100, 18 + 16 + 2 + 1)


def test_backward_of_a_layer_is_found_among_the_events_of_pytorch():
    layer, tokens = torch.nn.Linear(64, 64), torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        with record_function(PREFIX + FORWARD), record_function(TTT_LAYERS):
            loss = layer(tokens).tanh().sum()
        with record_function(PREFIX + BACKWARD):
            loss.backward()
    parts, _ = times_of_parts([*profiler.events()])
    assert 0 < parts[BACKWARD].of_ttt.host < parts[BACKWARD].host
