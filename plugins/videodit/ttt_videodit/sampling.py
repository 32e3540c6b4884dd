"""Videos from prompts: DPM-Solver++ with classifier-free guidance, one prompt for each segment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import ttt_videodit.diffusers_alone  # noqa: F401

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler
from rich.console import Console
from torch import Tensor, nn

from ttt import __version__
from ttt.errors import NonFiniteError
from ttt.printable import say
from ttt.progress import Steps
from ttt_videodit.codec import DemoCodec
from ttt_videodit.diffusion import predict_v
from ttt_videodit.encoders import load_text_encoder, load_vae
from ttt_videodit.geometry import LATENT_CHANNELS, SPATIAL_COMPRESSION, segments_in
from ttt_videodit.options import VideoDiTData, VideoDiTOptions, VideoDiTRun, pixels, text_length
from ttt_videodit.request import contact_sheet_of
from ttt_videodit.scenes import NO_SCENES, with_scene_tokens
from ttt_videodit.schedules import sampler_of, sampling_schedule, trained_on_zeros
from ttt_videodit.video import Frames, write_contact_sheet, write_video

if TYPE_CHECKING:
    from ttt.plugins import SampleRequest

_MOST_TEXT_BYTES = 4 << 30
"""The most bytes of embeddings that are kept on the CPU at a time: about a thousand texts of T5."""
_MOST_TOLD = 5
NEGATIVE_PROMPTS, ZEROS, EMPTY_TEXTS = "the negative prompts", "zeros in place of text", "empty texts"
"""What guidance can lead away from."""


def sample(model: nn.Module, request: SampleRequest, config: VideoDiTRun, *, console: Console) -> list[Path]:
    """Make a video from a prompt for each 3 s, and a contact sheet beside it; see `prepare_samples`."""
    return prepare_samples(model, [request], config, console=console)(request)


def prepare_samples(
    model: nn.Module, requests: Sequence[SampleRequest], config: VideoDiTRun, *, console: Console
) -> Callable[[SampleRequest], list[Path]]:
    """What makes one video after another, each from a prompt for every 3 s, and a contact sheet beside it.

    Guidance leads away from the embedding of the negative prompts. If there are none, it leads away from zeros, which
    the run trained with in place of dropped text. For a run without `text_dropout`, and for weights imported from
    TTT-Video, it leads away from the embedding of empty texts, as TTT-Video does.

    The VAE is loaded once. T5, which is larger than the transformer, reads the texts of all videos and is freed before
    the first step. It is loaded again for later videos only if the embeddings of all take more than some GB.

    Args:
        model: the adapted `VideoDiT`.
        requests: what will be asked for in that order, as `ttt_videodit.request.check_request` lets it pass.
        config: of the run.
        console: where to report.

    Returns:
        What makes a video of each request and returns the files, the video and its contact sheet. It raises
        EnvironmentProblem if the disk is full, and NonFiniteError if the model's predictions are not finite.

    Raises:
        EnvironmentProblem: the VAE's or T5's weights are missing.
    """
    return _Sampler(model, requests, config, console)


class _Sampler:
    """Makes one video after another; the arguments are those of `prepare_samples`."""

    def __init__(
        self, model: nn.Module, requests: Sequence[SampleRequest], config: VideoDiTRun, console: Console
    ) -> None:
        options, data = config.backbone, config.data
        device = next(model.parameters()).device
        dtype = model.get_parameter("patch_embed.proj.weight").dtype
        self._model = model
        self._options = options
        self._console = console
        # If a part of a repository is missing, report it before the first step.
        self._decode = load_decoder(options, device=device, dtype=dtype)
        self._texts = _Texts(requests, options, data, console, device=device, dtype=dtype)
        self._texts.read()
        self._height, self._width = (side // SPATIAL_COMPRESSION for side in pixels(options, data))
        self._schedule, why = sampling_schedule(options, requests[0].imported_from)
        self._told = False
        guidance = _guidance_in_words(requests, options)
        say(console, f"samples by the schedule {self._schedule} ({why}), {guidance}")

    def __call__(self, request: SampleRequest) -> list[Path]:
        """The video's file, and its contact sheet."""
        latents = self._denoised(request)
        if not bool(latents.isfinite().all()):
            raise NonFiniteError(
                "sampling ended in numbers that are not finite; if training was sound, sample with "
                "--set train.param_dtype=float32"
            )
        files = _write(request, self._decode(latents), self._options)
        if self._options.preset == "demo" and not self._told:
            self._told = True
            say(self._console, DemoCodec.stand_in)
        return files

    def _denoised(self, request: SampleRequest) -> Tensor:
        """The video's latents, by the model in eval mode."""
        text, unconditional = self._texts.of(request)
        frames = self._options.segments.frames(segments_in(round(request.seconds)))
        training = self._model.training
        self._model.eval()
        try:
            with Steps(self._console, "sample", total=request.steps, tenths=True) as steps:
                return denoise(
                    self._model,
                    text,
                    unconditional,
                    shape=(1, frames, LATENT_CHANNELS, self._height, self._width),
                    schedule=sampler_of(self._options, self._schedule),
                    steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    seed=request.seed,
                    advance=steps.advance,
                )
        finally:
            self._model.train(training)


