"""Tasks on what diffusion backbones denoise and make: the same noise in every arm, losses by part, samples, raters."""

from __future__ import annotations

import csv
import importlib.machinery
import json
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fake_distributions import importable, install
from test_cli_sample import PLUGIN
from torch import Tensor, nn
from toy import MakingToy

from ttt import inject
from ttt.check import load_config
from ttt.config import RunConfig
from ttt.errors import EnvironmentProblem, PluginError, UsageError
from ttt.eval.bench import Bench
from ttt.eval.engine import measured
from ttt.eval.items import Item, Measured
from ttt.eval.tasks import ItemTask, Setup
from ttt.eval.video import vbench
from ttt.eval.video.denoising import DiffusionLoss, bands_of, timesteps_of
from ttt.plugins import EvalContext, SegmentLosses, WindowSource, run_config_model
from ttt.plugins.rows import RowDraws
from ttt.train import pictures
from ttt_cli.main import main
from ttt_videodit import diffusion
from ttt_videodit.adapter import BidirectionalTTT, reset_at_segments
from ttt_videodit.diffusion import losses_by_segment, training_loss
from ttt_videodit.geometry import Segments
from ttt_videodit.layout import Layout
from ttt_videodit.options import VideoDiTOptions
from ttt_videodit.plugin import ttt_backbone

BACKBONE = "{name: videodit, preset: demo, dim: 32, num_heads: 2, num_layers: 2, attn_length: 2}"
OPTIONS = VideoDiTOptions(preset="demo", dim=32, num_heads=2, num_layers=2, attn_length=2)


def config(alpha: float = 0.3) -> RunConfig:
    text = f"backbone: {BACKBONE}\nttt: {{mini_batch_size: 16, initial_gating_alpha: {alpha}}}\n"
    return load_config("test.yaml", text=text, backbone=ttt_backbone()).config


def made(options: VideoDiTOptions = OPTIONS) -> nn.Module:
    """A plain transformer whose outputs depend on all that it reads."""
    model = ttt_backbone().build(options, device="cpu", dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for parameter in model.parameters():  # diffusers' last layers start near zero
            nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else None
    return model


def adapted(alpha: float = 0.3) -> nn.Module:
    model = made()
    inject.apply(model, ttt_backbone().sites(model), config(alpha).ttt, causal=False, seed=3)
    return model.eval()


def batch_of(rows: int = 2, segments: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(rows, OPTIONS.segments.frames(segments), 16, 4, 4, generator=generator)
    text = torch.randn(rows, segments, 3, 32, generator=generator)
    return {"mean": mean, "std": 0.1 * torch.rand(mean.shape, generator=generator), "text": text}


class Windows:
    """Some windows of two videos in memory."""

    notice = None
    files = (range(2), range(2, 3))

    def __init__(self) -> None:
        self._batch = batch_of(3)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self._batch.items()}

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([sample[name] for sample in samples]) for name in self._batch}

    def describe(self, index: int) -> str:
        return f"video, {index}-{index + 1} s"


def bench_of(model: nn.Module, **options: Any) -> Bench:
    context = EvalContext(model, ttt_backbone(), config(), Windows(), torch.device("cpu"), step=0, stop=lambda: False)
    return Bench(context, DiffusionLoss.options(name="diffusion_loss", **options))


