"""The demo's video codec, which stands in for CogVideoX's VAE.

CogVideoX works on the latents of a variational autoencoder, whose weights have to be downloaded. This small codec comes
with the package, so that the demo runs anywhere. It has the VAE's geometry (16 channels for blocks of 4 frames of 8 × 8
pixels, the first frame alone). It encodes with the first principal components of the demo's own video, each scaled to
unit variance, and decodes with their transpose. A pretrained CogVideoX does not know its latents.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import mapping_errors, verify_tensors, write_tensors
from ttt.reading import require_file
from ttt_videodit import demo
from ttt_videodit.geometry import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION

COLORS: Final = 3
BLOCK: Final = TEMPORAL_COMPRESSION * COLORS * SPATIAL_COMPRESSION**2
"""Numbers in a block of 4 frames of 8 × 8 pixels."""

_NAMES: Final = ("basis", "mean", "scale")


class DemoCodec(nn.Module):
    """Encodes each block of 4 × 8 × 8 pixels as 16 channels and decodes it approximately; the demo's substitute VAE.

    It encodes a block x as `z = (basis (x − mean)) / scale` and decodes `x ≈ basisᵀ (scale ⊙ z) + mean`. The first
    frame of a video is repeated four times to form a block, so that its latents are like the others.

    Args:
        basis: `[16, 768]`, orthonormal rows.
        mean: `[768]`, the mean block.
        scale: `[16]`, standard deviation of each channel over what the codec was fitted on.
    """

    stand_in: ClassVar[str] = (
        "Latents come from the demo's own small linear codec, which stands in for CogVideoX's VAE, and text embeddings "
        "from hashed words, in place of T5: their weights are a download. What comes out is real, but says nothing "
        "about CogVideoX's quality; the preset 5b uses the VAE and T5."
    )
    """A note for users who train on these latents or sample them."""

    basis: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, basis: Tensor, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        shapes = {"basis": (LATENT_CHANNELS, BLOCK), "mean": (BLOCK,), "scale": (LATENT_CHANNELS,)}
        for (name, shape), tensor in zip(shapes.items(), (basis, mean, scale), strict=True):
            if tensor.shape != shape or not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} is not {list(shape)} finite numbers")
            self.register_buffer(name, tensor.float(), persistent=False)
        if not bool((self.scale > 0).all()):
            raise ValueError("scale is not positive")

    # --- files ---

    @classmethod
    def load(cls, path: str | Path | None = None, *, device: torch.device | str = "cpu") -> DemoCodec:
        """Read a codec's file; without a path, the one that the package ships.

        Raises:
            EnvironmentProblem: the file is missing, cut short or something else.
        """
        file = Path(path) if path is not None else demo.CODEC
        try:
            require_file(file)
            with mapping_errors(), safe_open(file, framework="pt") as opened:
                if sorted(opened.keys()) != list(_NAMES):
                    raise ValueError(f"it does not hold {', '.join(_NAMES)}")
                codec = cls(*(opened.get_tensor(name) for name in _NAMES))
            verify_tensors(file)
        except (OSError, SafetensorError, ValueError, EnvironmentProblem) as error:
            raise EnvironmentProblem(
                f"{file}: cannot be read as the demo's codec: {error}; reinstall ttt-videodit, or make it anew with "
                f"scripts/make_demo.py"
            ) from error
        return codec.to(device)

    def save(self, path: str | Path) -> None:
        """Write the codec to a safetensors file."""
        write_tensors(Path(path), {name: getattr(self, name) for name in _NAMES}, {})

    @classmethod
    def fit(cls, frames: Tensor) -> DemoCodec:
        """The codec that loses least of a video `[F,3,H,W]` with values −1 … 1: its first principal components."""
        blocks = _blocks(frames[None].double(), opening=True).flatten(0, -2)
        mean = blocks.mean(0)
        centred = blocks - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(blocks))
        basis = vectors[:, -LATENT_CHANNELS:].flip(1).T
        # a component is one up to its sign: the brighter block is the positive one
        first = basis.abs().argmax(1, keepdim=True)
        basis = basis * basis.gather(1, first).sign()
        return cls(basis, mean, values[-LATENT_CHANNELS:].flip(0).sqrt())

    # --- the codec ---

    @torch.no_grad()
    def encode(self, frames: Tensor, *, opening: bool = True) -> Tensor:
        """Encode frames `[B,F,3,H,W]` with values −1 … 1 to latents `[B,Fr,16,H/8,W/8]`.

        Args:
            frames: `F = 1 + 4 (Fr − 1)` frames if they start a video, else `4 Fr`.
            opening: whether they start a video.

        Raises:
            UsageError: the frames do not divide into blocks.
        """
        rest = frames.shape[1] - opening if frames.ndim == 5 else -1
        sides_fit = frames.ndim == 5 and not any(side % SPATIAL_COMPRESSION for side in frames.shape[-2:])
        if not sides_fit or frames.shape[2] != COLORS or rest < 0 or rest % TEMPORAL_COMPRESSION:
            raise UsageError(
                f"the codec takes video as [batch, {'1 + ' if opening else ''}4·n, 3, 8·h, 8·w], "
                f"not {list(frames.shape)}"
            )
        blocks = _blocks(frames.to(self.basis), opening=opening)
        return (((blocks - self.mean) @ self.basis.T) / self.scale).permute(0, 1, 4, 2, 3).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `[B,Fr,16,h,w]` to frames `[B,1+4(Fr−1),3,8h,8w]`; values may be slightly outside −1 … 1.

        Raises:
            UsageError: the latents are of another shape.
        """
        if latents.ndim != 5 or latents.shape[2] != LATENT_CHANNELS or latents.shape[1] < 1:
            raise UsageError(f"the codec takes latents as [batch, frames, 16, h, w], not {list(latents.shape)}")
        channels = latents.to(self.basis).permute(0, 1, 3, 4, 2)
        blocks = (channels * self.scale) @ self.basis + self.mean
        side = SPATIAL_COMPRESSION
        pixels = blocks.unflatten(-1, (TEMPORAL_COMPRESSION, COLORS, side, side))
        frames = pixels.permute(0, 1, 4, 5, 2, 6, 3, 7).flatten(4, 5).flatten(5, 6)  # B, Fr, 4, 3, 8h, 8w
        return torch.cat([frames[:, 0].mean(1, keepdim=True), frames[:, 1:].flatten(1, 2)], dim=1)


def _blocks(frames: Tensor, *, opening: bool) -> Tensor:
    """Blocks `[B,Fr,h,w,768]` of frames `[B,F,3,H,W]`."""
    if opening:
        frames = torch.cat([frames[:, :1].expand(-1, TEMPORAL_COMPRESSION - 1, -1, -1, -1), frames], dim=1)
    side = SPATIAL_COMPRESSION
    cut = frames.unflatten(1, (-1, TEMPORAL_COMPRESSION)).unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
    return cut.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4)


def peak_signal_to_noise(frames: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio of two videos with values −1 … 1, in decibels: `10 log₁₀(4 / mean((x − y)²))`."""
    return 10 * math.log10(4 / float((frames - others).double().square().mean()))