def _write(request: SampleRequest, video: Frames, options: VideoDiTOptions) -> list[Path]:
    schedule, _ = sampling_schedule(options, request.imported_from)
    asked = {**asdict(request), "out": request.out.name, "ttt_version": __version__, "sampling_schedule": schedule}
    asked["guidance_leads_away_from"] = _led_away_from(request, options)
    write_video(request.out, video, comment=json.dumps(asked, ensure_ascii=False))
    sheet = contact_sheet_of(request.out)
    write_contact_sheet(sheet, video, request.prompts, title=_title(request))
    return [request.out, sheet]


def _title(request: SampleRequest) -> str:
    guidance = f"guidance {request.guidance_scale:g}" if request.guidance_scale > 1 else "no guidance"
    return f"{request.out.name}: {request.seconds:g} s, {request.steps} steps, {guidance}, seed {request.seed}"


def _guidance_in_words(requests: Sequence[SampleRequest], options: VideoDiTOptions) -> str:
    away = {_led_away_from(request, options) for request in requests}
    told = " or, without any, ".join(each for each in (NEGATIVE_PROMPTS, ZEROS, EMPTY_TEXTS) if each in away)
    return f"guided away from {told}" if told else "without guidance"


def _led_away_from(request: SampleRequest, options: VideoDiTOptions) -> str | None:
    """What guidance leads away from; None if there is none."""
    if request.guidance_scale <= 1:
        return None
    if request.negative_prompts:
        return NEGATIVE_PROMPTS
    return ZEROS if trained_on_zeros(options, request.imported_from) else EMPTY_TEXTS


def guidance_weight(scale: float, *, timestep: int, steps: int) -> float:
    """How far a step is led from the unconditional towards the conditional prediction (CogVideoX's dynamic guidance).

        w = 1 + scale·(1 − cos(π·((steps − t)/steps)⁵))/2,   between 1 and 1 + scale

    It was meant to rise over the steps, but both published samplers use the timestep t (999 … 0) instead of the step's
    number. So w jumps between its bounds, and approaches 1 only when t is less than `steps`.
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
        unconditional: `[B,S,L,E]` to lead away from; None means no guidance.
        shape: of the latents, `B, Fr, C, h, w`.
        schedule: of the noise, of the class whose steps are taken; see `ttt_videodit.schedules`.
        steps: of the solver.
        guidance_scale: see `guidance_weight`; 1 means no guidance.
        seed: of the noise.
        advance: called after each step.

    Returns:
        Latents, float32: the last step's x₀. With a number of steps that divides the timesteps it is where diffusers'
        solver ends; with others it would leave a little noise. TTT-Video's always ends there.
    """
    device = text.device
    solver = cast(CogVideoXDPMScheduler, type(schedule).from_config(schedule.config))
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


