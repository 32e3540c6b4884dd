"""A picture of what a run learned: a noised clip, and what the model made of it before and after training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from ttt.adapter_file import backbone_identity, load_adapter
from ttt.check import load_config
from ttt.errors import UsageError
from ttt.files import write_bytes
from ttt.train.setup import build
from ttt_videodit.diffusion import predict_v, schedule_of, x0_of
from ttt_videodit.geometry import FRAMES_PER_SECOND
from ttt_videodit.options import VideoDiTOptions
from ttt_videodit.sampling import load_decoder
from ttt_videodit.video import INK, Frames, draw_strip, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Split = Literal["train", "eval"]

_IN_WORDS = {"train": "what was trained on", "eval": "held out"}
_DRAWS = 16
"""Draws of noise that an error is the mean over; the picture shows the first."""


@dataclass(frozen=True)
class Denoised:
    """Latents that a model made of noised ones."""

    latents: Tensor
    """`[1,Fr,C,h,w]`."""
    error: float
    """Mean squared error of the latents, over draws of noise."""


@dataclass(frozen=True)
class Reconstruction:
    """A clip, noised, and denoised in one step by a model before and after its training."""

    split: Split
    timestep: int
    signal: float
    """√ᾱ: how much of a latent is left."""
    clip: Frames
    """Decoded from its own latents: the best that a model could reach."""
    noised: Frames
    untrained: Frames
    trained: Frames
    untrained_error: float
    """Mean squared error of the latents, whose variance is 1 or about."""
    trained_error: float


def reconstruct(run: Path, *, timestep: int = 600, window: int = 0) -> list[Reconstruction]:
    """Noise a window of each split of a run's data, and let the model denoise it in a single step.

    The estimate is the x₀ that the model's v-prediction implies: the mean of what the model holds possible, blurred
    if it is unsure. The untrained model is the run's own at its first step.

    Args:
        run: the run's folder.
        timestep: how much noise, 0 … 999.
        window: number of the window of each split.

    Raises:
        UsageError: the run is of another backbone, or the timestep or window does not exist.
        TTTError: the run, its data or its weights cannot be read.
    """
    loaded = load_config(run / "config.yaml")
    config, backbone = loaded.config, loaded.backbone
    options = config.backbone
    if not isinstance(options, VideoDiTOptions):
        raise UsageError(f"{run}: a run of {backbone.name}; name a run of videodit")
    schedule = schedule_of(options)
    if not 0 <= timestep < len(schedule):
        raise UsageError(f"timestep {timestep}: write from 0 to {len(schedule) - 1}")
    device = torch.device("cpu")
    splits: tuple[Split, ...] = ("train", "eval") if backbone.has_eval_data(config) else ("train",)
    datasets = [backbone.dataset(config, split=split, device=device) for split in splits]
    for split, dataset in zip(splits, datasets, strict=True):
        if not 0 <= window < len(dataset):
            raise UsageError(f"window {window}: the split {split} has {len(dataset)}, numbered from 0")
    batches = [cast("dict[str, Tensor]", dataset.collate([dataset[window]])) for dataset in datasets]
    model, injection = build(config, backbone, device)
    model.eval()
    untrained = [_denoise(model, batch, options, timestep) for batch in batches]
    load_adapter(run, model, injection=injection, backbone=backbone_identity(backbone, options))
    trained = [_denoise(model, batch, options, timestep) for batch in batches]
    decode = load_decoder(options, device=device, dtype=torch.float32)
    signal = float(schedule.alphas_cumprod[timestep]) ** 0.5
    return [
        Reconstruction(
            split=split,
            timestep=timestep,
            signal=signal,
            clip=decode(batch["mean"]),
            noised=decode(_noised(batch, options, timestep, draw=0)),
            untrained=decode(before.latents),
            trained=decode(after.latents),
            untrained_error=before.error,
            trained_error=after.error,
        )
        for split, batch, before, after in zip(splits, batches, untrained, trained, strict=True)
    ]


def _noised(batch: dict[str, Tensor], options: VideoDiTOptions, timestep: int, *, draw: int) -> Tensor:
    """The window's latents with a draw of noise, `[1,Fr,C,h,w]`."""
    mean = batch["mean"]
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(draw))
    return cast(Tensor, schedule_of(options).add_noise(mean, noise, torch.tensor([timestep])))


@torch.no_grad()
def _denoise(model: nn.Module, batch: dict[str, Tensor], options: VideoDiTOptions, timestep: int) -> Denoised:
    """The x₀ that the model sees in a noised window."""
    times = torch.tensor([timestep])
    estimates, errors = [], []
    for draw in range(_DRAWS):
        noisy = _noised(batch, options, timestep, draw=draw)
        estimate = x0_of(noisy, predict_v(model, noisy, batch["text"], times), times, schedule_of(options))
        estimates.append(estimate)
        errors.append(float((estimate - batch["mean"]).square().mean()))
    return Denoised(estimates[0], sum(errors) / len(errors))


def write_reconstruction(found: Sequence[Reconstruction], path: Path, *, columns: int = 4) -> None:
    """Write the picture: in each row some frames of the clips, noised, denoised before and after training.

    Args:
        found: one for each split.
        path: a `.png`.
        columns: frames of each clip.

    Raises:
        EnvironmentProblem: the place cannot be written.
    """
    content = io.BytesIO()
    _figure(found, columns).savefig(content, format="png")
    write_bytes(path, content.getvalue())


def _figure(found: Sequence[Reconstruction], columns: int) -> Figure:
    height, width = found[0].clip.shape[1:3]
    cell = 11.0 / (2 * columns)
    figure = new_figure(cell * columns * len(found) + 0.2, 4 * (cell * height / width + 0.3) + 0.75)
    figure.suptitle(
        f"Timestep {found[0].timestep} of 999, {found[0].signal:.0%} of the signal left, denoised in one step",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    panels = figure.subplots(4, len(found), squeeze=False)
    for column, clip in enumerate(found):
        rows = (
            (f"the clip ({_IN_WORDS[clip.split]}), as its latents show it", clip.clip),
            ("noised", clip.noised),
            (f"untrained model: error {clip.untrained_error:.3f}", clip.untrained),
            (f"trained model: error {clip.trained_error:.3f}", clip.trained),
        )
        chosen = np.linspace(0, len(clip.clip) - 1, columns).round().astype(int)
        for axes, (heading, frames) in zip(panels[:, column], rows, strict=True):
            draw_strip(axes, frames[chosen], heading)
        seconds = ", ".join(f"{frame / FRAMES_PER_SECOND:.1f}" for frame in chosen)
        panels[-1, column].set_xlabel(f"at {seconds} s", fontsize=8, loc="left", color=INK)
    return figure
