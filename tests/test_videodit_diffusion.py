from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from rich.console import Console
from torch import Tensor, nn

from ttt.check import load_config
from ttt.config.schema import TrainConfig
from ttt.errors import EnvironmentProblem
from ttt.plugins.rows import StepRows, reading_rows, rows_of_step
from ttt.train import train
from ttt.train.passes import training_rows
from ttt_videodit.building import build
from ttt_videodit.diffusion import draw_timesteps, make_scheduler, schedule_of, training_loss, x0_of
from ttt_videodit.options import VideoDiTOptions
from ttt_videodit.plugin import ttt_backbone

TINY = VideoDiTOptions(preset="demo", dim=32, num_heads=2, num_layers=1, attn_length=2)


class Recorder(nn.Module):
    """A linear "model" that keeps what it was asked: noise, text and time mixed by one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Linear(1, 1, dtype=torch.float64)
        self.asked: dict[str, Tensor] = {}

    def forward(self, **asked: Any) -> tuple[Tensor]:
        self.asked = asked
        weight = self.patch_embed.proj.weight.squeeze()
        told = asked["encoder_hidden_states"].mean((1, 2, 3)) + asked["timestep"] / 1000
        return (weight * asked["hidden_states"] + told[:, None, None, None, None],)


def batch_of(rows: int, *, seed: int = 0, segments: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype)

    frames = TINY.segments.frames(segments)
    return {"mean": normal(frames, 16, 6, 4), "std": normal(frames, 16, 6, 4).abs(), "text": normal(segments, 3, 32)}


def test_the_schedule_is_cogvideox_s() -> None:
    """Against the formulas: scaled linear betas, then √ᾱ shifted and scaled so that the last is 0, the first kept."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    root = np.cumprod(1 - betas) ** 0.5
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    schedule = make_scheduler()
    assert torch.allclose(schedule.alphas_cumprod, torch.from_numpy(root**2), rtol=1e-12, atol=1e-15)
    assert schedule.alphas_cumprod[-1] == 0
    schedule.set_timesteps(50)
    assert schedule.timesteps.tolist() == list(range(999, 0, -20))


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_loss_is_the_error_of_x0_by_its_weight(rows: int) -> None:
    model, batch = Recorder(), batch_of(rows)
    torch.manual_seed(5)
    output = training_loss(model.eval(), batch, TINY)
    # the same draws, and x0 by its definition
    torch.manual_seed(5)
    timesteps = draw_timesteps(rows_of_step(rows), 1000)
    x0 = batch["mean"] + batch["std"] * torch.randn_like(batch["mean"])
    noise = torch.randn_like(x0)
    alpha = make_scheduler().alphas_cumprod[timesteps][:, None, None, None, None]
    noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    assert torch.equal(model.asked["timestep"], timesteps)
    assert torch.allclose(model.asked["hidden_states"], noisy, rtol=1e-13)
    assert torch.equal(model.asked["encoder_hidden_states"], batch["text"])
    (prediction,) = model(hidden_states=noisy, encoder_hidden_states=batch["text"], timestep=timesteps)
    error = (alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction - x0).square()
    torch.testing.assert_close(output.loss, (error / (1 - alpha)).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(output.metrics["x0_error"], error.mean().detach(), rtol=1e-10, atol=0)
    assert output.metrics["mean_timestep"] == timesteps.double().mean()
    assert output.tokens == rows * (2 * 3 + 5 * 3 * 2)
    assert not output.metrics["x0_error"].requires_grad
    # and so is its gradient
    weight = model.patch_embed.proj.weight
    (of_loss,) = torch.autograd.grad(output.loss, weight)
    (by_definition,) = torch.autograd.grad((error / (1 - alpha)).mean(), weight)
    torch.testing.assert_close(of_loss, by_definition, rtol=1e-10, atol=0)


def test_v_gives_x0_back_at_every_timestep() -> None:
    schedule = make_scheduler()
    timesteps = torch.tensor([0, 1, 499, 998, 999])
    x0, noise = torch.randn(2, 5, 3, 16, 4, 2, dtype=torch.float64)
    noisy, v = schedule.add_noise(x0, noise, timesteps), schedule.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(x0_of(noisy, v, timesteps, schedule), x0, rtol=1e-12, atol=1e-12)


def test_latents_are_drawn_from_their_distribution() -> None:
    """`mean + std·ε` anew in each pass; no spread, no draw."""
    model, batch = Recorder(), batch_of(1)
    alpha = make_scheduler().alphas_cumprod

    def read(batch: dict[str, Tensor], seed: int) -> Tensor:
        torch.manual_seed(seed)
        training_loss(model, batch, TINY.model_copy(update={"text_dropout": 0.0}))
        return (model.asked["hidden_states"] / alpha[model.asked["timestep"]].sqrt()).detach()

    still = {**batch, "std": torch.zeros_like(batch["std"])}
    difference = read(batch, 1) - read(still, 1)
    # the two passes differ by std·ε alone
    torch.manual_seed(1)
    draw_timesteps(rows_of_step(1), 1000)
    torch.testing.assert_close(difference, batch["std"] * torch.randn_like(batch["mean"]), rtol=1e-9, atol=1e-9)


def test_timesteps_are_uniform_one_in_each_part() -> None:
    torch.manual_seed(0)
    drawn = torch.stack([draw_timesteps(rows_of_step(7), 1000) for _ in range(3000)])
    assert drawn.min() == 0
    assert drawn.max() == 999
    part = (drawn.sort(dim=1).values * 7) // 1000
    # at the edges of the parts a whole timestep may fall into the part before
    assert ((part - torch.arange(7)) <= 0).all()
    assert ((part - torch.arange(7)) >= -1).all()
    # each row alone is uniform: 10 bins of 300 draws expected, standard deviation 16
    for row in drawn.T:
        counts = torch.histc(row.float(), bins=10, min=0, max=1000)
        assert (counts - 300).abs().max() < 5 * 16.4


def timesteps_of_step(step: int, *, batch_size: int, passes: int) -> Tensor:
    """What the passes of a training step draw, `[passes, batch_size]`, as `ttt train` tells them their rows."""
    config = TrainConfig(batch_size=batch_size, num_microbatches=passes, seed=3)
    drawn = []
    for number in range(step * passes, (step + 1) * passes):
        with reading_rows(training_rows(config, number)):
            drawn.append(draw_timesteps(rows_of_step(batch_size), 1000))
    return torch.stack(drawn)


def test_a_step_varies_as_little_in_many_passes_as_in_one() -> None:
    """The mean timestep of 64 rows, each uniform in its own 64th: sqrt((1000/64)²/12/64) = 0.56, with 64 draws 36."""
    steps = 120
    for batch_size, passes in ((1, 64), (8, 8), (64, 1)):
        drawn = [timesteps_of_step(step, batch_size=batch_size, passes=passes) for step in range(steps)]
        spread = torch.stack(drawn).double().mean((1, 2)).std().item()
        assert spread == pytest.approx(0.564, rel=5 / (2 * steps) ** 0.5), (batch_size, passes)  # 5 standard errors
        # and which pass has how much noise is no habit: the first pass's mean over the steps is that of all
        first = torch.stack([step[0] for step in drawn]).double().mean().item()
        assert abs(first - 499.5) < 5 * 289 / (steps * batch_size) ** 0.5
    torch.manual_seed(0)
    alone = torch.stack([draw_timesteps(rows_of_step(1), 1000) for _ in range(64 * steps)]).double()
    spread = alone.view(steps, 64).mean(1).std().item()
    assert spread == pytest.approx(36, rel=5 / (2 * steps) ** 0.5), "each pass for itself, the figure would show"


@pytest.mark.parametrize(("batch_size", "passes"), [(1, 64), (8, 8), (64, 1), (3, 7)])
def test_the_passes_of_a_step_share_its_parts(batch_size: int, passes: int) -> None:
    rows = batch_size * passes
    for step in (0, 1, 17):
        drawn = timesteps_of_step(step, batch_size=batch_size, passes=passes)
        edges = torch.arange(rows + 1) * 1000 / rows
        in_order = drawn.flatten().sort().values
        assert (in_order >= edges[:-1].floor()).all()
        assert (in_order <= edges[1:]).all()
        # cut otherwise, the same rows of the step draw the same
        assert torch.equal(drawn.flatten(), timesteps_of_step(step, batch_size=rows, passes=1).flatten())
    assert not torch.equal(drawn, timesteps_of_step(18, batch_size=batch_size, passes=passes))


def test_a_batch_of_other_rows_than_the_pass_is_a_step_of_its_own() -> None:
    with reading_rows(StepRows(first=4, count=2, total=8, seed=5)):
        assert rows_of_step(2) == StepRows(4, 2, 8, 5)
        torch.manual_seed(1)
        other = rows_of_step(3)
        assert (other.first, other.count, other.total) == (0, 3, 3)
    torch.manual_seed(1)
    assert rows_of_step(3) == other, "what torch's generator says"
    assert rows_of_step(3) != other


def test_the_loop_spreads_a_step_over_its_passes_and_an_evaluation_over_its_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `ttt train`: what was drawn in each pass, in a whole run and in one that goes on after its first step."""
    drawn: list[Tensor] = []

    def recorded(step: StepRows, count: int) -> Tensor:
        drawn.append(draw_timesteps(step, count))
        return drawn[-1]

    monkeypatch.setattr("ttt_videodit.diffusion.draw_timesteps", recorded)
    monkeypatch.setattr("ttt.train.pictures.draw_run", lambda run: [])  # pictures take longer than all of it
    text = """
        backbone: {name: videodit, preset: demo, dim: 16, num_heads: 1, num_layers: 1}
        ttt: {mini_batch_size: 32}
        train: {batch_size: 1, num_microbatches: 4, max_steps: 1, ckpt_freq: 1, param_dtype: float32, device: cpu}
        eval: {max_batches: 4}
    """

    def trained(folder: str, steps: int, *, resume: bool = False) -> list[Tensor]:
        backbone = ttt_backbone()
        settings = [f"run_dir={tmp_path / folder}", f"train.max_steps={steps}"]
        loaded = load_config("test.yaml", text=text, overrides=settings, backbone=backbone)
        drawn.clear()
        train(loaded.config, backbone, resume=resume, console=Console(file=io.StringIO()))
        return list(drawn)

    whole = trained("whole", 2)
    for step in (whole[:4], whole[4:8]):
        assert sorted((torch.cat(step) * 4 // 1000).tolist()) == [0, 1, 2, 3], "each part once"
    evaluated, with_gates_closed = whole[8::2], whole[9::2]
    assert len(evaluated) > 1
    windows = torch.cat(evaluated).numel()
    edges = torch.arange(windows + 1) * 1000 / windows
    in_order = torch.cat(evaluated).sort().values
    assert ((in_order >= edges[:-1].floor()) & (in_order <= edges[1:])).all()
    assert torch.equal(torch.cat(evaluated), torch.cat(with_gates_closed))
    trained("resumed", 1)
    resumed = trained("resumed", 2, resume=True)
    assert torch.equal(torch.cat(resumed), torch.cat(whole[4:]))


def test_text_is_dropped_by_rows_and_only_in_training() -> None:
    model, batch = Recorder(), batch_of(64)
    options = TINY.model_copy(update={"text_dropout": 0.25})
    torch.manual_seed(3)
    training_loss(model.train(), batch, options)
    text = model.asked["encoder_hidden_states"]
    dropped = (text == 0).flatten(1).all(dim=1)
    assert torch.equal(text[~dropped], batch["text"][~dropped])
    assert 8 <= dropped.sum() <= 26  # 16 expected, standard deviation 3.5
    asked_in_training = model.asked["hidden_states"]
    torch.manual_seed(3)
    training_loss(model.eval(), batch, options)
    assert torch.equal(model.asked["encoder_hidden_states"], batch["text"])
    assert torch.equal(model.asked["hidden_states"], asked_in_training), "the noise is the same with and without"


def test_the_real_model_learns_from_it_in_bfloat16_and_float32() -> None:
    batch = batch_of(2, dtype=torch.float32)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build(TINY, device="cpu", dtype=dtype)
        torch.manual_seed(11)
        output = training_loss(model, batch, TINY)
        assert output.loss.dtype == torch.float32
        output.loss.backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == []
        losses.append(output.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# --- whose schedule it is ---


def write_scheduler(folder: Path, **settings: Any) -> Path:
    scheduler = CogVideoXDDIMScheduler.from_config(make_scheduler().config, **settings)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def test_a_pretrained_folder_s_schedule_is_taken(tmp_path: Path) -> None:
    write_scheduler(tmp_path, snr_shift_scale=3.0, timestep_spacing="linspace")
    options = VideoDiTOptions(preset="5b", pretrained=str(tmp_path))
    schedule = schedule_of(options)
    assert isinstance(schedule, CogVideoXDPMScheduler)
    assert schedule.config.snr_shift_scale == 3.0
    assert schedule.config.timestep_spacing == "trailing"
    assert not torch.equal(schedule.alphas_cumprod, make_scheduler().alphas_cumprod)


def test_a_folder_without_one_has_cogvideox_s(tmp_path: Path) -> None:
    options = VideoDiTOptions(preset="5b", pretrained=str(tmp_path))
    assert torch.equal(schedule_of(options).alphas_cumprod, make_scheduler().alphas_cumprod)
    assert schedule_of(VideoDiTOptions(preset="5b", random_weights=True)) is make_scheduler()


def test_a_schedule_for_another_prediction_is_refused(tmp_path: Path) -> None:
    write_scheduler(tmp_path, prediction_type="epsilon")
    with pytest.raises(EnvironmentProblem, match=r"prediction_type: epsilon, but CogVideoX predicts v"):
        make_scheduler(str(tmp_path))


def test_a_broken_schedule_is_named(tmp_path: Path) -> None:
    write_scheduler(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"prediction_type": "v_prediction"})[:-3])
    with pytest.raises(EnvironmentProblem, match=r"scheduler_config\.json cannot be read") as caught:
        make_scheduler(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
