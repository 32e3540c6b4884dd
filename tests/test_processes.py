"""One run in several processes: the same losses, metrics and weights as in one, by every layout; saved and resumed.

One forked process runs all that several processes have to do, once; the tests look at what it has left.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import forking
import pytest
import several
import torch
from safetensors.torch import load_file
from toy import ToyBackbone

from ttt.check import load_config
from ttt.plugins import get_backbone
from ttt.train import pictures, train
from ttt.train.metrics import read_metrics
from ttt_videodit import model as _imported_before_processes_are_forked  # noqa: F401

TOY = """
backbone: {name: toy, num_layers: 2, dim: 16, num_heads: 2}
ttt: {mini_batch_size: 4, persistent_states: true}
data: {window: 12, shuffle: files, windows_of_files: [3, 2, 4, 3, 5]}
train:
  {max_steps: 4, batch_size: 4, num_microbatches: 2, trainable: all, lr: 3.0e-3, lr_schedule: constant,
   gradient_checkpointing: true, evidence_freq: 2, ema_decay: 0.8}
"""
SMALL = {
    "toy": [],
    "toy muon": ["train.optimizer=muon", "train.lr=1e-3", "train.max_steps=3"],
    "moshi": ["backbone.dim=16", "backbone.num_heads=2", "backbone.num_layers=2", "data.duration_sec=1",
              "train.gradient_checkpointing=true", "train.num_microbatches=2", "train.batch_size=2"],
    "videodit": ["backbone.dim=32", "backbone.num_heads=2", "backbone.num_layers=2", "backbone.remat_attention=true",
                 "backbone.remat_forward_ttt=true", "backbone.remat_reverse_ttt=true",
                 "train.gradient_checkpointing=true", "train.batch_size=2"],
    "transformers": ["train.batch_size=2", "adapter=ttt+lora", "train.lr=1e-4"],
}  # fmt: skip
"""The backbones, with what makes their demos small."""
ONE, TWO, FOUR = 1, 2, 4
SAVED = 2
"""The steps after which a run on four processes goes on with fewer."""
RUNS = {
    "replicate 4": ("toy", FOUR, []),
    "shard 2 of 4": ("toy", FOUR, ["train.parallel.shard=2"]),
    "moshi": ("moshi", TWO, ["train.parallel.shard=2"]),
    "videodit": ("videodit", TWO, ["train.parallel.shard=2"]),
    "transformers": ("transformers", TWO, []),
    "tensor 2": ("toy", TWO, ["train.parallel.tensor=2"]),
    "replicate 2, tensor 2": ("toy", FOUR, ["train.parallel.tensor=2"]),
    **{f"{name} tensor": (name, TWO, ["train.parallel.tensor=2"]) for name in ("moshi", "videodit")},
}
"""A run's backbone, processes and layout."""
MUON = "replicate 2 with Muon"


def _go(name: str, folder: Path, *overrides: str, resume: bool = False) -> None:
    is_toy = name.startswith("toy")
    plugin: Any = ToyBackbone() if is_toy else get_backbone(name)
    text = TOY if is_toy else plugin.presets()["demo"]
    short = [] if is_toy else ["train.max_steps=2", "train.trainable=all", "train.lr_schedule=constant"]
    common = ["train.device=cpu", "train.cpu_threads=1", "eval.max_batches=1", f"run_dir={folder}"]
    config = load_config("c.yaml", text=text, backbone=plugin, overrides=[*short, *SMALL[name], *common, *overrides])
    train(config.config, plugin, resume=resume)


def _read_once(name: str) -> None:
    """Encode a demo's clip, which its plugin keeps, before the processes that read it are forked."""
    plugin: Any = get_backbone(name)
    overrides = [*SMALL[name], "train.device=cpu"]
    config = load_config("c.yaml", text=plugin.presets()["demo"], backbone=plugin, overrides=overrides).config
    for split in ("train", "eval"):
        plugin.dataset(config, split=split, device=torch.device("cpu"))