class _Texts:
    """The embeddings of the videos' prompts, and of the texts that guidance leads away from.

    Args:
        requests: the videos, in the order in which they will be made.
    """

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        options: VideoDiTOptions,
        data: VideoDiTData,
        console: Console,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._left = list(requests)
        self._several = len(requests) > 1
        self._options = options
        self._length = text_length(options, data)
        self._console = console
        self._device = device
        self._dtype = dtype
        self._read: dict[str, Tensor] = {}
        self._scenes = False

    def of(self, request: SampleRequest) -> tuple[Tensor, Tensor | None]:
        """Embeddings `[1,S,L,E]` of the next video's prompts and of what to lead away from, None without guidance."""
        if not self._read.keys() >= {text for _, text in self._texts(request)}:
            self.read()
        self._left.pop(0)
        return _embeddings(request, self._prompts(request), self._options, self._embed)

    def read(self) -> None:
        """Have T5 read the texts of the videos that are left, or of as many as there is room for.

        Raises:
            EnvironmentProblem: its weights are missing.
        """
        self._read = {}
        encode = load_text_encoder(self._options, text_length=self._length, device=self._device, dtype=self._dtype)
        self._scenes = encode.knows_scenes
        if not self._scenes and any(any(request.new_scenes) for request in self._left):
            say(self._console, f"requires_scene_transition: {NO_SCENES}; transitions are left to the texts")
        size, cut = 0, []
        for request in self._left:
            for place, text in self._texts(request):
                if text not in self._read:
                    self._read[text] = encode([text])[0].cpu()
                    size += self._read[text].nbytes
                    tokens = encode.count(text)
                    if tokens > self._length:
                        cut.append(f"{place} has {tokens} tokens; the first {self._length} are read")
            if size > _MOST_TEXT_BYTES:
                break
        for line in cut[:_MOST_TOLD]:
            say(self._console, line)
        if len(cut) > _MOST_TOLD:
            say(self._console, f"{len(cut) - _MOST_TOLD} more texts have more than {self._length} tokens")

    def _prompts(self, request: SampleRequest) -> tuple[str, ...]:
        return with_scene_tokens(request.prompts, request.new_scenes if self._scenes else ())

    def _texts(self, request: SampleRequest) -> list[tuple[str, str]]:
        """Every text that is read for a video, with its place in the user's words."""
        of_it = f" of {request.out.name}" if self._several else ""
        found = [(f"prompt {number}{of_it}", text) for number, text in enumerate(self._prompts(request), start=1)]
        away = _negative_texts(request, self._options)
        return found + [(f"negative prompt {number}{of_it}", text) for number, text in enumerate(away, start=1)]

    def _embed(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._read[text] for text in texts])[None].to(self._device)


def _embeddings(
    request: SampleRequest,
    prompts: Sequence[str],
    options: VideoDiTOptions,
    embed: Callable[[Sequence[str]], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Text embeddings `[1,S,L,E]` of the prompts and of what to lead away from, None without guidance."""
    text = embed(prompts)
    away = _led_away_from(request, options)
    if away is None:
        return text, None
    return text, torch.zeros_like(text) if away == ZEROS else embed(_negative_texts(request, options))


def _negative_texts(request: SampleRequest, options: VideoDiTOptions) -> tuple[str, ...]:
    """The texts that guidance leads away from, one for each segment; empty without guidance, or if it uses zeros."""
    if _led_away_from(request, options) in (None, ZEROS):
        return ()
    return request.negative_prompts or ("",) * len(request.prompts)


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
    """Decode a video by CogVideoX's VAE, piece by piece, so that only one piece is in memory.

    The VAE's convolutions are causal in time and get what they need of the previous piece, and the pieces are the same
    as in diffusers: so the frames equal those of `AutoencoderKLCogVideoX.decode` on the whole video bit for bit.

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
