from __future__ import annotations

import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console

from ttt.check import load_config
from ttt.errors import EnvironmentProblem, UsageError
from ttt.train import train
from ttt_videodit.clip import demo_frames
from ttt_videodit.codec import DemoCodec
from ttt_videodit.diffusion import make_scheduler
from ttt_videodit.pictures import reconstruct, write_reconstruction
from ttt_videodit.plugin import ttt_backbone
from ttt_videodit.sampling import to_pixels

CONFIG = """
backbone: {name: videodit, preset: demo, dim: 32, num_heads: 2, num_layers: 2}
ttt: {layers: [1], layer_type: linear, mini_batch_size: 64}
data: {duration_sec: 3}
train: {trainable: all, max_steps: 30, batch_size: 2, lr: 5.0e-3, cpu_threads: 1, seed: 3}
eval: {max_batches: 1}
run_dir: RUN
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the demo's clip."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    loaded = load_config("test.yaml", text=CONFIG.replace("RUN", str(folder)), backbone=ttt_backbone())
    train(loaded.config, loaded.backbone, console=Console(file=io.StringIO()))
    return folder


def test_a_trained_model_reconstructs_its_clip_better(run: Path, tmp_path: Path) -> None:
    """In both splits the clip and its noise are what they are; on the training split the error falls."""
    found = reconstruct(run, timestep=600)
    assert [clip.split for clip in found] == ["train", "eval"]
    codec = DemoCodec.load()
    for clip in found:
        frames = demo_frames(clip.split)[None]
        latents = codec.encode(frames)[:, :13]
        # encoded in pieces there and whole here: a value may fall on the other side of an edge between two pixels
        assert np.abs(clip.clip.astype(int) - to_pixels(codec.decode(latents)[0])).max() <= 1
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        signal = make_scheduler().alphas_cumprod[600].sqrt()
        assert clip.signal == pytest.approx(float(signal))
        noisy = signal.float() * latents + (1 - signal**2).sqrt().float() * noise
        assert np.abs(clip.noised.astype(int) - to_pixels(codec.decode(noisy)[0])).max() <= 1
        for picture in (clip.untrained, clip.trained):
            assert picture.shape == (49, 64, 64, 3)
        assert not np.array_equal(clip.untrained, clip.trained)
    assert found[0].trained_error < 0.9 * found[0].untrained_error
    write_reconstruction(found, tmp_path / "picture.png")
    picture = matplotlib.image.imread(tmp_path / "picture.png")
    assert picture.shape[1] > picture.shape[0] > 500
    assert picture[..., :3].std() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep": 1000}, "timestep 1000: write from 0 to 999"),
        ({"timestep": -1}, "timestep -1: write from 0 to 999"),
        ({"window": 15}, "window 15: the split train has 15, numbered from 0"),
        ({"window": 2}, "window 2: the split eval has 2, numbered from 0"),
    ],
)
def test_what_does_not_exist_is_named(run: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reconstruct(run, **settings)


def test_a_folder_that_is_no_run_of_videodit(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"config\.yaml"):
        reconstruct(tmp_path)
    (tmp_path / "config.yaml").write_text("backbone: {name: moshi, preset: demo}\n")
    with pytest.raises(UsageError, match="a run of moshi; name a run of videodit"):
        reconstruct(tmp_path)
