"""Videos from prompts: diffusers' DPM-Solver++ with classifier-free guidance, one prompt for each segment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import ttt_videodit.diffusers_alone  # noqa: F401

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ttt import __version__
from ttt.errors import NonFiniteError
from ttt.train.metrics import duration_in_words, say
from ttt_videodit.codec import DemoCodec
from ttt_videodit.diffusion import predict_v, schedule_of
from ttt_videodit.encoders import load_text_encoder, load_vae
from ttt_videodit.geometry import LATENT_CHANNELS, SPATIAL_COMPRESSION, segments_in
from ttt_videodit.plugin import VideoDiTData, VideoDiTOptions, pixels, text_length
from ttt_videodit.request import contact_sheet_of
from ttt_videodit.video import Frames, write_contact_sheet, write_video

if TYPE_CHECKING:
    from ttt.backbone import SampleRequest
    from ttt.config import RunConfig


def sample(model: nn.Module, request: SampleRequest, config: RunConfig, *, console: Console) -> list[Path]:
    """Make a video from a prompt for each 3 s, and a contact sheet beside it.

    What guidance leads away from is the embedding of the negative prompts. Where none is given, it is what the run
    trained with in place of dropped text, zeros; and for a run without `text_dropout` the embedding of empty texts.

    Args:
        model: the adapted `VideoDiT`.
        request: what is asked for, as `ttt_videodit.request.check_request` lets it pass.
        config: of the run.
        console: where to report.

    Returns:
        The video and its contact sheet.

    Raises:
        EnvironmentProblem: the VAE's or T5's weights are missing, or the disk is full.
        NonFiniteError: the model's predictions are no numbers.
    """
    options, data = cast(VideoDiTOptions, config.backbone), cast(VideoDiTData, config.data)
    device = next(model.parameters()).device
    dtype = model.get_parameter("patch_embed.proj.weight").dtype
    # A repository's missing part is missed before the first step. T5, larger than the transformer, is gone by then.
    decode = load_decoder(options, device=device, dtype=dtype)
    text, unconditional = _embeddings(request, options, data, console, device=device, dtype=dtype)
    height, width = (side // SPATIAL_COMPRESSION for side in pixels(options, data))
    frames = options.segments.frames(segments_in(round(request.seconds)))
    training = model.training
    model.eval()
    try:
        with _progress(console, "sample", request.steps) as advance:
            latents = denoise(
                model,
                text,
                unconditional,
                shape=(1, frames, LATENT_CHANNELS, height, width),
                schedule=schedule_of(options),
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                seed=request.seed,
                advance=advance,
            )
    finally:
        model.train(training)
    if not bool(latents.isfinite().all()):
        raise NonFiniteError(
            "sampling ended in numbers that are not finite; if training was sound, sample with "
            "--set train.param_dtype=float32"
        )
    video = decode(latents)
    asked = {**asdict(request), "out": request.out.name, "ttt_version": __version__}
    write_video(request.out, video, comment=json.dumps(asked, ensure_ascii=False))
    sheet = contact_sheet_of(request.out)
    write_contact_sheet(sheet, video, request.prompts, title=_title(request))
    if options.preset == "demo":
        say(console, DemoCodec.stand_in)
    return [request.out, sheet]


def _title(request: SampleRequest) -> str:
    guidance = f"guidance {request.guidance_scale:g}" if request.guidance_scale > 1 else "no guidance"
    return f"{request.out.name}: {request.seconds:g} s, {request.steps} steps, {guidance}, seed {request.seed}"


def guidance_weight(scale: float, *, timestep: int, steps: int) -> float:
    """How far a step is led from the unconditional towards the conditional prediction (CogVideoX's dynamic guidance).

        w = 1 + scale·(1 − cos(π·((steps − t)/steps)⁵))/2,   between 1 and 1 + scale

    It was meant to rise over the steps, but both published samplers put the timestep t (999 … 0) where the number of
    the step belongs. So w jumps about between its bounds, and settles, towards 1, only where t is less than `steps`.
    It is kept as it is because CogVideoX's and TTT-Video's videos are made with it.

    Sources: `use_dynamic_cfg` of diffusers' `pipeline_cogvideox.py`; `DynamicCFG` of TTT-Video's `cogvideo/utils.py`.
    """
    return 1 + scale * (1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5)) / 2


@torch.no_grad()
def denoise(
    model: nn.Module,
    text: Tensor,
    unconditional: Tensor | None,
    *,
    shape: tuple[int, int, int, int, int],
    schedule: CogVideoXDPMScheduler,
    steps: int,
    guidance_scale: float,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents from noise: DPM-Solver++ (2M) as an SDE, from the timestep without signal down.

    With guidance, `v = v_∅ + w·(v_text − v_∅)`; the two predictions are made one after the other, so that guidance
    takes time and no memory. Noise comes from a generator on the CPU, in float32: a seed means the same noise on
    every device and for every dtype of the model.

    Args:
        model: predicts v; see `ttt_videodit.diffusion.predict_v`.
        text: `[B,S,L,E]`.
        unconditional: `[B,S,L,E]` to lead away from; None is no guidance.
        shape: of the latents, `B, Fr, C, h, w`.
        schedule: of the noise.
        steps: of the solver.
        guidance_scale: see `guidance_weight`; 1 is no guidance.
        seed: of the noise.
        advance: called after each step.

    Returns:
        Latents, float32: the last step's x₀. With a number of steps that divides the timesteps it is where the solver
        ends; with others the solver would leave a little noise.
    """
    device = text.device
    solver = cast(CogVideoXDPMScheduler, CogVideoXDPMScheduler.from_config(schedule.config))
    solver.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(shape, generator=generator).to(device)
    clean: Tensor | None = None
    before: int | None = None
    for timestep in solver.timesteps.tolist():
        times = torch.full((shape[0],), timestep, device=device)
        prediction = predict_v(model, latents, text, times)
        if unconditional is not None and guidance_scale > 1:
            away = predict_v(model, latents, unconditional, times)
            weight = guidance_weight(guidance_scale, timestep=timestep, steps=steps)
            prediction = away + weight * (prediction - away)
        latents, clean = solver.step(
            prediction, clean, timestep, before, latents, generator=generator, return_dict=False
        )
        before = timestep
        advance()
    assert clean is not None
    return clean


# --- between texts, latents and pixels ---


def _embeddings(
    request: SampleRequest,
    options: VideoDiTOptions,
    data: VideoDiTData,
    console: Console,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Text embeddings `[1,S,L,E]` of the prompts and of what to lead away from, None without guidance."""
    encode = load_text_encoder(options, text_length=text_length(options, data), device=device, dtype=dtype)
    for number, prompt in enumerate(request.prompts, start=1):
        tokens = encode.count(prompt)
        if tokens > encode.text_length:
            say(console, f"prompt {number} has {tokens} tokens; the first {encode.text_length} are read")
    text = encode(request.prompts)[None].to(device)
    if request.guidance_scale <= 1:
        return text, None
    if options.text_dropout and not request.negative_prompts:
        return text, torch.zeros_like(text)
    return text, encode(request.negative_prompts or ("",) * len(request.prompts))[None].to(device)


def load_decoder(options: VideoDiTOptions, *, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Frames]:
    """What turns latents `[1,Fr,C,h,w]` into pixels: the VAE or the demo's codec, its weights loaded.

    Raises:
        EnvironmentProblem: they cannot be had.
    """
    if options.preset == "demo":
        codec = DemoCodec.load(device=device)
        return lambda latents: to_pixels(codec.decode(latents)[0])
    vae = load_vae(options, device=device, dtype=dtype)
    return lambda latents: np.concatenate([to_pixels(piece) for piece in decode_pieces(vae, latents)])


@torch.no_grad()
def decode_pieces(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Iterator[Tensor]:
    """A video by CogVideoX's VAE, piece by piece, with no more of it in memory than a piece.

    The VAE's convolutions are causal in time and are handed what they need of the piece before, and the pieces are
    those that diffusers cuts: so the frames are bit for bit those of `AutoencoderKLCogVideoX.decode` on the whole.

    Args:
        vae: in eval mode.
        latents: `[1,Fr,C,h,w]`, at the scale of the transformer.

    Yields:
        Frames `[n,3,H,W]` with values −1 … 1, or a little outside.
    """
    size = vae.num_latent_frames_batch_size
    scaled = (latents / vae.config.scaling_factor).to(vae.device, vae.dtype).transpose(1, 2)
    count = scaled.shape[2]
    ends = range(min(count, size + count % size), count + 1, size)
    cache, start = None, 0
    for end in ends:
        piece, start = scaled[:, :, start:end], end
        if vae.post_quant_conv is not None:
            piece = vae.post_quant_conv(piece)
        frames, cache = vae.decoder(piece, conv_cache=cache)
        yield frames[0].transpose(0, 1)


def to_pixels(frames: Tensor) -> Frames:
    """Frames `[F,3,H,W]` with values −1 … 1, rounded to 0 … 255, `[F,H,W,3]`; what lies outside is clipped."""
    levels = ((frames.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return cast(Frames, levels.permute(0, 2, 3, 1).cpu().numpy())


# --- progress ---


@contextmanager
def _progress(console: Console, name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, some plain lines elsewhere; what it yields is called after each step."""
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=total)
            yield lambda: bar.advance(task)
        return
    started, done = time.monotonic(), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done in (1, total) or done * 10 // total > (done - 1) * 10 // total:
            left = duration_in_words((time.monotonic() - started) / done * (total - done))
            say(console, f"{name}: step {done}/{total}, {left} left")

    yield advance