ITEMS = [Item(f"{n}: video, {n}-{n + 1} s", str(n), "ab"[n // 2]) for n in range(3)]


# --- the loss, by its definition ---


def test_by_segment_and_timestep_it_is_the_loss_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's own function, given the same timesteps and the same noise, at every timestep of a short schedule."""
    short = diffusion.make_scheduler().from_config({**diffusion.COGVIDEOX_SCHEDULE, "num_train_timesteps": 12})
    monkeypatch.setattr(diffusion, "schedule_of", lambda options: short)
    model, batch, seeds = adapted(), batch_of(), [7, 8]
    times = torch.tensor([timesteps_of(seed, bands_of(12, 4), 3) for seed in seeds])
    assert times.tolist() == [list(range(12))] * 2
    found = losses_by_segment(model, batch, OPTIONS, timesteps=times, seeds=seeds)
    assert found.loss.shape == (2, 12, 2)
    assert found.weights == (3 / 5, 2 / 5)  # the first segment has the frame beyond whole ones

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    monkeypatch.setattr(
        RowDraws,
        "normal",
        lambda self, shape, dtype: torch.stack([torch.randn(shape, generator=each) for each in generators]),
    )
    losses = []
    for timestep in range(12):
        monkeypatch.setattr(diffusion, "draw_timesteps", lambda rows, count, t=timestep: torch.tensor([t, t]))
        losses.append(training_loss(model, batch, OPTIONS).loss.item())
    weighted = (found.loss * torch.tensor(found.weights)).sum(-1).mean(0)
    assert weighted.tolist() == pytest.approx(losses, rel=1e-5)
    assert len({round(loss, 4) for loss in losses}) == 12

    task, bench = DiffusionLoss(), bench_of(model, bands=4, draws=3)
    monkeypatch.setattr(Windows, "collate", lambda self, samples: batch)
    by_item = task.measure(bench, ITEMS[:2])
    for item, one in zip(ITEMS, by_item, strict=False):
        bands = [value for name, value in one.numbers.items() if name.startswith("band.")]
        segments = [one.numbers["segment.1"], one.numbers["segment.2"]]
        assert list(one.numbers)[1:5] == ["band.00-02", "band.03-05", "band.06-08", "band.09-11"]
        assert one.numbers["loss"] == pytest.approx(sum(bands) / 4) == pytest.approx(np.dot(segments, [3 / 5, 2 / 5]))
        assert one.numbers["loss"] == pytest.approx(float(one.arrays["loss"].mean(0) @ one.arrays["weights"]))
        assert next(iter(task.values(Setup(config(), ttt_backbone(), None), item, one.numbers))) == "loss"


def test_timesteps_lie_in_their_bands_and_fill_them() -> None:
    bands = bands_of(1000, 7)
    assert [band.stop for band in bands[:-1]] == [band.start for band in bands[1:]]
    assert (bands[0].start, bands[-1].stop) == (0, 1000)
    drawn = [timesteps_of(seed, bands, 3) for seed in range(200)]
    for each in drawn:
        assert each == sorted(each)
        assert all(each[3 * n + draw] in bands[n] for n in range(7) for draw in range(3))
    assert len(set().union(*drawn)) > 900  # each of them comes up
    assert np.mean(drawn) == pytest.approx(499.5, abs=5)
    assert timesteps_of(3, bands, 2) == timesteps_of(3, bands, 2) != timesteps_of(4, bands, 2)


# --- the same noise in each arm, batch and run ---


def test_gates_closed_it_is_the_plain_model_bit_for_bit() -> None:
    batch, seeds, times = batch_of(), [1, 2], torch.tensor([[20, 400], [600, 990]])
    plain = losses_by_segment(made(), batch, OPTIONS, timesteps=times, seeds=seeds).loss
    bench = bench_of(adapted())

    def under(arm: str) -> Tensor:
        with bench.under(arm):
            return losses_by_segment(bench.model, batch, OPTIONS, timesteps=times, seeds=seeds).loss

    assert torch.equal(under("closed"), plain)
    assert not torch.allclose(under("ttt"), plain)
    assert not torch.equal(under("reset"), under("ttt"))
    assert torch.equal(under("closed"), plain)  # an arm leaves nothing behind


def test_a_window_gets_its_noise_whatever_is_beside_it() -> None:
    model, batch, times = adapted(), batch_of(), torch.tensor([[20, 400], [600, 990]])
    together = losses_by_segment(model, batch, OPTIONS, timesteps=times, seeds=[1, 2]).loss
    torch.manual_seed(99)  # the global generator has no part in it
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        found = losses_by_segment(model, alone, OPTIONS, timesteps=times[row : row + 1], seeds=[row + 1]).loss
        assert found[0].tolist() == [pytest.approx(each, rel=1e-5) for each in together[row].tolist()]
        other = losses_by_segment(model, alone, OPTIONS, timesteps=times[row : row + 1], seeds=[row + 2]).loss
        assert not torch.allclose(other[0], together[row], rtol=1e-3)


class OtherNoiseInEachArm(DiffusionLoss):
    """A saboteur: its noise depends on the arm."""

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        seed = {"ttt": 0, "closed": 1, "reset": 2}[bench.arm]
        bench.options = bench.options.model_copy(update={"seed": seed})
        return super().measure(bench, items)


@pytest.mark.parametrize(("task", "same"), [(DiffusionLoss(), True), (OtherNoiseInEachArm(), False)])
def test_arms_that_cannot_differ_are_equal(task: DiffusionLoss, same: bool) -> None:
    """With gates at 0 all arms are the same model, so any difference would be of the noise."""
    rows = measured(task, bench_of(adapted(0.0), bands=2, draws=1), ITEMS, ("ttt", "closed", "reset")).rows
    for row in rows:
        assert row.error is None
        assert (row.arms["ttt"] == row.arms["closed"] == row.arms["reset"]) == same
    assert len({row.arms["ttt"]["loss"] for row in rows}) == 3  # and each window has noise of its own


class Drawing(ItemTask):
    """A task that draws from every global generator."""

    name = "drawing"
    requires = ()

    def items(self, setup: Setup) -> Sequence[Item]:
        return ITEMS

    def measure(self, bench: Bench, items: Sequence[Item]) -> Sequence[Measured]:
        draws = {"torch": float(torch.rand(())), "numpy": float(np.random.random()), "python": random.random()}
        return [Measured(draws) for _ in items]

    def values(self, setup: Setup, item: Item, numbers: Mapping[str, float]) -> Mapping[str, float]:
        return numbers


def test_every_arm_draws_the_same_from_global_generators() -> None:
    bench = bench_of(adapted())
    rows = [measured(Drawing(), bench, [item], ("ttt", "closed", "reset")).rows[0] for item in ITEMS[:2]]
    for row in rows:
        assert row.arms["ttt"] == row.arms["closed"] == row.arms["reset"]
    for name, number in rows[0].arms["ttt"].items():
        assert number != rows[1].arms["ttt"][name]  # but each item draws its own


WRONG: dict[str, tuple[str, Any, str]] = {
    "no timesteps": ("num_timesteps", 0, "`num_timesteps`, .*it returned 0, not a number of timesteps"),
    "no name": ("window_source", WindowSource(""), "a WindowSource whose name is '', not the name of a recording"),
    "names of files": ("window_source", WindowSource("a", ("b",)), "a tuple, not the files"),  # type: ignore[arg-type]
    "no segments": (
        "diffusion_losses",
        SegmentLosses(torch.ones(3, 4), (1.0,)),
        r"loss is torch.float32 \[3, 4\], not",
    ),
    "whole numbers": ("diffusion_losses", SegmentLosses(torch.ones(3, 4, 1).long(), (1.0,)), "loss is torch.int64"),
    "weights": (
        "diffusion_losses",
        SegmentLosses(torch.ones(3, 4, 2), (0.5, 0.6)),
        "not a share for each of 2 segments",
    ),
    "too few": (
        "diffusion_losses",
        SegmentLosses(torch.ones(3, 1, 1), (1.0,)),
        r"gave losses \[3, 1, 1\] for timesteps",
    ),
    "no context": ("reset_at_segments", None, "it returned None, not a context manager"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_of_a_backbone_is_told(case: str) -> None:
    method, answer, told = WRONG[case]
    wrong = type("Wrong", (MakingToy,), {method: lambda *_, **__: answer})()
    settings = {"backbone": {"name": "toy"}, "data": {"window": 6, "windows_of_files": (2, 1)}}
    run = run_config_model(wrong).model_validate(settings)
    dataset = wrong.dataset(run, split="eval", device="cpu")
    options = DiffusionLoss.options(name="diffusion_loss", bands=2)
    model = wrong.build(run.backbone, device="cpu", dtype=torch.float32)
    context = EvalContext(model, wrong, run, dataset, torch.device("cpu"), step=0, stop=lambda: False)
    items = [Item(f"{number}: {dataset.describe(number)}", str(number), "") for number in range(3)]
    with pytest.raises(PluginError, match=told):  # noqa: PT012 - which of the three asks for it
        wrong.window_source(dataset, 0)
        with Bench(context, options).under("reset") as bench:
            DiffusionLoss().measure(bench, items)


# --- the arm reset ---


@pytest.mark.parametrize("resets", [False, True])
def test_reset_keeps_nothing_of_another_segment(resets: bool) -> None:
    """What the last segment holds reaches the first one by TTT backward, and only without a reset."""
    ttt = BidirectionalTTT(32, 2, config().ttt)
    layout = Layout(Segments(2, 1), 3, text_length=3, height=2, width=2)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, layout.text_tokens, 32, generator=generator)
    video = torch.randn(1, layout.tokens - layout.text_tokens, 32, generator=generator)
    assert sum(layout.segment_sizes) == layout.tokens

    def answer(video: Tensor) -> Tensor:
        with torch.no_grad():
            if not resets:
                return ttt(video, text, layout)[0]
            with reset_at_segments(ttt):
                return ttt(video, text, layout)[0]

    changed = video.clone()
    changed[:, -4:] += 1
    same = (answer(video) == answer(changed)).flatten(2).all(2)[0]
    assert bool(same[:12].all()) == resets
    assert not same[-4:].any()
    assert not ttt.resets


def test_a_video_of_one_segment_has_nothing_to_forget() -> None:
    bench, batch = bench_of(adapted()), batch_of(1, segments=1)
    losses = []
    for arm in ("ttt", "reset", "closed"):
        with bench.under(arm):
            losses.append(
                losses_by_segment(bench.model, batch, OPTIONS, timesteps=torch.tensor([[500]]), seeds=[1]).loss
            )
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


# --- end to end, on the demo ---


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(folder: Path, tasks: str, more: str = "") -> None:
    (folder / "c.yaml").write_text(
        f"backbone: {BACKBONE.replace('attn_length: 2', 'attn_length: 12')}\ndata: {{duration_sec: 6}}\n"
        f"ttt: {{mini_batch_size: 32, initial_gating_alpha: 0.3}}\ntrain: {{device: cpu}}\n"
        f"eval: {{tasks: {tasks}{more}}}\n"
    )


def test_the_loss_of_the_demo_with_its_pictures(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(work, "[{name: diffusion_loss, bands: 3, draws: 1}]")
    arms = ["--arms", "ttt,closed,reset"]
    assert main(["eval", "c.yaml", "--out", "e", "--tasks", "diffusion_loss", *arms]) == 0
    results = json.loads(Path("e/results.json").read_text())
    told = results["results"]["diffusion_loss"]
    for name in ("loss", "loss/band.000-332", "loss/segment.1", "loss/segment.2"):
        assert told[f"{name},none"] > 0
        assert told[f"{name},ttt-closed"] == pytest.approx(told[f"{name},none"] - told[f"{name},closed"])
        assert told[f"{name},closed"] != told[f"{name},reset"] != told[f"{name},none"]
    assert results["higher_is_better"]["diffusion_loss"]["loss"] is False
    assert results["n-samples"]["diffusion_loss"]["clusters"] == 1  # squares of one clip are not independent
    assert told["loss_stderr,none"] is None
    assert results["groups"]["average"] is None
    assert "| diffusion_loss (loss ↓) |" in Path("e/summary.md").read_text()
    assert Path("e/diffusion_loss.png").read_bytes().startswith(b"\x89PNG")
    row = json.loads(Path("e/samples/diffusion_loss.jsonl").read_text().splitlines()[0])
    assert {Path(file).name for file in row["files"]} == {"city.mp4", "captions.json", "codec.safetensors"}
    saved = np.load(next(Path("e/positions/diffusion_loss").glob("*.reset.npz")))
    assert saved["loss"].shape == (3, 2)
    before = Path("e/results.json").read_bytes()
    capsys.readouterr()
    assert main(["eval", "c.yaml", "--out", "e", "--resume", *arms]) == 0
    assert "2 of 2 items are there already" in capsys.readouterr().out
    assert Path("e/results.json").read_bytes() == before


def test_a_setting_that_reset_would_not_read_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(work, "[{name: diffusion_loss}]", more=", reset_tokens: 5")
    assert main(["eval", "c.yaml", "--out", "e", "--arms", "ttt,reset"]) == 2
    assert "c.yaml:5:55 error TTT515" in " ".join(capsys.readouterr().err.split())
    run = run_config_model(ttt_backbone()).model_validate({"backbone": OPTIONS, "eval": {"reset_tokens": 5}})
    task = DiffusionLoss()
    refused = task.refuses(Setup(run, ttt_backbone(), task.options(name=task.name)), "reset")  # without the command
    assert refused == "starts fast weights anew at each segment of a window, so leave out eval.reset_tokens"


def test_without_held_out_data_it_is_refused() -> None:
    run = run_config_model(ttt_backbone()).model_validate({"data": {"train_data": "a.jsonl"}, "backbone": OPTIONS})
    task = DiffusionLoss()
    setup = Setup(run, ttt_backbone(), task.options(name=task.name))
    assert not task.is_ready(setup)
    with pytest.raises(UsageError, match=r"no held-out data, .* name some in data\.eval_data"):
        task.items(setup)


def test_videos_of_the_demo_hide_their_arms_from_raters(work: Path) -> None:
    Path("prompts.json").write_text('["towers at night"]')
    write_config(work, "[{name: samples, prompts: prompts.json, seconds: 6, steps: 1}]")
    assert main(["eval", "c.yaml", "--out", "e"]) == 0
    names = {file.name for file in Path("e/samples_made").iterdir()}
    assert {"000.ttt.mp4", "000.ttt.png", "000.closed.mp4", "000.closed.png", "000.png", "sampler.log"} <= names
    ttt, closed = (Path(f"e/samples_made/000.{arm}.mp4").read_bytes() for arm in ("ttt", "closed"))
    assert ttt != closed
    clips = [file.read_bytes() for file in Path("e").glob("raters-*/clips/*")]
    assert sorted(clips) == sorted([ttt, closed])
    for content in clips:  # an mp4 says what it was made from
        assert b"towers at night" in content
        assert b"closed" not in content
        assert b".ttt" not in content
    assert (
        main(["sample", "c.yaml", "--seconds", "6", "--steps", "1", "--prompt", "towers at night", "--out", "000.mp4"])
        == 0
    )
    assert Path("000.mp4").read_bytes() == ttt


# --- samples, with a backbone that draws from the global generators ---

TOY = """\
backbone: {name: toy, num_layers: 2, dim: 16, num_heads: 2}
ttt: {mini_batch_size: 4, initial_gating_alpha: 2.0}
data: {window: 12}
train: {device: cpu}
eval: {tasks: [{name: samples, prompts: prompts.jsonl, seconds: 4, steps: 9, seed: 3}]}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """A working folder with the toy that can do everything; what it samples, as name and seed."""
    install(tmp_path, "toy", "toy_plugin", PLUGIN.format(toy="MakingToy"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])
    Path("c.yaml").write_text(TOY)
    Path("prompts.jsonl").write_text('["a", "b"]\n["c", "d"]\n["e"]\n')
    made: list[tuple[str, int]] = []
    sample = MakingToy.sample

    def counted(self: MakingToy, model: nn.Module, request: Any, config: RunConfig, **more: Any) -> Sequence[Path]:
        made.append((request.out.name, request.seed))
        return sample(self, model, request, config, **more)

    monkeypatch.setattr(MakingToy, "sample", counted)
    with importable(tmp_path):
        yield made


def test_samples_have_the_same_seeds_in_each_arm_and_are_those_of_ttt_sample(toy: list[tuple[str, int]]) -> None:
    assert main(["eval", "c.yaml", "--out", "e", "--arms", "ttt,closed,reset"]) == 0
    assert sorted(toy) == sorted([(f"{n:03d}.txt", 3 + n) for n in range(3)] * 3)
    texts = {
        arm: [Path(f"e/samples_made/{n:03d}.{arm}.txt").read_text() for n in range(3)] for arm in ("ttt", "closed")
    }
    assert texts["ttt"] != texts["closed"]
    prompts = ["--prompts", "prompts.jsonl", "--seconds", "4", "--steps", "9", "--seed", "3"]
    assert main(["sample", "c.yaml", *prompts, "--out", "s/"]) == 0
    assert [Path(f"s/{n:03d}.txt").read_text() for n in range(3)] == texts["ttt"]
    assert json.loads(Path("e/results.json").read_text())["results"] == {"samples": {"alias": "samples"}}
    assert "| samples | – |" in Path("e/summary.md").read_text()


def test_no_sample_is_made_twice(
    toy: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second arm of the second item; and the prompts change before it goes on."""
    whole = MakingToy.sample

    def stopped(self: MakingToy, *args: Any, **more: Any) -> Sequence[Path]:
        if len(toy) == 3:
            raise KeyboardInterrupt
        return whole(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MakingToy, "sample", stopped)
        assert main(["eval", "c.yaml", "--out", "e"]) != 0
    first = list(toy)
    assert first == [("000.txt", 3), ("000.txt", 3), ("001.txt", 4)]
    assert not list(Path("e/samples_made").glob("*.part"))
    assert main(["eval", "c.yaml", "--out", "e", "--resume"]) == 0
    assert toy[3:] == [("001.txt", 4), ("002.txt", 5), ("002.txt", 5)]
    before = {file.name: file.read_bytes() for file in Path("e/samples_made").glob("*.txt")}
    assert len(before) == 6
    assert main(["eval", "c.yaml", "--out", "e", "--resume"]) == 0
    assert len(toy) == 6

    Path("prompts.jsonl").write_text('["a", "b"]\n["zebra", "changed"]\n["e"]\n')
    assert main(["eval", "c.yaml", "--out", "e", "--resume"]) == 0
    assert toy[6:] == [("001.txt", 4), ("001.txt", 4)]  # its rows are stale, and of its samples one
    after = {file.name: file.read_bytes() for file in Path("e/samples_made").glob("*.txt")}
    assert {name for name in before if before[name] != after[name]} == {"001.ttt.txt", "001.closed.txt"}
    Path("e/samples_made/000.ttt.txt").unlink()
    assert main(["eval", "c.yaml", "--out", "e", "--resume"]) == 3
    assert "000.ttt.txt: is gone; make the samples anew with --overwrite" in capsys.readouterr().err
    assert main(["eval", "c.yaml", "--out", "e", "--overwrite"]) == 0
    assert len(toy) == 8 + 6
    assert {file.name: file.read_bytes() for file in Path("e/samples_made").glob("*.txt")} == after


def test_what_raters_fill_in_is_read_and_never_written_over(
    toy: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "c.yaml", "--out", "e"]) == 0
    [folder] = [place for place in Path("e").glob("raters-*") if place.is_dir()]
    key = list(csv.DictReader(Path(f"{folder}.key.csv").read_text().splitlines()))
    sheet = list(csv.DictReader((folder / "ratings.csv").read_text().splitlines()))
    assert not any(arm in name for arm in ("ttt", "closed") for row in sheet for name in row.values())
    assert {file.name for file in folder.rglob("*")} & {"key.csv", f"{folder.name}.key.csv"} == set()
    for number, (row, hidden) in enumerate(zip(sheet, key, strict=True)):
        for side in ("left", "right"):
            arm = hidden[f"{side}_arm"]
            clip, prompt = (folder / row[side]).read_bytes(), row["prompt"]
            assert (
                clip == Path(f"e/samples_made/{['a / b', 'c / d', 'e / e'].index(prompt):03d}.{arm}.txt").read_bytes()
            )
        row["winner"] = "tie" if number == 2 else "left" if hidden["left_arm"] == "ttt" else "right"
    sheet[1]["winner"] = "left" if key[1]["left_arm"] == "closed" else "right"
    with (folder / "anna.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, list(sheet[0]))
        writer.writeheader()
        writer.writerows(sheet)
    filled = (folder / "anna.csv").read_bytes()
    (folder / "ratings.csv").write_bytes(filled)
    assert main(["eval", "c.yaml", "--out", "e", "--resume"]) == 0
    assert (folder / "ratings.csv").read_bytes() == filled
    before = Path(f"{folder}.key.csv").read_bytes()
    Path(f"{folder}.key.csv").unlink()
    assert main(["eval", "c.yaml", "--out", "e", "--resume"]) == 0
    assert (folder / "ratings.csv").read_bytes() == filled
    assert Path(f"{folder}.key.csv").read_bytes() == before
    assert not list(Path("e").glob("*.part"))
    capsys.readouterr()
    assert main(["eval", "--ratings", str(folder / "anna.csv"), "--ratings", str(folder / "ratings.csv")]) == 0
    told = capsys.readouterr().out
    assert "closed against ttt: preferred in 0.500 ± 0.289 of 6 ratings (a tie is half)" in told
    assert "ttt: Elo 1000 ± " in told
    (folder.parent / "away").mkdir()
    (folder.parent / "away" / "anna.csv").write_bytes(filled)
    assert main(["eval", "--ratings", str(folder.parent / "away" / "anna.csv")]) == 3
    assert "put the sheet into the folder raters-…" in " ".join(capsys.readouterr().err.split())


REFUSED: dict[str, tuple[Callable[[], Any], int, str]] = {
    "no prompts": (
        lambda: Path("c.yaml").write_text(TOY.replace("prompts: prompts.jsonl, ", "")),
        2,
        "the task samples needs prompts and a length; write {name: samples, prompts: FILE.json, seconds: 3}",
    ),
    "an odd length": (
        lambda: Path("c.yaml").write_text(TOY.replace("seconds: 4", "seconds: 3")),
        2,
        "the toy samples segments of 2 s",
    ),
    "no file": (lambda: Path("prompts.jsonl").unlink(), 3, "prompts.jsonl: the prompts cannot be read"),
    "a folder without prompts": (
        lambda: (Path("p").mkdir(), Path("c.yaml").write_text(TOY.replace("prompts.jsonl", "p"))),
        3,
        "p: holds no prompts; they are files that end in .json or .jsonl",
    ),
    "too few prompts": (
        lambda: Path("prompts.jsonl").write_text('["a", "b", "c"]\n'),
        2,
        "4 s are 2 segments, but there are 3 prompts",
    ),
    "no VBench": (
        lambda: Path("c.yaml").write_text(TOY.replace("name: samples", "name: vbench")),
        3,
        "the package vbench, which is not installed, and nothing else can take its place",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sampled_is_told(
    toy: list[tuple[str, int]], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, code, message = REFUSED[case]
    change()
    assert main(["eval", "c.yaml", "--out", "e"]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert toy == []


def test_an_arm_that_a_backbone_cannot_be_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = "".join(
        f"    {name} = MakingToy.{name}\n" for name in ("sample_suffix", "plan_sample", "sample", "_tokens")
    )
    made = (
        f"from ttt.plugins import Sampling\nfrom toy import ToyBackbone\nclass Plain(ToyBackbone, Sampling):\n{methods}"
    )
    source = PLUGIN.format(toy="MakingToy").replace("@hookimpl", f"{made}\n@hookimpl")
    install(tmp_path, "toy", "toy_plugin", source.replace("MakingToy()", "Plain()"))
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(TOY)
    Path("prompts.jsonl").write_text('["a", "b"]\n')
    with importable(tmp_path):
        assert main(["eval", "c.yaml", "--out", "e", "--arms", "ttt,reset"]) == 2
    told = (
        "the task samples under the arm reset: the backbone toy has no reset: its fast weights cannot start anew inside"
    )
    assert told in " ".join(capsys.readouterr().err.split())


def test_samples_are_not_made_in_training(toy: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(
        TOY.replace("train: {device: cpu}", "train: {device: cpu, max_steps: 1}").replace(
            "seed: 3}", "seed: 3}, {name: diffusion_loss, bands: 2, draws: 1}"
        )
        + "  # and held-out data\n"
    )
    stream = " ".join(str(number % 7) for number in range(37))
    Path("held.txt").write_text(f"{stream}\n")
    assert main(["train", "c.yaml", "--set", "run_dir=run", "--set", "data.eval_data=held.txt"]) == 0
    assert toy == []
    assert "warning" not in capsys.readouterr().err
    [line] = [json.loads(one) for one in Path("run/metrics.jsonl").read_text().splitlines() if "eval_loss" in one]
    assert {key for key in line if "/" in key} == {
        f"diffusion_loss/loss{arm}" for arm in ("", "_closed", "_ttt-closed")
    }  # one stream is one cluster, whose error is unknown
    assert not list(Path("run").rglob("samples_made"))


# --- VBench, which is not installed: by what its source says of its interface ---


class DocumentedVBench:
    """`vbench.VBench` of vbench 0.1.5 as far as this project calls it: parameters, modes, and the file of results."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, device: Any, full_info_dir: str, output_path: str) -> None:
        self.output_path = output_path

    def evaluate(
        self,
        videos_path: str,
        name: str,
        prompt_list: Any = (),
        dimension_list: Any = None,
        local: bool = False,
        read_frame: bool = False,
        mode: str = "vbench_standard",
        **kwargs: Any,
    ) -> None:
        self.asked.append({"video": videos_path, "prompts": prompt_list, "mode": mode, **kwargs})
        scores = {dimension: [0.25 + place / 2, []] for place, dimension in enumerate(dimension_list)}
        Path(self.output_path, f"{name}_eval_results.json").write_text(json.dumps(scores))


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is asked of the class above, where the package vbench would be."""
    module = types.ModuleType("vbench")
    module.VBench = DocumentedVBench  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("vbench", None)
    monkeypatch.setitem(sys.modules, "vbench", module)
    monkeypatch.setattr(DocumentedVBench, "asked", [])
    return DocumentedVBench.asked


def test_vbench_is_asked_as_its_source_says(
    documented: list[dict[str, Any]], toy: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dimensions = "dimensions: [motion_smoothness, imaging_quality]"
    Path("c.yaml").write_text(TOY.replace("name: samples", f"name: vbench, {dimensions}, limit: 2"))
    assert main(["eval", "c.yaml", "--out", "e"]) == 0
    told = json.loads(Path("e/results.json").read_text())["results"]["vbench"]
    assert told["motion_smoothness,none"] == 0.25
    assert told["imaging_quality,closed"] == 0.75
    assert told["imaging_quality,ttt-closed"] == 0
    assert {Path(asked["video"]).parent.name for asked in documented} == {"vbench_made"}
    assert len({asked["video"] for asked in documented}) == 4
    assert all(asked["mode"] == "custom_input" and len(asked["prompts"]) == 1 for asked in documented)
    assert {asked["prompts"][0] for asked in documented} <= {"a b", "c d", "e e"}
    monkeypatch.setattr(DocumentedVBench, "evaluate", lambda self, **_: None)
    with pytest.raises(EnvironmentProblem, match="VBench left no results that can be read"):
        vbench.scores_of(Path("a.mp4"), "waves", ("motion_smoothness",), "cpu")
