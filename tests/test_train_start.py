"""Runs that start from what another has learned: `train.init_from`, and chains of stages."""

import io
import re
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from toy import ToyBackbone, ToyData, ToyOptions

from ttt import inject
from ttt.adapter_file import BACKBONE, MODEL, load_adapter, read_info, save_adapter, trained_backbone
from ttt.check import check_config, load_config
from ttt.config import RunConfig, TrainConfig, TTTConfig
from ttt.errors import AdapterFileError, AdapterMismatchError
from ttt.train import parts, pictures, train
from ttt.train.metrics import read_metrics
from ttt.train.rundir import RunDir
from ttt.train.setup import with_backbone_options

TOY = ToyBackbone()
TIMES = {"tokens_per_second", "peak_memory_bytes"}
TTT = {"mini_batch_size": 4, "learnable_token_idx": False}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Drawing takes longer than these runs do."""
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])


def config(run_dir, *, start=None, backbone=None, ttt=None, data=None, train=None):
    return RunConfig(
        backbone=ToyOptions(**{"num_layers": 2, "dim": 16, "num_heads": 2, **(backbone or {})}),
        ttt=TTTConfig(**{**TTT, **(ttt or {})}),
        data=ToyData(**{"window": 12, **(data or {})}),
        train=TrainConfig(
            **{
                "max_steps": 3,
                "lr": 3e-3,
                "device": "cpu",
                "init_from": None if start is None else str(start),
                **(train or {}),
            }
        ),
        run_dir=str(run_dir),
    )


def run(settings, *, resume=False):
    text = io.StringIO()
    result = train(settings, TOY, resume=resume, console=Console(file=text, width=300))
    return result, text.getvalue()


def outputs(model):
    batch = TOY.example_batch(model, batch_size=2, tokens=30, seed=5)
    with torch.no_grad():
        return TOY.outputs(model.eval(), batch)


def plain_model(dtype=torch.float32):
    return TOY.build(ToyOptions(num_layers=2, dim=16, num_heads=2), device="cpu", dtype=dtype)


def built(monkeypatch):
    """The injections that runs are made with, as they are made."""
    made = []
    build = parts.build

    def kept(*arguments):
        made.append(build(*arguments))
        return made[-1]

    monkeypatch.setattr(parts, "build", kept)
    return made


def attention(tensors):
    return {name for name in tensors if ".self_attn." in name}


# --- chains ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_stages_lose_nothing_and_the_last_file_alone_is_the_model(tmp_path, monkeypatch, dtype):
    made = built(monkeypatch)
    stages = [
        config(tmp_path / "one", train={"trainable": "sft", "param_dtype": dtype}),
        config(
            tmp_path / "two",
            start=tmp_path / "one",
            ttt={"mini_batch_size": 8, "base_lr": 0.5, "scan_checkpoint_group_size": 0, "initial_gating_alpha": 0.7},
            data={"window": 24},
            train={"trainable": "qkvo", "param_dtype": dtype},
        ),
        config(
            tmp_path / "three",
            start=tmp_path / "two",
            ttt={"mini_batch_size": 8, "base_lr": 0.5},
            data={"window": 48, "windows_of_files": (2, 2)},
            train={"trainable": "ttt", "param_dtype": dtype},
        ),
    ]
    results = []
    for stage, settings in enumerate(stages):
        result, text = run(settings)
        results.append(result)
        if stage:
            assert f"starts from {results[stage - 1].checkpoint / MODEL}" in text
            assert "parameters of the backbone included" in text
        else:
            assert "starts from" not in text
    files = [load_file(result.checkpoint / BACKBONE) for result in results]
    names = {name for name, _ in plain_model().named_parameters()}
    assert files[0].keys() == files[1].keys() == files[2].keys() == names
    for name in names:  # trained in stage 1, in stage 2 the attention alone, in stage 3 none of it
        assert torch.equal(files[2][name], files[1][name])
        assert torch.equal(files[1][name], files[0][name]) == (name not in attention(names))

    model = plain_model(getattr(torch, dtype))
    untrained = outputs(model)
    load_adapter(results[-1].checkpoint, model, sites=TOY.sites(model))
    assert torch.equal(outputs(model), outputs(made[-1][0]))
    assert not torch.equal(outputs(model), untrained)


def test_a_stage_begins_with_the_weights_of_the_last_and_a_new_optimiser(tmp_path):
    first, _ = run(config(tmp_path / "one", train={"trainable": "all", "param_dtype": "bfloat16"}))
    settings = with_backbone_options(
        config(
            tmp_path / "two",
            start=tmp_path / "one",
            ttt={"initial_gating_alpha": 0.9},
            train={"trainable": "qkvo", "param_dtype": "bfloat16"},
        ),
        TOY,
    )
    begun = parts.build_parts(
        settings,
        TOY,
        torch.device("cpu"),
        RunDir(tmp_path / "two"),
        Console(file=io.StringIO()),
        start=read_info(tmp_path / "one"),
    )
    now = dict(begun.model.named_parameters())
    written = {**load_file(first.checkpoint / MODEL), **load_file(first.checkpoint / BACKBONE)}
    assert written.keys() == now.keys()
    assert all(torch.equal(now[name].detach(), value) for name, value in written.items())
    masters = begun.optimizer.tensors()
    assert {name.partition(".")[0] for name in masters} == {"master"}  # no moments, no step counts
    for name, master in masters.items():
        assert torch.equal(master.to(torch.bfloat16), now[name.removeprefix("master.")].detach())
    assert {entry.name for entry in begun.learnable if entry.role == "backbone"} == attention(written)


def test_an_adapter_whose_backbone_was_frozen_leaves_it_out_of_the_files(tmp_path):
    run(config(tmp_path / "one"))
    result, text = run(config(tmp_path / "two", start=tmp_path / "one"))
    assert "parameters of the backbone included" not in text
    assert not (result.checkpoint / BACKBONE).exists()
    result, _ = run(config(tmp_path / "three", start=tmp_path / "two", train={"trainable": "qkvo"}))
    assert attention(load_file(result.checkpoint / BACKBONE)) == load_file(result.checkpoint / BACKBONE).keys()


def test_an_adapter_folder_and_its_file_will_do_too(tmp_path):
    model = plain_model()
    injection = inject.apply(model, TOY.sites(model), TTTConfig(**TTT), seed=9)
    from ttt.adapter_file import backbone_identity

    identity = backbone_identity(TOY, ToyOptions(num_layers=2, dim=16, num_heads=2))
    file = save_adapter(tmp_path / "adapter", injection, backbone=identity)
    losses = []
    for number, start in enumerate((file.parent, file, None)):
        run(config(tmp_path / str(number), start=start, train={"max_steps": 1}))
        losses.append(read_metrics(tmp_path / str(number) / "metrics.jsonl")[0]["loss"])
    assert losses[0] == losses[1] != losses[2]


# --- resumption ---


@pytest.mark.parametrize("trainable", ["ttt", "qkvo"])
def test_a_stage_resumes_bit_for_bit_without_what_it_started_from(tmp_path, trainable):
    run(config(tmp_path / "one", train={"trainable": "sft"}))
    options = {
        "start": tmp_path / "one",
        "train": {"trainable": trainable, "max_steps": 6, "ckpt_freq": 2, "ckpt_keep": None},
    }
    whole, _ = run(config(tmp_path / "whole", **options))
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    (killed / "summary.json").unlink()
    for step in (4, 6):
        shutil.rmtree(killed / "checkpoints" / f"step_{step:06d}")
    shutil.rmtree(tmp_path / "one")

    resumed, text = run(config(killed, **options), resume=True)
    assert "resumed after step 2 of 6" in text
    assert "starts from" not in text
    for name in (MODEL, BACKBONE, "optimizer.safetensors"):
        before, after = load_file(whole.checkpoint / name), load_file(resumed.checkpoint / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert resumed.evaluation == whole.evaluation
    assert len(trained_backbone(read_info(killed))) == len(list(plain_model().named_parameters()))


def test_the_config_of_a_run_that_goes_on_need_not_find_its_start(tmp_path):
    run(config(tmp_path / "one"))
    run(config(tmp_path / "two", start=tmp_path / "one"))
    shutil.rmtree(tmp_path / "one")
    stored = tmp_path / "two" / "config.yaml"
    (finding,) = check_config(stored, backbone=TOY).findings
    assert (finding.code, finding.path) == ("TTT509", "train.init_from")
    loaded = load_config(stored, backbone=TOY, resuming=True)
    assert loaded.findings == ()
    assert loaded.config.train.init_from == str(tmp_path / "one")


# --- what does not fit ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ttt": {"layers": [1]}}, r"ttt\.layers: \[0, 1\] in the file, \[1\] here"),
        ({"ttt": {"layer_type": "mlp"}}, r'ttt\.layer_type: "linear" in the file, "mlp" here'),
        ({"ttt": {"normalize_qk": True}}, r"ttt\.normalize_qk: false in the file, true here"),
        ({"backbone": {"dim": 32}}, r"backbone\.dim: 16 in the file, 32 here"),
        ({"backbone": {"seed": 1}}, r"backbone\.seed: 0 in the file, 1 here"),
        ({"ttt": {"learnable_token_idx": True}}, r"ttt\.learnable_token_idx: false in the file, true here"),
    ],
)
def test_weights_of_something_else_are_refused_by_name_and_nothing_is_written(tmp_path, options, words):
    run(config(tmp_path / "one"))
    settings = config(tmp_path / "two", start=tmp_path / "one", **options)
    with pytest.raises(AdapterMismatchError, match=words):
        run(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    text = f"train: {{init_from: {tmp_path / 'one'}}}\n" + "".join(
        f"{section}: {keys}\n"
        for section, keys in {
            "backbone": {"name": "toy", "num_layers": 2, "dim": 16, "num_heads": 2} | options.get("backbone", {}),
            "ttt": {"preset": "lm"} | TTT | options.get("ttt", {}),
        }.items()
    )
    text = text.replace("True", "true").replace("False", "false")
    (finding,) = check_config("c.yaml", text=text, backbone=TOY).findings
    assert finding.code == "TTT510"
    assert finding.place is not None
    assert str(finding.place) == "c.yaml:1:20"
    assert re.search(words, finding.message)


START = """\
backbone: {name: toy, num_layers: 2, dim: 16, num_heads: 2}
ttt: {preset: lm, learnable_token_idx: false%s}
train: {init_from: %s}
"""


@pytest.mark.parametrize(("key", "theirs", "ours"), [("mini_batch_size", 4, 8), ("base_lr", 0.5, 0.25)])
def test_what_tensors_are_computed_with_changes_where_the_config_writes_it_and_is_told(tmp_path, key, theirs, ours):
    run(config(tmp_path / "one", ttt={"base_lr": 0.5}))
    same = ", mini_batch_size: 4, base_lr: 0.5"
    text = START % (same, tmp_path / "one")
    assert check_config("c.yaml", text=text, backbone=TOY).findings == ()
    changed = text.replace(f"{key}: {theirs}", f"{key}: {ours}")
    (finding,) = check_config("c.yaml", text=changed, backbone=TOY).findings
    assert (finding.code, finding.path) == ("TTT511", f"ttt.{key}")
    assert f"ttt.{key}: {theirs} in the file, {ours} here" in finding.message
    assert f"give --set ttt.{key}={theirs} to go on as it was" in finding.fix
    _, told = run(config(tmp_path / "two", start=tmp_path / "one", ttt={"base_lr": 0.5, key: ours}))
    assert f"changed at its start: ttt.{key}: {theirs} in the file, {ours} here\n" in told
    _, told = run(config(tmp_path / "three", start=tmp_path / "one", ttt={"base_lr": 0.5}))
    assert "changed at its start" not in told


def test_a_default_changes_nothing_of_what_a_run_starts_from(tmp_path):
    """A config that leaves the mini-batch to its default is no word on what the weights were trained with."""
    run(config(tmp_path / "one"))
    base = read_info(tmp_path / "one").ttt.base_lr
    for overrides, codes in (
        ((), {"TTT510"}),
        (("ttt.mini_batch_size=4",), set()),
        (("ttt.mini_batch_size=16",), {"TTT511"}),  # the default, but written
    ):
        text = START % (f", base_lr: {base}", tmp_path / "one")
        findings = check_config("c.yaml", text=text, backbone=TOY, overrides=overrides).findings
        assert {finding.code for finding in findings} == codes, overrides
        if codes == {"TTT510"}:
            assert "ttt.mini_batch_size: 4 in the file, 16 here" in findings[0].message
            assert "--set ttt.mini_batch_size=4" in findings[0].fix


def test_an_adapter_that_is_loaded_by_hand_names_the_way(tmp_path):
    run(config(tmp_path / "one"))
    model = plain_model()
    injection = inject.apply(model, TOY.sites(model), TTTConfig(**{**TTT, "mini_batch_size": 8}), causal=True)
    with pytest.raises(AdapterMismatchError) as caught:
        load_adapter(tmp_path / "one", model, injection=injection, check_weights=False)
    assert "ttt.mini_batch_size: 4 in the file, 8 here" in str(caught.value)
    assert "give the config the file's: --set ttt.mini_batch_size=4;" in str(caught.value)


def test_a_size_that_a_tensor_hangs_on_cannot_change(tmp_path):
    run(config(tmp_path / "one", ttt={"learnable_token_idx": True}))
    settings = config(tmp_path / "two", start=tmp_path / "one", ttt={"learnable_token_idx": True, "mini_batch_size": 8})
    with pytest.raises(AdapterMismatchError, match=r"learnable_token_idx: shape: \[4\] in the file, \[8\] here"):
        run(settings)


def test_a_start_that_is_not_there_is_told_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "build", None)
    with pytest.raises(AdapterFileError, match="no such file"):
        run(config(tmp_path / "two", start=tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="is not a run with a complete checkpoint"):
        run(config(tmp_path / "two", start=tmp_path / "empty"))
    assert not (tmp_path / "two").exists()


def test_an_unfinished_trained_backbone_is_noticed_by_the_check(tmp_path):
    result, _ = run(config(tmp_path / "one", train={"trainable": "sft"}))
    shutil.copytree(result.checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / BACKBONE).unlink()
    backbone = "{name: toy, num_layers: 2, dim: 16, num_heads: 2}"
    ttt = "{preset: lm, mini_batch_size: 4, learnable_token_idx: false}"
    text = f"backbone: {backbone}\nttt: {ttt}\ntrain: {{init_from: {tmp_path / 'copy'}}}\n"
    (finding,) = check_config("c.yaml", text=text, backbone=TOY).findings
    assert finding.code == "TTT509"
    assert "missing; the adapter was trained together with the backbone parameters in it" in finding.message


def test_the_disk_must_hold_what_was_trained_before_too(tmp_path, monkeypatch):
    result, _ = run(config(tmp_path / "one", train={"trainable": "sft"}))
    along = (result.checkpoint / BACKBONE).stat().st_size
    text = "\n".join(
        [
            "backbone: {name: toy, num_layers: 2, dim: 16, num_heads: 2}",
            "ttt: {preset: lm, mini_batch_size: 4, learnable_token_idx: false}",
            "train: {max_steps: 1, init_from: %s}",
        ]
    )
    from ttt import files

    sizes = {}
    for start in ("null", str(tmp_path / "one")):
        monkeypatch.setattr(files, "free_bytes", lambda path: 10)
        (finding,) = check_config("c.yaml", text=text % start, backbone=TOY).findings
        assert finding.code == "TTT403"
        sizes[start] = finding.value
        monkeypatch.setattr(files, "free_bytes", lambda path, free=finding.value: free)
        assert check_config("c.yaml", text=text % start, backbone=TOY).findings == ()
    assert sizes[str(tmp_path / "one")] - sizes["null"] == pytest.approx(along, rel=0.2)  # its header is in the file