def _of_rank(rank: int, folder: Path, count: int) -> None:
    for run, (name, size, overrides) in RUNS.items():
        if size == count:
            _go(name, folder / run, *overrides)
    if count == FOUR:
        _go(
            "toy",
            folder / "saved on 4",
            "train.parallel.shard=2",
            "train.parallel.tensor=2",
            f"train.max_steps={SAVED}",
            "train.ckpt_freq=1",
            "train.ckpt_async=true",
        )
    elif count == TWO:
        _go("toy muon", folder / MUON)
        _go("toy", folder / "on 2", "train.parallel.shard=2", resume=True)
        _go("toy", folder / "on tensor 2", "train.parallel.tensor=2", resume=True)


def _alone(rank: int, folder: Path) -> None:
    for name in SMALL:
        _go(name, folder / f"{name} one")


def _resumed_alone(rank: int, folder: Path) -> None:
    _go("toy", folder / "on 1", resume=True)


def _everything(folder: str) -> int:
    torch.set_num_threads(1)
    pictures.draw_run = lambda run: []
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # runs say more than a pipe holds
    place = Path(folder)
    _read_once("videodit")
    failed = several.together(ONE, _alone, place) + several.together(FOUR, _of_rank, place, FOUR)
    for copy in ("on 2", "on 1", "on tensor 2"):
        shutil.copytree(place / "saved on 4", place / copy)
    return failed + several.together(TWO, _of_rank, place, TWO) + several.together(ONE, _resumed_alone, place)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with forking.start(_everything, str(folder)) as process:
        code = process.wait(540)
        assert code == 0, process.stderr.read()
    return folder


def _numbers(line: dict[str, Any], before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{before}{key}.")
        elif not isinstance(value, str) and key not in ("tokens_per_second", "peak_memory_bytes"):
            found[before + key] = value
    return found


def _same(one: Path, other: Path) -> None:
    """Require the same lines of metrics, to 1e-6, and the same weights."""
    lines, others = read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, another in zip(lines, others, strict=True):
        numbers, more = _numbers(line), _numbers(another)
        if line["step"] == SAVED and len(more) > len(numbers):  # it was the last step of the run that was saved
            more = {name: value for name, value in more.items() if name in numbers}
        of_weights = {name for name in numbers if name.startswith("layers.")}  # AdamW makes rounding full steps there
        assert {name: more.pop(name) for name in of_weights} == pytest.approx(
            {name: numbers.pop(name) for name in of_weights}, rel=1e-5, abs=1e-6
        )
        assert more == pytest.approx(numbers, rel=2e-6, abs=1e-6)
        assert another["loss"] == pytest.approx(line["loss"], abs=1e-6)
    step = f"checkpoints/step_{lines[-1]['step']:06d}"
    for file in ("adapter_model.safetensors", "backbone_model.safetensors", "carried_states.safetensors"):
        if not (one / step / file).exists():
            assert not (other / step / file).exists()
            continue
        tensors, more = load_file(one / step / file), load_file(other / step / file)
        assert tensors.keys() == more.keys()
        for name, tensor in tensors.items():
            if name.endswith("in_proj.bias"):  # keys' bias has no gradient but rounding, which AdamW makes a full step
                continue
            torch.testing.assert_close(
                more[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda told, name=name: name + told
            )


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_the_same_in_several_processes(run: str, runs: Path) -> None:
    _same(runs / f"{RUNS[run][0]} one", runs / run)


@pytest.mark.parametrize("run", ["on 2", "on 1", "on tensor 2"])
def test_what_is_saved_on_four_processes_goes_on_with_fewer(run: str, runs: Path) -> None:
    _same(runs / "toy one", runs / run)


def test_the_losses_of_muon_are_the_same_in_several_processes(runs: Path) -> None:
    """Of a few steps: where a gradient is rounding alone, Muon makes that as large as the rest."""
    one, other = (read_metrics(runs / name / "metrics.jsonl") for name in ("toy muon one", MUON))
    losses = [line["loss"] for line in one]
    assert [line["loss"] for line in other] == pytest.approx(losses, abs=1e-6)
    assert len(set(losses)) == len(losses) == 3
