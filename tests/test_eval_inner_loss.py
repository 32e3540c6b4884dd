"""The task `inner_loss`, by the command line on real sound through the demo Moshi, and its picture."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import ttt_moshi
from ttt.config.schema import EvalConfig
from ttt.drawing import png
from ttt.eval.inner_loss import InnerLoss
from ttt.eval.pictures import inner_loss_figure
from ttt.eval.tasks import Setup
from ttt.inner_curves import InnerCurve, InnerCurves
from ttt.plugins import get_backbone
from ttt_cli.main import main
from ttt_moshi.options import MoshiOptions

MOSHI = get_backbone("moshi")
DEMO = Path(ttt_moshi.__file__).parent / "demo"
POSITIONS, EVERY = 60, 25
LOSSES = ("w0", "before", "after")
SITES = ("transformer.layers.1.ttt", "transformer.layers.2.ttt")


def noise(file: Path, *, seconds: float, rate: int = 24_000) -> None:
    samples = np.random.default_rng(5).normal(0, 2000, int(seconds * rate)).astype("<i2")
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes(samples.tobytes())


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of 211 frames, and one of 38 in a book's folder; and what is neither."""
    folder = tmp_path_factory.mktemp("sounds")
    shutil.copy(DEMO / "dialogue_eval.flac", folder / "speech.flac")
    (folder / "speaker" / "book").mkdir(parents=True)
    noise(folder / "speaker" / "book" / "noise.wav", seconds=3.0)
    (folder / "speaker" / "book" / "noise.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def evaluated(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of an evaluation under both arms in which something is learned."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert main(["eval", str(config(folder, sounds)), "--arms", "ttt,reset", "--out", str(folder / "results")]) == 0
    return folder / "results"


def config(folder: Path, data: Path, **options: object) -> Path:
    file = folder / "moshi.yaml"
    task = {"name": "inner_loss", "data": str(data), "positions": POSITIONS, **options}
    sections = {
        "backbone": {"name": "moshi", "preset": "demo", "dim": 32, "num_heads": 2, "num_layers": 3},
        "ttt": {"layers": [1, 2], "mini_batch_size": 8, "base_lr": 4.0},
        "train": {"device": "cpu", "param_dtype": "float32"},
        "eval": {"reset_sec": EVERY / 12.5, "tasks": [task]},
    }
    file.write_text("".join(f"{name}: {json.dumps(section)}\n" for name, section in sections.items()))
    return file


def arrays(folder: Path, name: str, arm: str) -> dict[str, np.ndarray]:
    (file,) = (folder / "positions" / "inner_loss").glob(f"{name}*.{arm}.npz")
    with np.load(file) as content:
        return dict(content)


def test_three_losses_of_each_layer_and_position_are_written_and_their_means_are_the_results(evaluated: Path) -> None:
    names = {f"{site}.{loss}" for site in SITES for loss in LOSSES}
    for item, length in (("speech.flac", POSITIONS), ("speaker_book_noise.wav", 38)):
        found = arrays(evaluated, item, "ttt")
        assert set(found) == names
        assert {losses.shape for losses in found.values()} == {(length,)}
        for site in SITES:
            assert found[f"{site}.w0"][0] == pytest.approx(found[f"{site}.before"][0], rel=1e-4)
            assert np.abs(found[f"{site}.w0"] - found[f"{site}.before"])[8:].min() > 0
    results = json.loads((evaluated / "results.json").read_text())["results"]["inner_loss"]
    both = [arrays(evaluated, item, "ttt") for item in ("speech.flac", "speaker_book_noise.wav")]
    for metric, one, other in (("gain", "w0", "before"), ("step", "before", "after")):
        layers = [np.mean([x[f"{site}.{one}"].mean() - x[f"{site}.{other}"].mean() for x in both]) for site in SITES]
        assert results[f"{metric},none"] == pytest.approx(np.mean(layers), rel=1e-4)
        for site, layer in zip(SITES, layers, strict=True):
            assert results[f"{metric}/{site},none"] == pytest.approx(layer, rel=1e-4)
    assert results["step,none"] > 0
    assert list(results)[1] == "gain,none"


def test_the_arm_that_learns_anew_meets_its_start_again(evaluated: Path) -> None:
    kept, anew = (arrays(evaluated, "speech.flac", arm) for arm in ("ttt", "reset"))
    for site in SITES:
        w0, before = anew[f"{site}.w0"], anew[f"{site}.before"]
        assert before[[0, EVERY, 2 * EVERY]] == pytest.approx(w0[[0, EVERY, 2 * EVERY]], rel=1e-4)
        assert abs(kept[f"{site}.before"][EVERY] - w0[EVERY]) > 1e-3 * w0[EVERY]
        for loss in LOSSES:
            name = f"{site}.{loss}"
            assert anew[name][:EVERY] == pytest.approx(kept[name][:EVERY], rel=1e-4)


def test_the_curves_are_those_of_the_clip_read_whole(evaluated: Path, sounds: Path) -> None:
    from ttt.check import load_config
    from ttt.learned import fitting, learned_model

    loaded = load_config(config(evaluated, sounds))
    assert loaded.config is not None
    assert loaded.backbone is not None
    settings, info = fitting(loaded.config, loaded.backbone, adapter=None, verify=True)
    with learned_model(settings, loaded.backbone, info, as_start=True, ways=[]) as (model, injection):
        clip = MOSHI.clip_reader(settings, device="cpu").read(sounds / "speech.flac")[None]
        with InnerCurves(injection) as recorder, torch.no_grad():
            MOSHI.score(model, clip)
    found = arrays(evaluated, "speech.flac", "ttt")
    for site, curve in recorder.curves().items():
        for name, losses in zip(LOSSES, curve, strict=True):
            assert losses[0, :POSITIONS] == pytest.approx(found[f"{site}.{name}"], rel=1e-4)


def test_each_arm_has_a_picture(evaluated: Path) -> None:
    for name in ("inner_loss.png", "inner_loss_reset.png"):
        pixels = imread(evaluated / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.02


def refused(file: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["eval", str(file), "--out", str(file.parent / "out"), *options]) != 0
    return " ".join(capsys.readouterr().err.split())


WRONG: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], str]] = {
    "no folder": (
        lambda tmp: tmp / "nowhere",
        (),
        "nowhere: there is no such folder; write the folder of the task's data",
    ),
    "a file": (
        lambda tmp: tmp / "moshi.yaml",
        (),
        "moshi.yaml: is a file, not a folder; write the folder of the task's data",
    ),
    "no sound": (lambda tmp: tmp, (), "holds no .flac or .wav or .ogg or .mp3 file to read inner losses from"),
    "gates closed": (
        lambda tmp: DEMO,
        ("--arms", "closed"),
        "the task inner_loss has nothing to measure under the arm closed; name ttt or reset, or leave the task out",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_measured_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, options, sentence = WRONG[name]
    assert sentence in refused(config(tmp_path, data(tmp_path)), *options, capsys=capsys)


def test_a_runs_own_evaluation_leaves_the_closed_gates_out_and_a_book_is_one_cluster(sounds: Path) -> None:
    assert InnerLoss().arms_among(None) == InnerLoss().arms_among(("ttt", "closed")) == ("ttt",)
    assert InnerLoss().arms_among(("reset", "ttt")) == ("reset", "ttt")
    options = InnerLoss.options(name="inner_loss", data=str(sounds))
    settings = SimpleNamespace(backbone=MoshiOptions(), eval=EvalConfig(score=MOSHI.score_options()))
    items = InnerLoss().items(Setup(settings, MOSHI, options))
    assert [(item.id, item.unit, item.cluster) for item in items] == [
        ("speaker/book/noise.wav", "speaker/book/noise.wav", "speaker/book"),
        ("speech.flac", "speech.flac", "speech.flac"),
    ]


# --- the picture ---


def curve(length: int, *, sequences: int = 3) -> InnerCurve:
    """Losses that fall from 2 to 1 with what was learned, of sequences of which the last ends early."""
    fall = 1 + 1 / np.arange(1, length + 1)
    rows = [np.broadcast_to(losses, (sequences, length)).copy() for losses in (np.full(length, 2.0), fall, fall / 2)]
    for losses in rows:
        losses[-1, length // 2 :] = np.nan
    return InnerCurve(*(losses.astype(np.float32) for losses in rows))


def test_a_panel_for_each_layer_with_its_curves_and_distances() -> None:
    curves = {f"layers.{n}.ttt": curve(100 * (n + 1)) for n in range(5)}
    figure = inner_loss_figure(curves, window=1)
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title(loc="left") for axes in panels] == list(curves)
    for axes, drawn in zip(panels, curves.values(), strict=True):
        for line, losses in zip(axes.lines, drawn, strict=True):
            assert line.get_xdata().tolist() == list(range(1, losses.shape[1] + 1))
            assert line.get_ydata() == pytest.approx(losses[0], rel=1e-6)
        gap, step = axes.texts[0].get_text().splitlines()
        learned = float(np.nanmean(drawn.before) - 2)
        assert gap == rf"$\ell(W_{{t-1}})-\ell(W_0)$ = −{-learned:.3g} (−{-learned / 2:.1%})"
        assert step.endswith("(−50.0%)")
    assert png(figure)[:4] == b"\x89PNG"


def test_curves_are_smoothed_over_ten_positions_and_sequences_count_where_they_are() -> None:
    losses = np.arange(30, dtype=np.float32)[None] + np.array([[0.0], [2.0]], np.float32)
    losses[1, 20:] = np.nan
    axes = inner_loss_figure({"here": InnerCurve(losses, losses, losses)}).axes[0]
    drawn = axes.lines[0].get_ydata()
    assert drawn[[0, 9, 19, 29]] == pytest.approx([1.0, 5.5, 15.5, 24.5])


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_nothing_stands_outside_the_picture(layers: int) -> None:
    figure = inner_loss_figure({f"layers.{n}.ttt": curve(40) for n in range(layers)}, arm="reset")
    png(figure)
    assert (
        figure.get_suptitle()
        == "Inner loss by position, fast weights reset (mean of 3 sequences, then of 10 positions)"
    )
    whole = figure.bbox
    for part in (*figure.legends, figure._suptitle, *(axes.texts[0] for axes in figure.axes if axes.lines)):
        box = part.get_window_extent()
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1


def test_no_curves_are_refused() -> None:
    with pytest.raises(ValueError, match="with its gates closed a model has none"):
        inner_loss_figure({})
