"""Runs that are not finite, or that end where nothing can be resumed: what is told works, and what was good stays."""

import json
import os
import re
import shlex
import shutil

import pytest
import torch
from test_train_loop import assert_same_tensors, config, lines, run
from toy import ToyBackbone

from ttt.adapter_file import MODEL
from ttt.check import load_config
from ttt.errors import EnvironmentProblem, NonFiniteError, UsageError
from ttt.files import read_tensors
from ttt.plugins import LossOutput
from ttt.train import parts, pictures, start
from ttt.train.display import Display
from ttt.train.divergence import Examination, lowered, not_finite, tensors_in, way_on
from ttt.train.optim import Optimizer
from ttt.train.rundir import RunDir


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Runs whose pictures were drawn; drawing takes longer than they do."""
    folders = []
    monkeypatch.setattr(pictures, "draw_run", lambda run: folders.append(run) or [])
    return folders


def names(run_dir):
    return sorted(folder.name for folder in (run_dir / "checkpoints").iterdir())


def follow(message):
    """Do what a message says: run the command in it."""
    (command,) = re.findall(r"`(ttt train [^`]*--set[^`]*)`", message)
    _, _, path, *words = shlex.split(command)
    assert words[::2] == ["--set"] * (len(words) // 2)
    loaded = load_config(path, backbone=ToyBackbone(), overrides=words[1::2])
    return run(loaded.config)[0]


def failure(settings, backbone=None, **options):
    with pytest.raises(NonFiniteError) as caught:
        run(settings, backbone, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Diverging(ToyBackbone):
    """Weights that the update of a step ruins: still finite, but no loss is finite after it."""

    def __init__(self, *, after):
        self.after = after

    def loss(self, model, batch, config):
        output = super().loss(model, batch, config)
        return (
            output if model.layers[0].ttt.done < self.after else LossOutput(output.loss * float("nan"), output.tokens)
        )


@pytest.fixture
def diverging(monkeypatch):
    """Counts optimiser steps in the model itself, as weights do, so that a new run begins at none."""
    step, restore = Optimizer.step, start.restored
    build = parts.build

    def built(*arguments):
        model, injection = build(*arguments)
        model.layers[0].ttt.done = 0
        counted.append(model)
        return model, injection

    counted = []

    def counting(self, number):
        rates = step(self, number)
        counted[-1].layers[0].ttt.done += 1
        return rates

    def restored(run, checkpoint):
        progress = restore(run, checkpoint)
        run.model.layers[0].ttt.done = checkpoint.step
        return progress

    monkeypatch.setattr(parts, "build", built)
    monkeypatch.setattr(Optimizer, "step", counting)
    monkeypatch.setattr(start, "restored", restored)
    return Diverging


# --- what is kept, and the way on ---


@pytest.mark.parametrize("keep", [1, 3])
def test_ruined_weights_are_not_saved_and_the_good_ones_stay(tmp_path, diverging, keep):
    settings = config(tmp_path / "run", train={"ckpt_freq": 2, "ckpt_keep": keep})
    message = failure(settings, diverging(after=3))
    assert message.startswith("step 4: the loss is nan on stream")
    assert "Training diverged: the loss on what step 3 read is nan after that step, and was " in message
    assert "lower train.lr (0.003)" in message
    good = tmp_path / "run" / "checkpoints" / "step_000002"
    assert f"the last good weights are in {good}" in message
    assert names(tmp_path / "run") == ["step_000002"]
    # again, and again: the same, and nothing lost
    assert failure(settings, diverging(after=3), resume=True) == message
    assert names(tmp_path / "run") == ["step_000002"]
    result = follow(message)
    assert (result.run_dir, result.steps) == (tmp_path / "run-2", 6)
    assert "lr: 0.0001" in (tmp_path / "run-2" / "config.yaml").read_text()


def test_a_checkpoint_is_pruned_only_when_the_next_has_proven_good(tmp_path, diverging):
    """The ruined weights are those of a checkpoint: the one before it must be there still."""
    settings = config(tmp_path / "run", train={"ckpt_freq": 2, "ckpt_keep": 1})
    message = failure(settings, diverging(after=4))
    assert names(tmp_path / "run") == ["step_000002", "step_000004"]
    assert "the last good weights are in" in message
    assert "step_000002" in message
    assert follow(message).steps == 6


def test_a_sound_run_keeps_as_many_as_it_should(tmp_path):
    run(config(tmp_path / "run", train={"ckpt_freq": 1, "ckpt_keep": 1}))
    assert names(tmp_path / "run") == ["step_000006"]


def test_a_learning_rate_that_ruins_the_first_step_starts_anew_as_told(tmp_path):
    message = failure(config(tmp_path / "run", train={"lr": 1000.0}))
    assert "Training diverged: the loss on what step 1 read is nan" in message
    assert "lower train.lr (1000); no checkpoint is from before that; start anew: `ttt train" in message
    assert names(tmp_path / "run") == []
    result = follow(message)
    assert (result.run_dir, result.steps) == (tmp_path / "run", 6)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 7))


def test_where_only_ruined_weights_are_saved_another_folder_is_named(tmp_path):
    message = failure(config(tmp_path / "run", train={"lr": 1000.0, "ckpt_freq": 1, "ckpt_keep": 1}))
    assert names(tmp_path / "run") == ["step_000001"]
    assert follow(message).run_dir == tmp_path / "run-2"


def test_the_smallest_rates_are_written_as_the_config_reads_them(tmp_path):
    settings = config(tmp_path / "a folder: with, odd #name", train={"lr": 3e-9})
    run_dir = RunDir(tmp_path / "a folder: with, odd #name")
    run_dir.create(settings)
    message = way_on(run_dir, settings, {**lowered(settings, "train.lr"), "ttt.base_lr": 1e-7}, before=1)
    (command,) = re.findall(r"`(.*)`", message)
    _, _, path, *words = shlex.split(command)
    loaded = load_config(path, backbone=ToyBackbone(), overrides=[*words[1::2], f"run_dir={json.dumps(str(tmp_path))}"])
    assert (loaded.config.train.lr, loaded.config.ttt.base_lr) == (3e-10, 1e-7)
    run_dir.save_checkpoint(1, {}, lambda folder: None, keep=None)
    (command,) = re.findall(r"`(.*)`", way_on(run_dir, settings, {}, before=2))
    _, _, path, *words = shlex.split(command)
    values = dict(word.split("=", 1) for word in words[1::2])
    assert json.loads(values["run_dir"]) == f"{run_dir.path}-2"
    assert json.loads(values["train.init_from"]) == str(run_dir.path / "checkpoints" / "step_000001")


@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
def test_an_inner_learning_rate_is_named_where_it_is_the_cause(tmp_path, layer_type):
    message = failure(config(tmp_path / "run", ttt={"base_lr": 1e30, "layer_type": layer_type}))
    assert re.search(
        r"step 1: .* With the gates closed the loss is 2\.\d+, so it is the TTT layers "
        r"\(layers\.0\.ttt, layers\.1\.ttt: the inner loss is not finite\): lower ttt\.base_lr \(1e\+30\)",
        message,
    )
    assert "train.lr" not in message
    assert "data" not in message
    assert follow(message).steps == 6


def test_data_that_holds_no_numbers_is_named_and_the_run_goes_on_once_it_is_mended(tmp_path):
    options = {"train": {"batch_size": 2}}
    message = failure(config(tmp_path / "run", **options, data={"shuffle": False, "poisoned": (7,)}))
    assert (
        "The batch itself holds values that are not finite (weight): mend that data; the 3 steps before it" in message
    )
    assert message.endswith(f"then go on with `ttt train {tmp_path / 'run' / 'config.yaml'} --resume`")
    assert "train.lr" not in message
    assert names(tmp_path / "run") == ["step_000003"]


def test_a_rescue_never_prunes(tmp_path):
    options = {"train": {"batch_size": 2, "ckpt_freq": 1, "ckpt_keep": 2}}
    failure(config(tmp_path / "run", **options, data={"shuffle": False, "poisoned": (7,)}))
    assert names(tmp_path / "run") == ["step_000002", "step_000003"]
    shutil.rmtree(tmp_path / "run")
    options["train"] = {"batch_size": 2, "ckpt_freq": 2, "ckpt_keep": 1}
    failure(config(tmp_path / "run", **options, data={"shuffle": False, "poisoned": (7,)}))
    assert names(tmp_path / "run") == ["step_000002", "step_000003"]


def test_weights_that_are_not_finite_from_the_start_are_named(tmp_path):
    class Broken(ToyBackbone):
        def build(self, options, *, device, dtype):
            model = super().build(options, device=device, dtype=dtype)
            with torch.no_grad():
                model.layers[1].linear1.weight[0, 0] = float("inf")
            return model

    message = failure(config(tmp_path / "run"), Broken())
    assert "The weights that the run starts with are not finite (layers.1.linear1.weight): look at the backbone's" in (
        message
    )


def test_the_way_on_is_found_even_where_looking_for_the_cause_fails(tmp_path, monkeypatch):
    def fails(self):
        raise MemoryError

    monkeypatch.setattr(Examination, "of_loss", fails)
    settings = config(
        tmp_path / "run", data={"shuffle": False, "poisoned": (3,)}, train={"ckpt_freq": 1, "ckpt_keep": 2}
    )
    message = failure(settings)
    assert "weights unchanged. Look at that data; if it is sound, lower train.lr or ttt.base_lr; the 3 steps" in message
    assert names(tmp_path / "run") == ["step_000002", "step_000003"]


# --- weights that are not finite after a step ---


@pytest.mark.parametrize("kind", ["parameter", "moment"])
def test_a_step_that_leaves_no_numbers_is_never_saved(tmp_path, monkeypatch, kind):
    step = Optimizer.step

    def broken(self, number):
        rates = step(self, number)
        if number == 5:
            name, target = next(iter(self._targets.items()))
            broken = target if kind == "parameter" else self._update_of[name]._made.state[target]["exp_avg_sq"]
            with torch.no_grad():
                broken.flatten()[0] = float("inf")
        return rates

    monkeypatch.setattr(Optimizer, "step", broken)
    message = failure(config(tmp_path / "run", train={"ckpt_freq": 3, "ckpt_keep": 1}))
    assert "step 6: what the step left is not finite (" in message
    assert "so it is not saved; lower train.lr; the last good weights are in" in message
    assert names(tmp_path / "run") == ["step_000003"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_learning_rate_that_float32_cannot_hold_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"less than or equal to 10+ "):
        config(tmp_path / "run", train={"lr": 1e38})
    steep = config(tmp_path / "run", train={"lr": 1e30, "weight_lr_multiplier": 1e6, "betas": [0.999999, 0.999]})
    message = failure(steep)
    assert "make a step that float32 cannot hold" in message


def test_what_is_not_finite_is_found_wherever_it_is():
    bad, good = torch.tensor([1.0, float("nan")]), torch.ones(2)
    batch = {"a": [good, (bad,)], "b": torch.ones(2, dtype=torch.int64), "c": "text", "d": bad.to(torch.bfloat16)}
    assert not_finite(tensors_in(batch)) == ["a.1.0", "d"]
    assert not_finite(tensors_in(bad)) == ["the batch"]
    assert not_finite([]) == []


# --- evaluations that are not finite ---


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text(" ".join(str(number % 7) for number in range(61)) + "\n")
    return str(path)


class Unmeasurable(ToyBackbone):
    """Held-out data with a window that gives no number."""

    def dataset(self, config, *, split, device):
        dataset = super().dataset(config, split=split, device=device)
        if split == "eval":
            dataset._poisoned = {2}
        return dataset


def test_a_closing_evaluation_that_is_no_number_is_no_end(tmp_path, held_out, drawn):
    settings = config(tmp_path / "run", data={"eval_data": held_out})
    message = failure(settings, Unmeasurable())
    assert message.startswith(
        "step 6: the evaluation is not finite (loss nan, with the gates closed nan), first on stream 0, tokens 24-36. "
        "The batch itself holds values that are not finite (weight): mend that data; all steps are saved in "
    )
    assert NonFiniteError.exit_code == 4
    assert drawn == [tmp_path / "run"]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert failure(settings, Unmeasurable(), resume=True) == message
    result, _ = run(settings, resume=True)  # mended
    assert (result.steps, result.evaluation.is_finite) == (6, True)


def test_an_evaluation_in_between_that_is_no_number_is_said_loudly(tmp_path, held_out):
    class Later(Unmeasurable):
        evaluations = 0

        def loss(self, model, batch, config):
            output = super().loss(model, batch, config)
            if model.training:
                return output
            self.evaluations += 1
            return output if self.evaluations <= 10 else LossOutput(torch.tensor(2.0), output.tokens)

    settings = config(tmp_path / "run", data={"eval_data": held_out}, evaluate={"eval_freq": 3})
    result, text = run(settings, Later())
    assert result.evaluation.is_finite
    (warning,) = [line for line in text.splitlines() if line.startswith("WARNING: ")]
    assert "step 3: the evaluation is not finite" in warning
    assert "first on stream 0, tokens 24-36; training goes on" in warning


def test_a_closing_evaluation_of_ruined_weights_names_the_checkpoint_before(tmp_path, diverging):
    message = failure(config(tmp_path / "run", train={"ckpt_freq": 3, "ckpt_keep": 1}), diverging(after=6))
    assert "Training diverged: the loss on what step 6 read is nan" in message
    assert names(tmp_path / "run") == ["step_000003", "step_000006"]
    assert "the last good weights are in" in message
    assert follow(message).steps == 6


# --- how long an evaluation takes ---


def test_training_data_in_place_of_held_out_data_are_read_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("ttt.train.evaluation.STAND_IN_WINDOWS", 5)
    options = {"train": {"max_steps": 1, "batch_size": 2}}
    result, text = run(config(tmp_path / "run", **options))
    assert (result.evaluation.windows, result.evaluation.available) == (6, 12)
    assert "outer loss on 6 of 12 training windows (there is no held-out data)" in text
    again, _ = run(config(tmp_path / "run", **options), resume=True)
    assert again == result
    result, text = run(config(tmp_path / "more", **options, evaluate={"max_batches": 5}))
    assert result.evaluation.windows == 10


def test_held_out_data_are_read_whole(tmp_path, monkeypatch, held_out):
    monkeypatch.setattr("ttt.train.evaluation.STAND_IN_WINDOWS", 2)
    result, text = run(config(tmp_path / "run", data={"eval_data": held_out}, train={"max_steps": 1}))
    assert result.evaluation.windows == 5
    assert "outer loss on 5 held-out windows" in text


def test_an_evaluation_tells_how_far_it_is(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("ttt.train.display.TELL_SECONDS", 0.0)
    monkeypatch.setattr(
        Display, "evaluating", lambda self, *n, plain=Display.evaluating: (told.append(n), plain(self, *n))
    )
    _, text = run(config(tmp_path / "run", train={"max_steps": 1, "batch_size": 5}))
    assert told == [(0, 12), (5, 12), (10, 12), (12, 12)]
    assert [line.split(",")[0] for line in text.splitlines() if line.startswith("evaluating")] == [
        "evaluating: 5 of 12 windows",
        "evaluating: 10 of 12 windows",
    ]


# --- starting again, and going on at the very end ---


def killed_early(folder, **options):
    """What a run leaves that was killed before its first checkpoint."""
    run(config(folder, **options))
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints" / ".writing-0123abcd-step_000006").mkdir(parents=True)
    (folder / "summary.json").unlink()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_ended_before_its_first_checkpoint_starts_by_the_same_command(tmp_path, resume):
    whole, _ = run(config(tmp_path / "whole"))
    killed_early(tmp_path / "run")
    (tmp_path / "run" / "mine.txt").write_text("mine")
    result, text = run(config(tmp_path / "run"), resume=resume)
    assert "a run ended there after step 6, before its first checkpoint; its folder is taken over" in text
    assert ("no checkpoint yet to resume from; the run starts" in text) == resume
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert_same_tensors(whole.checkpoint, result.checkpoint)
    assert names(tmp_path / "run") == ["step_000006"]
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a config alone"])
def test_resuming_what_has_not_begun_begins_it(tmp_path, before):
    settings = config(tmp_path / "run", train={"max_steps": 1})
    if before != "nothing":
        (tmp_path / "run").mkdir()
    if before == "a config alone":
        RunDir(tmp_path / "run").stored_config.write(settings)
    result, text = run(settings, resume=True)
    assert result.steps == 1
    assert "taken over" not in text
    again, text = run(settings, resume=True)
    assert "done already, 1 steps" in text
    assert again == result


def test_a_run_that_starts_by_resuming_reads_what_it_starts_from(tmp_path):
    first, _ = run(config(tmp_path / "one", train={"max_steps": 1}))
    settings = config(tmp_path / "two", train={"max_steps": 1, "lr": 1e-9, "init_from": str(tmp_path / "one")})
    result, text = run(settings, resume=True)
    assert f"starts from {first.checkpoint}" in text
    before, after = read_tensors(first.checkpoint / MODEL), read_tensors(result.checkpoint / MODEL)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_checkpoints_that_are_all_damaged_are_not_started_over(tmp_path):
    result, _ = run(config(tmp_path / "run"))
    (result.checkpoint / MODEL).unlink()
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(UsageError, match=r"no complete checkpoint \(.*missing\).* delete .*checkpoints to start anew"):
        run(config(tmp_path / "run"), resume=True)
    with pytest.raises(UsageError, match="already holds a run"):
        run(config(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_resuming_a_finished_run_does_what_a_kill_left_undone(tmp_path, drawn):
    options = {"train": {"ckpt_freq": 2, "ckpt_keep": None}}
    run(config(tmp_path / "run", **options))
    options["train"]["ckpt_keep"] = 2
    folder = tmp_path / "run"
    (folder / ".writing-0123abcd-summary.json").write_text("")
    (folder / "checkpoints" / ".writing-0123abcd-step_000001").mkdir()
    drawn.clear()
    _, text = run(config(folder, **options), resume=True)
    assert "done already, 6 steps" in text
    assert names(folder) == ["step_000004", "step_000006"]
    assert not list(folder.glob(".writing-*"))
    assert drawn == [folder]  # there were no pictures
    for name in ("loss.png", "inner_loss.png"):
        (folder / name).write_bytes(b"")
    drawn.clear()
    run(config(folder, **options), resume=True)
    assert drawn == []
    (folder / "loss.png").touch()
    os.utime(folder / "loss.png", (1, 1))
    run(config(folder, **options), resume=True)
    assert drawn == [folder]


def test_pictures_that_cannot_be_drawn_hide_nothing(tmp_path, monkeypatch, held_out):
    """Neither the way on of a run that is no number, nor that a run is done."""

    def fails(run):
        raise RuntimeError("no font")

    monkeypatch.setattr(pictures, "draw_run", fails)
    run(config(tmp_path / "done"))
    _, text = run(config(tmp_path / "done"), resume=True)
    assert "done already, 6 steps" in text
    assert f"the pictures in {tmp_path / 'done'} cannot be drawn (RuntimeError: no font)" in text
    message = failure(config(tmp_path / "run", data={"eval_data": held_out}), Unmeasurable())
    assert "the evaluation is not finite" in message


def test_a_place_taken_by_something_else_ends_before_training(tmp_path):
    (tmp_path / "run" / "summary.json").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(EnvironmentProblem, match=r"summary\.json: is a folder, and a run writes a file there"):
            run(config(tmp_path / "run"), resume=resume)
    assert json.dumps([path.name for path in (tmp_path / "run").iterdir()]) == '["summary.json"]'
