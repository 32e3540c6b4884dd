"""Diffusion as CogVideoX is trained: the noise of each timestep, and the loss of a v-prediction.

With ᾱ the share of signal that a timestep t leaves, ε ~ N(0, 1) and latents x₀:

    x_t = √ᾱ·x₀ + √(1−ᾱ)·ε        v = √ᾱ·ε − √(1−ᾱ)·x₀        x₀ = √ᾱ·x_t − √(1−ᾱ)·v

Sources: Salimans & Ho, arXiv 2202.00512, appendix D, for v; Lin et al., arXiv 2305.08891, for a last timestep that
leaves no signal at all (ᾱ = 0 at t = 999).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import ttt_videodit.diffusers_alone  # noqa: F401

import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor, nn

from ttt.errors import EnvironmentProblem
from ttt.plugins import LossOutput, SegmentLosses
from ttt.plugins.rows import StepRows, rows_of_step
from ttt.words import first_line
from ttt_videodit.geometry import PATCH_SIZE
from ttt_videodit.options import DEFAULT_PRETRAINED, VideoDiTOptions

SCHEDULER = "scheduler"
"""The folder with the noise schedule of a model in diffusers' layout."""

COGVIDEOX_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
"""CogVideoX 5B's schedule; TTT-Video uses the same."""


@lru_cache(maxsize=4)
def make_scheduler(pretrained: str | None = None, revision: str | None = None) -> CogVideoXDPMScheduler:
    """The noise schedule, in the scheduler that TTT-Video samples with: DPM-Solver++ (2M) as an SDE.

    Timesteps are always spaced backwards from the last one ("trailing"), even if the folder says otherwise, so that
    sampling starts from pure noise.

    Args:
        pretrained: a local folder in diffusers' layout or a repository on the hub, whose `scheduler/` is read. None, or
            a folder without one, gives CogVideoX 5B's schedule.
        revision: the repository's revision; None is its newest.

    Raises:
        EnvironmentProblem: the folder's scheduler cannot be read, or is for another kind of prediction.
    """
    if pretrained is None or (Path(pretrained).is_dir() and not (Path(pretrained) / SCHEDULER).is_dir()):
        return CogVideoXDPMScheduler.from_config({**COGVIDEOX_SCHEDULE}, timestep_spacing="trailing")
    try:
        settings = CogVideoXDPMScheduler.load_config(pretrained, subfolder=SCHEDULER, revision=revision)
        scheduler = CogVideoXDPMScheduler.from_config(settings, timestep_spacing="trailing")
    except Exception as error:  # the hub's client raises errors of many libraries
        raise EnvironmentProblem(
            f"backbone.pretrained: {pretrained}: its {SCHEDULER}/scheduler_config.json cannot be read: "
            f"{first_line(error)}"
        ) from error
    if scheduler.config.prediction_type != "v_prediction":
        raise EnvironmentProblem(
            f"backbone.pretrained: {pretrained}: its {SCHEDULER}/scheduler_config.json has prediction_type: "
            f"{scheduler.config.prediction_type}, but CogVideoX predicts v; name a model whose scheduler says "
            f"v_prediction"
        )
    return scheduler


def schedule_of(options: VideoDiTOptions) -> CogVideoXDPMScheduler:
    """The noise schedule of the model that the options name; see `make_scheduler`."""
    if options.preset == "demo" or options.random_weights:
        return make_scheduler()
    return make_scheduler(options.pretrained or DEFAULT_PRETRAINED, options.revision)


def draw_timesteps(step: StepRows, count: int) -> Tensor:
    """The timesteps of a pass's rows, `[step.count]` on the CPU, each uniform over `0 … count-1`.

    The range is cut into `step.total` equal parts, and the rows of a whole step, over all its passes, have one timestep
    in each. So a step sees every amount of noise, and its mean loss varies less than with independent draws, for any
    number of passes. TTT-Video does the same over its processes (`DiscreteSampler`). Which row gets which part is also
    random, so that no window is always read with little noise.
    """
    generator = torch.Generator().manual_seed(step.seed)
    parts = torch.randperm(step.total, generator=generator)
    inside = torch.rand(step.total, dtype=torch.float64, generator=generator)
    drawn = (parts + inside)[step.slice] * count / step.total
    return drawn.long().clamp_(max=count - 1)  # the last part may round up to `count`


