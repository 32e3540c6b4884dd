"""Encoders of video and text for the transformer: CogVideoX's VAE and T5, or the demo's substitutes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import ttt_videodit.diffusers_alone  # noqa: F401

import torch
from torch import Tensor

from ttt.errors import EnvironmentProblem
from ttt.words import first_line
from ttt_videodit import demo
from ttt_videodit.codec import DemoCodec
from ttt_videodit.frames import Picture, to_tensor
from ttt_videodit.geometry import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from ttt_videodit.options import DEFAULT_PRETRAINED, VideoDiTOptions
from ttt_videodit.pretrained import TEXT_PARTS, VAE, source_of
from ttt_videodit.scenes import add_scene_tokens
from ttt_videodit.text import DemoTextEncoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX

PIECE: Final = 8
"""Frames that an encoder takes at a time; the first piece of a video also takes the remainder."""


@dataclass(frozen=True)
class Posterior:
    """An encoder's result: `x₀ ~ N(mean, std²)`, both `[Fr,C,h,w]`, at the scale of the transformer."""

    mean: Tensor
    std: Tensor


class VideoPass(Protocol):
    """Encodes one video, piece by piece."""

    def __call__(self, frames: Tensor, /) -> Posterior:
        """Encode the next piece, `[n,3,H,W]` with values −1 … 1, to latents."""
        ...


class VideoEncoder(Protocol):
    """What `ttt precompute` needs of a video encoder."""

    def begin(self) -> VideoPass:
        """Start with a video."""
        ...


class TextEncoder(Protocol):
    """What sampling and `ttt precompute` need of a text encoder."""

    @property
    def text_length(self) -> int:
        """L, tokens of a text."""
        ...

    @property
    def knows_scenes(self) -> bool:
        """Whether it reads the tokens of `ttt_videodit.scenes` as such."""
        ...

    def __call__(self, texts: Sequence[str], /) -> Tensor:
        """Embeddings `[N,L,E]` of N texts."""
        ...

    def count(self, text: str, /) -> int:
        """Tokens of a text, before it is cut off after L."""
        ...


