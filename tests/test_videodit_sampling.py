from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import av
import matplotlib.image
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from rich.console import Console
from torch import Tensor, nn

from ttt import inject
from ttt.backbone import SampleRequest
from ttt.config import RunConfig
from ttt.config.load import load_config
from ttt.errors import EnvironmentProblem, NonFiniteError, UsageError
from ttt_videodit import model as videodit
from ttt_videodit.diffusion import make_scheduler
from ttt_videodit.plugin import VideoDiTOptions, ttt_backbone
from ttt_videodit.request import check_request, plan_sample
from ttt_videodit.sampling import denoise, guidance_weight, sample, to_pixels
from ttt_videodit.video import write_contact_sheet, write_video

OPTIONS = VideoDiTOptions(preset="demo", dim=32, num_heads=2, num_layers=2)
CONFIG = """
backbone: {name: videodit, preset: demo, dim: 32, num_heads: 2, num_layers: 2, text_dropout: 0.1}
ttt: {mini_batch_size: 16, initial_gating_alpha: 0.3}
"""


def config(**overrides: Any) -> RunConfig:
    written = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return load_config("test.yaml", text=CONFIG, backbone=ttt_backbone(), overrides=written).config


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny adapted transformer whose outputs depend on its text."""
    made = videodit.build(OPTIONS, device="cpu", dtype=torch.float32)
    torch.manual_seed(2)
    for parameter in made.parameters():  # diffusers' last layers start near zero
        nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else None
    inject.apply(made, videodit.sites(made), config().ttt, causal=False, seed=3)
    return made


def request(out: Path, **changes: Any) -> SampleRequest:
    settings: dict[str, Any] = {
        "prompts": ("towers at night", "the lights of cars", "clouds over the city"),
        "negative_prompts": (),
        "seconds": 9.0,
        "out": out,
        "steps": 4,
        "guidance_scale": 6.0,
        "seed": 7,
    }
    return SampleRequest(**{**settings, **changes})


def quiet() -> Console:
    return Console(record=True, force_terminal=False, width=200, file=open("/dev/null", "w"))  # noqa: SIM115


# --- the solver ---


@pytest.mark.parametrize(("steps", "scale"), [(10, 6.0), (4, 1.0)])
def test_one_segment_is_what_diffusers_own_pipeline_makes(steps: int, scale: float) -> None:
    """The same weights, prompts and seed, through `CogVideoXPipeline`."""
    ours = videodit.build(OPTIONS, device="cpu", dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else None
    theirs = CogVideoXTransformer3DModel.from_config({**ours.config, "_class_name": "CogVideoXTransformer3DModel"})
    theirs.load_state_dict(ours.state_dict())
    text, negative = torch.randn(2, 1, 1, 8, 32, generator=torch.Generator().manual_seed(0))
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=theirs.eval(), scheduler=make_scheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=text[0],
        negative_prompt_embeds=negative[0],
        height=64,
        width=64,
        num_frames=49,
        num_inference_steps=steps,
        guidance_scale=scale,
        use_dynamic_cfg=True,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).frames
    found = denoise(
        ours,
        text,
        negative,
        shape=(1, 13, 16, 8, 8),
        schedule=make_scheduler(),
        steps=steps,
        guidance_scale=scale,
        seed=9,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.1


def solve(model: nn.Module, *, text: Tensor, unconditional: Tensor | None = None, **changes: Any) -> Tensor:
    settings: dict[str, Any] = {
        "shape": (text.shape[0], OPTIONS.segments.frames(text.shape[1]), 16, 4, 4),
        "schedule": make_scheduler(),
        "steps": 4,
        "guidance_scale": 6.0,
        "seed": 7,
    }
    return denoise(model, text, unconditional, **{**settings, **changes})


def texts(rows: int = 1, segments: int = 2) -> Tensor:
    return torch.randn(rows, segments, 3, 32, generator=torch.Generator().manual_seed(4))


def test_guidance_of_1_is_the_conditional_model(model: nn.Module) -> None:
    text = texts()
    conditional = solve(model, text=text)
    assert torch.equal(solve(model, text=text, unconditional=-text, guidance_scale=1.0), conditional)
    assert not torch.equal(solve(model, text=text, unconditional=-text, guidance_scale=2.0), conditional)


def test_guidance_away_from_itself_changes_nothing(model: nn.Module) -> None:
    text = texts()
    torch.testing.assert_close(solve(model, text=text, unconditional=text), solve(model, text=text))


def test_guidance_by_its_definition() -> None:
    """`1 + s (1 − cos(π ((N − t)/N)⁵))/2`, at places where it is known by heart."""
    assert guidance_weight(6, timestep=50, steps=50) == 1
    assert guidance_weight(6, timestep=0, steps=50) == pytest.approx(7)
    half = 50 * (1 - 0.5**0.2)
    assert guidance_weight(4, timestep=half, steps=50) == pytest.approx(3)  # type: ignore[arg-type]
    weights = [guidance_weight(6, timestep=timestep, steps=50) for timestep in range(1000)]
    assert all(1 <= weight <= 7 + 1e-12 for weight in weights)


def test_a_seed_means_a_video(model: nn.Module) -> None:
    text = texts()
    first = solve(model, text=text)
    torch.randn(3)  # the global generator has no part in it
    assert torch.equal(solve(model, text=text), first)
    assert not torch.equal(solve(model, text=text, seed=8), first)


def test_steps_that_do_not_divide_the_timesteps_end_without_noise(model: nn.Module) -> None:
    """7 steps end at timestep 142, before 0: the answer is that step's x0 all the same."""
    text = texts()

    class Fixed(nn.Module):
        """Knows the clean latents: 0.5 everywhere."""

        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = model.patch_embed

        def forward(self, *, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
            signal = make_scheduler().alphas_cumprod[timestep[0]].float()
            noise = (hidden_states - signal.sqrt() * 0.5) / (1 - signal).sqrt()
            return (signal.sqrt() * noise - (1 - signal).sqrt() * 0.5,)

    for steps in (7, 10):
        found = solve(Fixed(), text=text, steps=steps)
        torch.testing.assert_close(found, torch.full_like(found, 0.5), rtol=0, atol=1e-5)


def test_a_prompt_reaches_its_segment_and_by_ttt_the_whole_video(model: nn.Module) -> None:
    """With gates closed, two blocks of attention by segments carry a change one segment on, and no further."""
    from ttt.adapter import gates_closed

    text = texts(segments=3)
    other = text.clone()
    other[:, 0] += 1
    with gates_closed(model):
        change = (solve(model, text=other, steps=1) - solve(model, text=text, steps=1)).abs().amax((0, 2, 3, 4))
    assert (change[:25] > 0).all()
    assert (change[25:] == 0).all()
    through_ttt = (solve(model, text=other, steps=1) - solve(model, text=text, steps=1)).abs().amax((0, 2, 3, 4))
    assert (through_ttt > 0).all(), "TTT carries it to the whole video"


# --- what is asked ---


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (10, r"--seconds 10: .* segments of 3 s; write 9 or 12"),
        (1.5, r"--seconds 1.5: .*; write 3$"),
        (0, r"--seconds 0: .*; write 3$"),
        (-3, r"--seconds -3: .*; write 3$"),
        (math.nan, r"--seconds nan: .*; write 3$"),
        (math.inf, r"--seconds inf: .*; write 3$"),
    ],
)
def test_seconds_are_whole_segments(seconds: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_sample(seconds=seconds, out=Path("clip.mp4"))


def test_a_plan_says_how_many_prompts_and_which_files() -> None:
    plan = plan_sample(seconds=63, out=Path("a/clip.mp4"))
    assert plan.prompts == 21
    assert plan.files == (Path("a/clip.mp4"), Path("a/clip.png"))
    with pytest.raises(UsageError, match=r"--out a/clip\.gif: .* write a/clip\.mp4"):
        plan_sample(seconds=3, out=Path("a/clip.gif"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("a", "b")}, r"9 s are 3 segments of 3 s, each with a prompt of its own, but 2 were given"),
        ({"seconds": 3.0}, r"3 s are 1 segment of 3 s, .* but 3 were given"),
        ({"prompts": ("a", " \n", "c")}, r"the prompt of segment 1 is empty"),
        ({"negative_prompts": ("blur",)}, r"but 1 negative prompts were given; give one for each, or none"),
        ({"steps": 0}, r"--steps 0: write from 1 to 1000"),
        ({"steps": 1001}, r"--steps 1001: write from 1 to 1000"),
        ({"guidance_scale": 0.5}, r"--guidance-scale 0\.5: write 1 for none"),
        ({"guidance_scale": math.nan}, r"--guidance-scale nan: write 1 for none"),
    ],
)
def test_a_request_that_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_request(request(Path("clip.mp4"), **changes))