def training_loss(model: nn.Module, batch: Mapping[str, Tensor], options: VideoDiTOptions) -> LossOutput:
    """The mean squared error of the x₀ that the model predicts, weighted with 1/(1−ᾱ).

    This equals the mean squared error of v, since `x̂₀ − x₀ = −√(1−ᾱ)·(v̂ − v)`, and is computed as that, so that with
    little noise no small difference is divided by a small number. Latents are drawn again for every pass,
    `x₀ = mean + std·ε′`. In training mode, a share `options.text_dropout` of the rows has its text replaced by zeros.
    All that is drawn for a row is the same in however many passes and processes its step is read.

    Args:
        model: predicts v `[B,Fr,C,h,w]` from noisy latents, text embeddings `[B,S,L,E]` and timesteps `[B]`.
        batch: `mean` and `std` `[B,Fr,C,h,w]` of the latents, `text` `[B,S,L,E]`.
        options: of the backbone.

    Returns:
        The loss in float32 (float64 for a float64 model). Metrics: `x0_error`, the same error without the weight, in
        the latents' units, whose variance is about 1; and `mean_timestep`, since the loss is far larger if there is
        little noise.
    """
    schedule = schedule_of(options)
    precision = torch.promote_types(batch["mean"].dtype, torch.float32)
    mean, std, text = batch["mean"].to(precision), batch["std"].to(precision), batch["text"]
    rows, frames, _, height, width = mean.shape
    step = rows_of_step(rows)
    timesteps = draw_timesteps(step, len(schedule)).to(mean.device, non_blocking=True)
    draws = step.draws(mean.device)
    latents = mean + std * draws.normal(mean.shape[1:], dtype=precision)
    noise = draws.normal(mean.shape[1:], dtype=precision)
    if model.training and options.text_dropout:
        dropped = draws.uniform().to(text.device) < options.text_dropout
        text = text.masked_fill(dropped[:, None, None, None], 0.0)
    errors = _errors_of_v(model, latents, noise, text, timesteps, schedule).flatten(1).mean(dim=1)
    noise_share = 1 - schedule.alphas_cumprod.to(errors.device)[timesteps]
    with torch.no_grad():
        metrics = {"x0_error": (noise_share * errors).mean(), "mean_timestep": timesteps.double().mean()}
    video_tokens = frames * (height // PATCH_SIZE) * (width // PATCH_SIZE)
    tokens = rows * (text.shape[1] * text.shape[2] + video_tokens)
    return LossOutput(errors.mean(), tokens=tokens, metrics=metrics)


def _errors_of_v(
    model: nn.Module, latents: Tensor, noise: Tensor, text: Tensor, timesteps: Tensor, schedule: CogVideoXDPMScheduler
) -> Tensor:
    """The squared error of v, `[B,Fr,C,h,w]`."""
    prediction = predict_v(model, schedule.add_noise(latents, noise, timesteps), text, timesteps)
    return (prediction - schedule.get_velocity(latents, noise, timesteps)).square()


@torch.no_grad()
def losses_by_segment(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    options: VideoDiTOptions,
    *,
    timesteps: Tensor,
    seeds: Sequence[int],
) -> SegmentLosses:
    """The loss of `training_loss` at given timesteps, for each segment, with its text and noise by given seeds.

    A segment has the frames that it adds to the video, so that each frame counts once: the first segment those that it
    shares with the next one, too. Noise comes from a generator on the CPU for each window, in float32.

    Args:
        model: predicts v; see `predict_v`.
        batch: as for `training_loss`, B windows.
        options: of the backbone.
        timesteps: `[B,N]`.
        seeds: of each window's draws.
    """
    schedule = schedule_of(options)
    precision = torch.promote_types(batch["mean"].dtype, torch.float32)
    mean, std = batch["mean"].to(precision), batch["std"].to(precision)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def drawn() -> Tensor:
        draws = [torch.randn(mean.shape[1:], generator=generator) for generator in generators]
        return torch.stack(draws).to(mean)

    sizes = options.segments.frames_added(options.segments.count(mean.shape[1]))
    found = []
    for times in timesteps.to(mean.device).unbind(dim=1):
        latents = mean + std * drawn()
        errors = _errors_of_v(model, latents, drawn(), batch["text"], times, schedule).flatten(2).mean(dim=2)
        found.append(torch.stack([part.mean(dim=1) for part in errors.split(sizes, dim=1)], dim=1))
    return SegmentLosses(torch.stack(found, dim=1), tuple(size / mean.shape[1] for size in sizes))


def predict_v(model: nn.Module, noisy: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
    """The model's prediction of v for noisy latents `[B,Fr,C,h,w]`, in float32 (float64 for a float64 model).

    The model computes in the dtype of its first layer; noise, targets and sampling stay in the latents' dtype.
    """
    dtype = model.get_parameter("patch_embed.proj.weight").dtype
    prediction = model(
        hidden_states=noisy.to(dtype), encoder_hidden_states=text.to(dtype), timestep=timesteps, return_dict=False
    )[0]
    return cast(Tensor, prediction).to(torch.promote_types(dtype, torch.float32))


def x0_of(noisy: Tensor, prediction: Tensor, timesteps: Tensor, schedule: CogVideoXDPMScheduler) -> Tensor:
    """The clean latents that a v-prediction implies: `x₀ = √ᾱ·x_t − √(1−ᾱ)·v`.

    Args:
        noisy: x_t, `[B,Fr,C,h,w]`.
        prediction: v, of the same shape.
        timesteps: t, `[B]`.
        schedule: of the noise.
    """
    signal = schedule.alphas_cumprod.to(noisy.device)[timesteps].to(noisy.dtype)[:, None, None, None, None]
    return signal.sqrt() * noisy - (1 - signal).sqrt() * prediction