def pieces(frames: int) -> list[int]:
    """Frames of each piece of a video: `8 + frames mod 8` in the first, then 8, as diffusers' VAE takes a whole video.

    With the 48·S + 1 frames of S segments: 9, 8, 8, ….
    """
    first = min(frames, PIECE + frames % PIECE)
    return [first] + [PIECE] * ((frames - first) // PIECE)


# --- the demo's ---


class DemoVideoEncoder:
    """The demo's linear codec, whose latents are exact (`std` 0)."""

    def __init__(self, codec: DemoCodec) -> None:
        self._codec = codec

    def begin(self) -> VideoPass:
        """Start with a video."""
        opening = True

        def encode(frames: Tensor) -> Posterior:
            nonlocal opening
            mean = self._codec.encode(frames[None], opening=opening)[0]
            opening = False
            return Posterior(mean, torch.zeros_like(mean))

        return encode


# --- CogVideoX's ---


class VAEEncoder:
    """CogVideoX's VAE, piece by piece, so that only one piece of a video is in memory.

    Its convolutions are causal in time, and get what they need of the previous piece. The pieces are the same that
    `AutoencoderKLCogVideoX.encode` makes of a whole video. So the means are equal bit for bit, and the deviations up to
    the last digit, since their exponential is taken of a piece here and of the whole there. TTT-Video's own encoder
    takes 16 frames at a time; its group norms, whose statistics are over the frames of a piece, give other values.

    Args:
        vae: in eval mode.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX) -> None:
        self._vae: Any = vae

    def begin(self) -> VideoPass:
        """Start with a video."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        cache: Any = None

        @torch.no_grad()
        def encode(frames: Tensor) -> Posterior:
            nonlocal cache
            video = frames.to(self._vae.device, self._vae.dtype).transpose(0, 1)[None]
            moments, cache = self._vae.encoder(video, conv_cache=cache)
            if self._vae.quant_conv is not None:
                moments = self._vae.quant_conv(moments)
            posterior = DiagonalGaussianDistribution(moments)
            scale = self._vae.config.scaling_factor
            return Posterior(
                *((moment[0].transpose(0, 1).float() * scale).cpu() for moment in (posterior.mean, posterior.std))
            )

        return encode


class T5TextEncoder:
    """CogVideoX's text encoder: T5's last hidden states of all L tokens, padding included, as in CogVideoX's training.

    Each text is encoded alone. Rounding in matrix products depends on their shapes, so in a batch the numbers of a text
    would depend on how many others there are, and a run that goes on after a kill has fewer left. L tokens are enough
    to keep a device busy.

    Args:
        tokenizer: T5's.
        model: `T5EncoderModel`, in eval mode.
        text_length: L, tokens of a text; further ones are cut off.
    """

    def __init__(self, tokenizer: Any, model: Any, *, text_length: int) -> None:
        self.text_length = text_length
        """L, tokens of a text."""
        self.knows_scenes = add_scene_tokens(tokenizer, model.get_input_embeddings().num_embeddings)
        """Whether it reads the tokens of `ttt_videodit.scenes` as such."""
        self._tokenizer = tokenizer
        self._model = model

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[N,L,E]` of N texts, on the CPU in the model's dtype."""
        rows = []
        for text in texts:
            tokens = self._tokenizer(
                [text], padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
            )
            rows.append(self._model(tokens.input_ids.to(self._model.device))[0].cpu())
        return torch.cat(rows)

    def count(self, text: str) -> int:
        """Tokens of a text, before it is cut off."""
        return len(self._tokenizer(text, verbose=False).input_ids)


# --- loading ---


def encoders_of(options: VideoDiTOptions) -> str:
    """Which encoders go with the options' transformer; nothing is loaded."""
    if options.preset == "demo":
        return f"demo {hashlib.sha256(demo.CODEC.read_bytes()).hexdigest()[:12]}"
    pinned = f"@{options.revision}" if options.revision is not None else ""
    return f"{options.pretrained or DEFAULT_PRETRAINED}{pinned}"


def load_video_encoder(options: VideoDiTOptions, *, device: torch.device | str, dtype: torch.dtype) -> VideoEncoder:
    """The encoder that goes with the options' transformer.

    Raises:
        EnvironmentProblem: its weights cannot be loaded.
    """
    if options.preset == "demo":
        return DemoVideoEncoder(DemoCodec.load())
    return VAEEncoder(load_vae(options, device=device, dtype=dtype))


def load_text_encoder(
    options: VideoDiTOptions, *, text_length: int, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder:
    """The text encoder that goes with the options' transformer.

    Raises:
        EnvironmentProblem: its weights, or its tokenizer, cannot be had.
    """
    if options.preset == "demo":
        return DemoTextEncoder(text_length=text_length)
    source = source_of(options, *TEXT_PARTS)
    with _in_our_words(source, "T5"):
        import transformers

        release = tuple(int(number) for number in transformers.__version__.split(".")[:2])
        in_dtype: dict[str, Any] = {"dtype" if release >= (4, 56) else "torch_dtype": dtype}
        model: Any = transformers.T5EncoderModel.from_pretrained(
            source,
            subfolder="text_encoder",
            revision=options.revision,
            trust_remote_code=False,
            use_safetensors=True,
            **in_dtype,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, subfolder="tokenizer", revision=options.revision, trust_remote_code=False
        )
    return T5TextEncoder(tokenizer, model.eval().to(device), text_length=text_length)


def load_vae(options: VideoDiTOptions, *, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    """CogVideoX's VAE, in eval mode.

    Raises:
        EnvironmentProblem: its weights cannot be had, or its latents are not those of CogVideoX 5B.
    """
    source = source_of(options, VAE)
    with _in_our_words(source, "CogVideoX's VAE"):
        from diffusers import AutoencoderKLCogVideoX

        vae: Any = AutoencoderKLCogVideoX.from_pretrained(
            source,
            subfolder="vae",
            revision=options.revision,
            torch_dtype=dtype,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # which needs `accelerate`, for half a gigabyte
        )
    spatial = 2 ** (len(vae.config.block_out_channels) - 1)
    geometry = (vae.config.latent_channels, vae.config.temporal_compression_ratio, spatial)
    expected = (LATENT_CHANNELS, TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION)
    if geometry != expected:
        raise EnvironmentProblem(
            f"{source}/vae: {geometry[0]} channels for {geometry[1]} frames of {spatial} × {spatial} pixels, not "
            f"CogVideoX's {expected[0]} for {expected[1]} of {expected[2]} × {expected[2]}; name another "
            f"backbone.pretrained"
        )
    return cast("AutoencoderKLCogVideoX", vae.eval().to(device))


@contextlib.contextmanager
def _in_our_words(source: str, what: str) -> Iterator[None]:
    """Turn what the libraries and the hub's client raise for weights that cannot be loaded into one sentence."""
    try:
        yield
    except EnvironmentProblem:
        raise
    except Exception as error:  # diffusers, transformers, the hub's client and safetensors each have their own
        raise EnvironmentProblem(
            f"{source}: cannot be loaded as {what} ({first_line(error)}); name a local folder in diffusers' layout "
            f"with backbone.pretrained, or try the demo preset"
        ) from error


# --- a whole video ---


def encode_video(
    pictures: Iterable[Picture], *, frames: int, starts: Sequence[int], encoder: VideoEncoder
) -> dict[str, Tensor]:
    """The content of a video's latents file: `mean`, `std` `[Fr,C,h,w]` and `start_mean`, `start_std` `[S,C,h,w]`.

    Row i of `start_mean` and `start_std` is the first latent frame of a video that begins with frame `starts[i]`: it
    stands for that frame alone. In the whole video the latent frame there stands for four frames; in sampling the model
    never begins with such a latent frame.

    Args:
        pictures: the video's pictures, `[H,W,3]` each, read one by one.
        frames: how many there are.
        starts: numbers of frames, in order; the first is 0.
        encoder: the encoder to use.
    """
    lengths = iter(pieces(frames))
    whole = encoder.begin()
    piece: list[Picture] = []
    posteriors: list[Posterior] = []
    opening: dict[int, list[Picture]] = {}
    first: dict[int, Posterior] = {}
    length = next(lengths)
    for number, picture in enumerate(pictures):
        piece.append(picture)
        if len(piece) == length:
            posteriors.append(whole(to_tensor(piece)))
            piece, length = [], next(lengths, 0)
        if number in starts[1:]:
            opening[number] = []
        for start in list(opening):
            opening[start].append(picture)
            if len(opening[start]) == pieces(frames - start)[0]:
                first[start] = encoder.begin()(to_tensor(opening.pop(start)))
    first[0] = posteriors[0]
    return {
        "mean": torch.cat([posterior.mean for posterior in posteriors]),
        "std": torch.cat([posterior.std for posterior in posteriors]),
        "start_mean": torch.stack([first[start].mean[0] for start in starts]),
        "start_std": torch.stack([first[start].std[0] for start in starts]),
    }