# --- files ---


def picture(frames: int, height: int = 64, width: int = 96) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A square that wanders over a gradient."""
    video = np.zeros((frames, height, width, 3), dtype=np.uint8)
    video[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    video[..., 1] = np.linspace(255, 0, height, dtype=np.uint8)[:, None]
    for index in range(frames):
        left = index * (width - 16) // max(1, frames - 1)
        video[index, 20:36, left : left + 16] = (250, 250, 20)
    return video


def read_video(path: Path) -> tuple[np.ndarray[Any, Any], float, dict[str, str], str]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.codec_context.pix_fmt == "yuv420p"
        return frames, float(stream.average_rate), dict(container.metadata), stream.codec_context.name


def test_a_video_is_read_back_as_it_was(tmp_path: Path) -> None:
    video = picture(49)
    write_video(tmp_path / "new" / "clip.mp4", video, comment='{"seed": 1}')
    frames, rate, metadata, codec = read_video(tmp_path / "new" / "clip.mp4")
    assert (frames.shape, rate, codec) == (video.shape, 16.0, "h264")
    assert np.abs(frames.astype(int) - video).mean() < 4
    assert metadata["comment"] == '{"seed": 1}'
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EnvironmentProblem, match=r"file/clip\.mp4: cannot be written"):
        write_video(tmp_path / "file" / "clip.mp4", picture(5))
    kept = tmp_path / "clip.mp4"
    write_video(kept, picture(5))
    before = kept.read_bytes()
    with pytest.raises(EnvironmentProblem, match=r"clip\.mp4: cannot be written"):
        write_video(kept, picture(5)[:, :63])  # 4:2:0 has no odd heights
    assert kept.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["clip.mp4", "file"]


def test_a_contact_sheet_shows_the_frames_of_each_segment(tmp_path: Path) -> None:
    """Each segment in a colour of its own; the sheet has them in order, at the segments' places."""
    colours = [(200, 30, 30), (30, 160, 30), (30, 30, 220)]
    video = np.zeros((145, 32, 32, 3), dtype=np.uint8)
    for index in range(145):
        video[index] = colours[min(index // 48, 2)]
    write_contact_sheet(tmp_path / "clip.png", video, ["red $1 & <b>", "green " * 80, "blue"], title="clip.mp4")
    sheet = (matplotlib.image.imread(tmp_path / "clip.png")[..., :3] * 255).round().astype(int)
    rows = [np.flatnonzero((np.abs(sheet - colour).sum(-1) < 6).sum(1) > 100) for colour in colours]
    assert all(len(row) > 20 for row in rows)
    assert rows[0].max() < rows[1].min() < rows[1].max() < rows[2].min()


def test_pixels_are_rounded_and_clipped() -> None:
    values = torch.tensor([-1.5, -1.0, -0.001, 0.0, 1.0, 7.0]).repeat(3, 1).view(1, 3, 1, 6)
    assert to_pixels(values)[0, 0, :, 1].tolist() == [0, 0, 127, 128, 255, 255]
