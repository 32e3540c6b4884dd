"""Sound files to what Moshi reads when it is evaluated: the file is its own voice, and the user says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from moshi.models import MimiModel
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ttt.checksums import file_digest
from ttt.errors import EnvironmentProblem
from ttt_moshi.audio import AudioInfo, inspect_audio, naming_sound, read_resampled, resampled_length
from ttt_moshi.codec import DemoCodec
from ttt_moshi.data import MOSHI_PADDING, Codec, load_codec, text_padding
from ttt_moshi.encoding import piecewise
from ttt_moshi.options import NOTHING, PIECE, MoshiOptions, MoshiScoreOptions

_VERSION: Final = "1"
"""Of how clips are made of sound; another version makes other clips of the same file."""

Encode = Callable[[Tensor], Tensor]
"""Encodes the next frames of sound `[1, 1, samples]` to codes `[1, K, t]`; or `[2, K, t]`, the last of silence."""


class MoshiClips:
    """Reads sound files as clips `[1 + 2·K, T]`: the text stream, the file's K codes as Moshi's own voice, the user's.

    A file may have any rate; the mean of its channels is read. T is its length in frames, rounded up: silence fills the
    last frame. Files are encoded in pieces of 256 frames, so that memory does not grow with them, and a short file is
    read like a long one. Several streams can be read in turn.

    Args:
        codec: kyutai's Mimi, or the demo's codec.
        options: what stands in the text and the user's stream.
        codec_hash: tells this codec from others.
        device: the codec's device.
        padding: the model's text token while no word is said.
    """

    def __init__(
        self,
        codec: Codec,
        options: MoshiScoreOptions,
        *,
        codec_hash: str,
        device: torch.device | str = "cpu",
        padding: int = MOSHI_PADDING.padding,
    ) -> None:
        self._codec = codec
        self._options = options
        self._codec_hash = codec_hash
        self._device = torch.device(device)
        self._padding = padding

    @property
    def identity(self) -> Mapping[str, str]:
        """The codec and its hash, and the options that act on a clip. No tokenizer has a part in it."""
        return {
            "reader": f"moshi {_VERSION}",
            "codec": type(self._codec).__name__,
            "codec_sha256": self._codec_hash,
            "codebooks": str(self._codec.num_codebooks),
            "sample_rate": str(self._codec.sample_rate),
            "user_stream": self._options.user_stream,
            "text": self._options.text,
            **({} if self._padding == MOSHI_PADDING.padding else {"text_padding": str(self._padding)}),
        }

    @property
    def notice(self) -> str | None:
        """A note for the user, if a substitute codec makes the codes."""
        return getattr(self._codec, "stand_in", None)

    def positions(self, path: Path) -> int:
        """Frames of a file, by its header.

        Raises:
            EnvironmentProblem: it is missing, broken or shorter than a frame.
        """
        return self._frames(path, self._inspect(path))

    def read(self, path: Path) -> Tensor:
        """The clip of a file, `[1 + 2·K, T]` int64 on the CPU.

        Raises:
            EnvironmentProblem: it is missing, broken or shorter than a frame.
        """
        return torch.cat(list(self.stream(path)), 1)

    def stream(self, path: Path) -> Iterator[Tensor]:
        """The clip of a file in pieces of 256 frames; the last may be shorter.

        Raises:
            EnvironmentProblem: it is missing, broken or shorter than a frame.
        """
        info = self._inspect(path)
        frames = self._frames(path, info)
        encode = _encoder(self._codec, with_silence=self._options.user_stream == "silence")
        for start in range(0, frames, PIECE):
            sound = self._sound(path, info, start, min(start + PIECE, frames))
            yield self._clip(encode(sound[None, None].to(self._device)).long().cpu())

    def sound(self, path: Path) -> NDArray[np.float32]:
        """The samples of a file at the codec's rate, its channels averaged.

        Raises:
            EnvironmentProblem: it is missing, broken or shorter than a frame.
        """
        info = self._inspect(path)
        samples: NDArray[np.float32] = self._sound(path, info, 0, self._frames(path, info)).numpy()
        return samples[: resampled_length(info.samples, info.sample_rate, self._codec.sample_rate)]

    def _clip(self, codes: Tensor) -> Tensor:
        """What Moshi reads, `[1 + 2·K, t]`, of the codes of the file and, if it is heard, of silence, `[1|2, K, t]`."""
        own, user = codes[0], codes[1] if len(codes) == 2 else torch.full_like(codes[0], NOTHING)
        text = self._padding if self._options.text == "padding" else NOTHING
        return torch.cat([torch.full_like(own[:1], text), own, user])

    def _sound(self, path: Path, info: AudioInfo, start: int, stop: int) -> Tensor:
        """The mean of the channels from one frame to another, `[samples]`; silence after the end."""
        rate, size = self._codec.sample_rate, self._codec.frame_size
        begin, end = start * size, stop * size
        length = resampled_length(info.samples, info.sample_rate, rate)
        with naming_sound(path):
            sound = read_resampled(path, info, rate, begin, min(end, length))
        return F.pad(sound.mean(0), (0, max(0, end - length)))

    def _inspect(self, path: Path) -> AudioInfo:
        with naming_sound(path):
            return inspect_audio(path)

    def _frames(self, path: Path, info: AudioInfo) -> int:
        length = resampled_length(info.samples, info.sample_rate, self._codec.sample_rate)
        if length < self._codec.frame_size:
            frame = self._codec.frame_size / self._codec.sample_rate
            raise EnvironmentProblem(f"{path}: holds {info.seconds:.3f} s of sound, less than a frame ({frame:g} s)")
        return -(-length // self._codec.frame_size)


def clip_reader(options: MoshiOptions, score: MoshiScoreOptions, *, device: torch.device | str) -> MoshiClips:
    """The reader for the model that the options build.

    Raises:
        EnvironmentProblem: the codec cannot be had, or is broken.
    """
    codec, file = load_codec(options, device)
    padding = text_padding(options).padding
    return MoshiClips(codec, score, codec_hash=file_digest(file), device=device, padding=padding)


# --- codecs in pieces ---


def _encoder(codec: Any, *, with_silence: bool) -> Encode:
    """A function that encodes sound piece after piece, to the codes of the whole."""
    encoder = _mimi_encoder if isinstance(codec, MimiModel) else _demo_encoder
    return encoder(codec, with_silence)


def _demo_encoder(codec: DemoCodec, with_silence: bool) -> Encode:
    """All frames of silence have the same codes."""
    alone = piecewise(codec, 1)
    silence = codec.encode(codec.window.new_zeros(1, 1, codec.frame_size)) if with_silence else None

    def encode(sound: Tensor) -> Tensor:
        codes = alone(sound)
        return codes if silence is None else torch.cat([codes, silence.expand(-1, -1, codes.shape[2])])

    return encode


def _mimi_encoder(codec: MimiModel, with_silence: bool) -> Encode:
    """Mimi hears silence as a second stream."""
    both = piecewise(codec, 2 if with_silence else 1)
    return lambda sound: both(torch.cat([sound, torch.zeros_like(sound)]) if with_silence else sound)
