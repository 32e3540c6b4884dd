"""Averaged weights (`train.ema_decay`): what they are, evaluated, saved as an adapter, resumed bit for bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_train_loop import assert_same_tensors, config, lines, run
from toy import ToyBackbone

from ttt.adapter_file import MODEL, load_adapter, read_info
from ttt.check import check_config
from ttt.checkpoint_folder import EMA, TRAINER_STATE, read_checkpoint, step_folder
from ttt.errors import EnvironmentProblem
from ttt.files import read_json
from ttt.train import pictures
from ttt.train.averages import Averages, applied
from ttt.train.checkpoint import OPTIMIZER
from ttt.train.evaluation import evaluate
from ttt.train.learnable import choose_learnable
from ttt.train.optim import Optimizer
from ttt.train.setup import build
from ttt_cli.main import main

DECAY = 0.5
TTT = {"train": {"max_steps": 5, "ckpt_freq": 2, "ckpt_keep": None, "batch_size": 3, "ema_decay": DECAY}}
HALF = {
    "train": {**TTT["train"], "trainable": "all", "param_dtype": "bfloat16", "batch_size": 2, "lr": 1e-4},
}
CASES = {"ttt": TTT, "everything, in half precision": HALF}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])


def averaged(weights, decay):
    """The definition, step after step in float64."""
    average = weights[0].double()
    for weight in weights[1:]:
        average = decay * average + (1 - decay) * weight.double()
    return average


@pytest.fixture
def stepped(monkeypatch):
    """The float32 weights by name after each step, masters of those in half precision."""
    steps, step = [], Optimizer.step

    def noted(self, number):
        rates = step(self, number)
        steps.append({name: target.detach().clone() for name, target in self._targets.items()})
        return rates

    monkeypatch.setattr(Optimizer, "step", noted)
    return steps


def loaded(settings, folder):
    """The model as built, with the adapter of a folder."""
    model, injection = build(settings, ToyBackbone(), torch.device("cpu"))
    identity = read_info(folder).backbone
    load_adapter(folder, model, injection=injection, backbone=identity)
    return model, injection


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_that_of_the_steps_and_is_an_adapter(tmp_path, stepped, case):
    settings = config(tmp_path / "run", **CASES[case])
    result, _ = run(settings)
    state = load_file(result.checkpoint / OPTIMIZER)
    averages = {name.removeprefix("ema."): value for name, value in state.items() if name.startswith("ema.")}
    assert averages.keys() == stepped[-1].keys()
    model, _ = loaded(settings, result.checkpoint / EMA)
    moved = 0
    for name, average in averages.items():
        expected = averaged([weights[name] for weights in stepped], DECAY)
        assert average.dtype == torch.float32
        assert torch.allclose(average.double(), expected, rtol=1e-6, atol=1e-9)
        of_adapter = model.get_parameter(name)
        assert torch.equal(of_adapter, average.to(of_adapter.dtype))
        moved += not torch.equal(average, stepped[-1][name])
    assert moved > len(averages) / 2
    own, _ = loaded(settings, result.checkpoint)
    frozen = [name for name, _ in model.named_parameters() if name not in averages]
    assert all(torch.equal(model.get_parameter(name), own.get_parameter(name)) for name in frozen)
    assert read_info(result.checkpoint / EMA).training["ema_decay"] == DECAY


def test_it_is_evaluated_beside_the_weights_which_it_leaves_as_they_are(tmp_path):
    with_it = config(tmp_path / "run", **TTT, evaluate={"eval_freq": 2})
    without = config(tmp_path / "plain", train={**TTT["train"], "ema_decay": None}, evaluate={"eval_freq": 2})
    (averaged, text), (plain, _) = run(with_it), run(without)
    same = [{key: value for key, value in line.items() if key != "eval_loss_ema"} for line in lines(tmp_path / "run")]
    assert same == lines(tmp_path / "plain")
    assert averaged.evaluation.loss_ema is not None
    assert plain.evaluation.loss_ema is None
    model, injection = loaded(with_it, averaged.checkpoint / EMA)
    backbone = ToyBackbone()
    dataset = backbone.dataset(with_it, split="eval", device=torch.device("cpu"))
    again = evaluate(model, injection, backbone, with_it, dataset, split="eval", device=torch.device("cpu"))
    assert again.loss == averaged.evaluation.loss_ema != averaged.evaluation.loss
    assert [line["step"] for line in lines(tmp_path / "run") if "eval_loss_ema" in line] == [2, 4, 5]
    assert f"with averaged weights {again.loss:.4f}" in text
    assert read_json(tmp_path / "run" / "summary.json")["eval_loss_ema"] == again.loss
    assert run(with_it, resume=True)[0] == averaged  # from the summary


@pytest.mark.parametrize("case", CASES)
def test_it_is_resumed_bit_for_bit(tmp_path, case):
    settings = CASES[case]
    whole, _ = run(config(tmp_path / "whole", **settings, evaluate={"eval_freq": 2}))
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    (killed / "summary.json").unlink()
    for step in (4, 5):
        shutil.rmtree(step_folder(killed, step))
    resumed, _ = run(config(killed, **settings, evaluate={"eval_freq": 2}), resume=True)
    assert lines(killed) == lines(tmp_path / "whole")
    assert_same_tensors(whole.checkpoint, resumed.checkpoint)
    assert_same_tensors(whole.checkpoint / EMA, resumed.checkpoint / EMA)


def test_the_files_of_the_average_belong_to_the_checkpoint(tmp_path):
    result, _ = run(config(tmp_path / "run", **TTT))
    assert f"{EMA}/{MODEL}" in read_json(result.checkpoint / TRAINER_STATE)["files"]
    (result.checkpoint / EMA / MODEL).unlink()
    with pytest.raises(EnvironmentProblem, match="missing"):
        read_checkpoint(result.checkpoint)


def test_info_reads_it(tmp_path, capsys):
    result, _ = run(config(tmp_path / "run", **TTT))
    assert main(["info", str(result.checkpoint / EMA)]) == 0
    assert "ema_decay" in capsys.readouterr().out


def test_a_state_with_some_averages_is_refused(tmp_path):
    settings = config(tmp_path, **TTT)
    model, injection = build(settings, ToyBackbone(), torch.device("cpu"))
    learnable = choose_learnable(model, injection, settings.train, is_attention=lambda name: False)
    optimizer = Optimizer(learnable, settings.train)
    optimizer.step(0)
    state = optimizer.tensors()
    assert sum(name.startswith("ema.") for name in state) == len(learnable)
    assert optimizer.nbytes() == sum(value.nbytes for name, value in state.items()) + sum(
        8 * entry.parameter.numel() + 4 for entry in learnable
    )  # nothing had a gradient, so that there are no moments yet
    optimizer.load(state, place="here")
    del state[next(name for name in state if name.startswith("ema."))]
    with pytest.raises(EnvironmentProblem, match="here: lacks the average of"):
        optimizer.load(state, place="here")


def test_the_weights_come_back_after_an_error():
    weight = torch.nn.Parameter(torch.ones(2))

    def fail():
        with applied({"w": weight}, {"w": torch.zeros(2)}):
            assert weight.sum() == 0
            raise RuntimeError("evaluation")

    with pytest.raises(RuntimeError, match="evaluation"):
        fail()
    assert weight.sum() == 2


def test_it_begins_with_the_next_step_if_there_is_none():
    weight = torch.ones(2)
    averages = Averages({"w": weight}, 0.9)
    averages.load({})
    averages.update()
    weight += 1
    averages.update()
    assert torch.allclose(averages.tensors()["w"], torch.full((2,), 1.1))


@pytest.mark.parametrize(
    ("decay", "fits"), [("0.999", True), ("null", True), ("0", False), ("1", False), ("yes", False)]
)
def test_decays(decay, fits):
    found = check_config(
        "c.yaml", text=f"backbone: {{name: toy}}\ntrain: {{ema_decay: {decay}}}", backbone=ToyBackbone()
    )
    codes = [finding.path for finding in found.findings if finding.path == "train.ema_decay"]
    assert bool(codes) != fits
