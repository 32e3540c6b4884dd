"""TTT-Video's sampler and its loss, written once more from their equations, against what this project computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ttt.config.schema import TrainConfig
from ttt.plugins.rows import reading_rows
from ttt.train.passes import training_rows
from ttt_videodit.building import build
from ttt_videodit.diffusion import make_scheduler, training_loss
from ttt_videodit.options import DIFFUSERS, TTT_VIDEO, VideoDiTOptions
from ttt_videodit.sampling import denoise
from ttt_videodit.schedules import sampler_of, sampling_schedule, trained_on_zeros

OPTIONS = VideoDiTOptions(preset="demo", dim=32, num_heads=2, num_layers=1, attn_length=2)
SHAPE = (1, OPTIONS.segments.frames(2), 16, 4, 4)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny transformer whose outputs depend on its text, about as large as what it is to predict."""
    made = build(OPTIONS, device="cpu", dtype=torch.float32)
    torch.manual_seed(2)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    return made


def texts() -> tuple[Tensor, Tensor]:
    text, away = torch.randn(2, 1, 2, 3, 32, generator=torch.Generator().manual_seed(4))
    return text, away


# --- the published equations ---


def shares(dtype: torch.dtype, at: Any = slice(None)) -> Tensor:
    """√ᾱ of the timesteps given, the last of them moved to 0 and the first kept, as the table of those alone."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    root = torch.tensor(np.cumprod(1 - betas)[at], dtype=dtype).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return (root - last) * (first / (first - last))


def published_sampler(
    network: Callable[[Tensor, Tensor, int], Tensor],
    text: Tensor,
    away: Tensor,
    *,
    steps: int,
    scale: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """DPM-Solver++ (2M) as an SDE over `steps` timesteps, with their own table and dynamic guidance.

    With s = √ᾱ now, u = √ᾱ next, λ = log(s/√(1−s²)) and h = λ(u) − λ(s):

        x ← √((1−u²)/(1−s²))·e⁻ʰ·x + u·(1−e⁻²ʰ)·D + √(1−u²)·√(1−e⁻²ʰ)·ε

    where D is the clean latents, extrapolated from the step before but in the first; the last step's are the answer.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(SHAPE, generator=generator).to(dtype)

    def rate(share: Tensor) -> Tensor:
        return (share / (1 - share**2).sqrt()).log()

    chosen = np.linspace(999, 0, steps, endpoint=False).astype(int)
    whole, own = shares(dtype), shares(dtype, chosen[::-1].copy()).flip(0)
    x, before = noise(), None
    for step, time in enumerate(chosen.tolist()):
        nearest = whole[(whole - own[step]).abs().argmin()]

        def clean(told: Tensor) -> Tensor:
            return nearest * x - (1 - nearest**2).sqrt() * network(x, told, time)  # noqa: B023

        weight = 1 + scale * (1 - math.cos(math.pi * ((steps - time) / steps) ** 5)) / 2
        unguided = clean(away)
        found = unguided + weight * (clean(text) - unguided)
        if step == steps - 1:
            return found
        now, following = own[step], own[step + 1]
        h = rate(following) - rate(now)
        toward = found
        noises = [noise()]
        if before is not None:
            r = (rate(now) - rate(own[step - 1])) / h
            toward = found + (found - before) / (2 * r)
            noises.append(noise())  # drawn twice there, and the first is for a step that is thrown away
        x = (
            ((1 - following**2) / (1 - now**2)).sqrt() * (-h).exp() * x
            + following * (1 - (-2 * h).exp()) * toward
            + (1 - following**2).sqrt() * (1 - (-2 * h).exp()).sqrt() * noises[-1]
        )
        before = found
    raise AssertionError("there is a step")


def of_model(model: nn.Module) -> Callable[[Tensor, Tensor, int], Tensor]:
    def network(x: Tensor, text: Tensor, time: int) -> Tensor:
        with torch.no_grad():
            answer: Tensor = model(
                hidden_states=x, encoder_hidden_states=text, timestep=torch.tensor([time]), return_dict=False
            )[0]
        return answer

    return network


def ours(model: nn.Module, schedule: str, steps: int, *, scale: float = 6.0) -> Tensor:
    text, away = texts()
    solver = sampler_of(OPTIONS, schedule)
    return denoise(model, text, away, shape=SHAPE, schedule=solver, steps=steps, guidance_scale=scale, seed=7)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- the sampler ---


@pytest.mark.parametrize(("steps", "diffusers"), [(10, 9.7e-3), (20, 5.7e-3), (37, 7.6e-3), (50, 3.3e-3)])
def test_the_published_sampler(model: nn.Module, steps: int, diffusers: float) -> None:
    """Differences are relative, of the latents' norm; how far diffusers' own schedule is stands in docs/videodit.md."""
    text, away = texts()
    expected = published_sampler(of_model(model), text, away, steps=steps, scale=6.0, seed=7)
    found = ours(model, TTT_VIDEO, steps)
    assert found.std() > 0.1
    assert apart(found, expected) < 1e-5
    assert apart(ours(model, DIFFUSERS, steps), expected) == pytest.approx(diffusers, rel=0.1)


def test_one_step_starts_without_signal(model: nn.Module) -> None:
    """Where the published code has 0/0; its only timestep is the one without signal, as diffusers' is."""
    found = ours(model, TTT_VIDEO, 1)
    assert found.isfinite().all()
    torch.testing.assert_close(found, ours(model, DIFFUSERS, 1))


def test_all_timesteps_are_the_table_of_training() -> None:
    solver = sampler_of(OPTIONS, TTT_VIDEO)
    solver.set_timesteps(1000)
    assert solver.timesteps.tolist() == list(range(999, -1, -1))
    torch.testing.assert_close(solver.solver.alphas_cumprod, make_scheduler().alphas_cumprod, rtol=1e-12, atol=1e-15)
    assert torch.equal(solver.signal, make_scheduler().alphas_cumprod)


def test_steps_of_the_published_schedule() -> None:
    for steps in (1, 3, 37, 50, 999):
        solver = sampler_of(OPTIONS, TTT_VIDEO)
        solver.set_timesteps(steps)
        times = solver.timesteps.tolist()
        assert times == np.linspace(999, 0, steps, endpoint=False).astype(int).tolist()
        assert times[0] == 999
        assert len(set(times)) == steps
        assert solver.solver.alphas_cumprod[-1] == 0


# --- which of them ---


def test_who_is_sampled_how() -> None:
    imported, plain = "TTT-Video", None
    assert sampling_schedule(OPTIONS, plain)[0] == DIFFUSERS
    assert sampling_schedule(OPTIONS, imported) == (TTT_VIDEO, "the adapter was imported from TTT-Video")
    for name in (DIFFUSERS, TTT_VIDEO):
        options = VideoDiTOptions(sampling_schedule=name)
        assert {sampling_schedule(options, source)[0] for source in (plain, imported, "another")} == {name}
    assert sampling_schedule(OPTIONS, "another")[0] == DIFFUSERS
    assert trained_on_zeros(OPTIONS, plain)
    assert not trained_on_zeros(OPTIONS, imported), "the config's 0.1 is of training that never was"
    assert not trained_on_zeros(VideoDiTOptions(text_dropout=0.0), plain)


# --- the loss ---


def test_the_published_loss(model: nn.Module) -> None:
    """1/(1−ᾱ)·(x̂₀ − x₀)² in float32, over a step of 64 rows, whose timesteps are every 64th part's."""
    rows, dropped = 64, OPTIONS.model_copy(update={"text_dropout": 0.0})
    generator = torch.Generator().manual_seed(5)
    video = torch.randn(rows, *SHAPE[1:], generator=generator)
    text = torch.randn(rows, 2, 3, 32, generator=generator)
    batch = {"mean": video, "std": torch.zeros_like(video), "text": text}
    asked: list[Tensor] = []
    watching = model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["timestep"]), with_kwargs=True
    )
    step = training_rows(TrainConfig(batch_size=rows), 0)
    with torch.no_grad(), reading_rows(step):
        found = training_loss(model.train(), batch, dropped).loss
    watching.remove()
    generators = [torch.Generator().manual_seed(seed) for seed in step.seeds]
    for each in generators:
        torch.randn(video.shape[1:], generator=each)  # of the latents' distribution, which has no width here
    noise = torch.stack([torch.randn(video.shape[1:], generator=each) for each in generators])
    (times,) = asked
    # TTT-Video's DiscreteSampler with 64 processes: eight of them in each eighth of the timesteps
    assert torch.bincount(times // 125).tolist() == [8] * 8
    share = shares(torch.float32)[times][:, None, None, None, None]
    noisy = share * video + (1 - share**2).sqrt() * noise
    with torch.no_grad():
        answer = model(hidden_states=noisy, encoder_hidden_states=text, timestep=times, return_dict=False)[0]
    clean = share * noisy - (1 - share**2).sqrt() * answer
    each = ((clean - video).square() / (1 - share**2)).flatten(1).mean(1)
    torch.testing.assert_close(found, each.mean(), rtol=1e-5, atol=0)
    model.eval()
