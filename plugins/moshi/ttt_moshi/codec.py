"""The demo's audio codec, which stands in for Mimi.

Moshi reads and writes the codes of kyutai's neural codec Mimi, whose weights have to be downloaded. This small codec
comes with the package, so that the demo runs anywhere. It has the part of Mimi's interface that Moshi uses (8 codebooks
at 12.5 frames a second): residual quantisation of log-mel spectrograms, with codebooks fitted by k-means on the demo's
own speech, and an approximate inverse for listening. A pretrained Moshi does not know its codes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Final

import torch
from moshi.modules.streaming import StreamingModule
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import mapping_errors, verify_tensors, write_tensors
from ttt.reading import require_file
from ttt_moshi import demo
from ttt_moshi.codec_streams import CodecState, next_sound

_HEADER: Final = "ttt_moshi.DemoCodec"


@dataclass(frozen=True)
class CodecSettings:
    """How sound is turned into vectors; stored in the header of the codec's file."""

    sample_rate: int = 16000
    """Samples a second."""
    frame_size: int = 1280
    """Samples per frame: 12.5 frames a second."""
    hop_size: int = 160
    """Samples between spectra; a frame stacks `frame_size / hop_size` of them."""
    window_size: int = 640
    """Samples under a spectrum's Hann window."""
    fft_size: int = 1024
    """Length of the transform."""
    mels: int = 40
    """Mel bands of a spectrum."""
    lowest_hz: float = 50.0
    """Lower edge of the lowest band."""
    highest_hz: float = 8000.0
    """Upper edge of the highest band."""
    floor_db: float = -80.0
    """Level in decibels relative to full scale that counts as silence."""

    def __post_init__(self) -> None:
        if min(self.sample_rate, self.frame_size, self.hop_size, self.mels) < 1:
            raise ValueError("sizes and rates are at least 1")
        if self.frame_size % self.hop_size:
            raise ValueError(f"frame_size {self.frame_size} is not a multiple of hop_size {self.hop_size}")
        if not self.hop_size <= self.window_size <= self.fft_size:
            raise ValueError("hop_size <= window_size <= fft_size does not hold")
        if (self.window_size // 2) % self.hop_size:
            raise ValueError(f"half of window_size {self.window_size} is not a multiple of hop_size {self.hop_size}")
        if not 0 <= self.lowest_hz < self.highest_hz <= self.sample_rate / 2:
            raise ValueError("0 <= lowest_hz < highest_hz <= sample_rate / 2 does not hold")

    @property
    def spectra_per_frame(self) -> int:
        """Spectra that a frame stacks."""
        return self.frame_size // self.hop_size


def mel_filters(settings: CodecSettings) -> Tensor:
    """Triangular filters, evenly spaced on the mel scale, `[mels, fft_size // 2 + 1]` float64; each sums to 1."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    points = torch.linspace(mel(settings.lowest_hz), mel(settings.highest_hz), settings.mels + 2, dtype=torch.float64)
    corners = 700.0 * (10.0 ** (points / 2595.0) - 1.0)
    bins = torch.arange(settings.fft_size // 2 + 1, dtype=torch.float64)
    frequencies = bins * (settings.sample_rate / settings.fft_size)
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    triangles = torch.minimum((frequencies - left) / (peak - left), (right - frequencies) / (right - peak)).clamp_min(0)
    total = triangles.sum(1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError(f"{settings.mels} mel bands are too narrow for an fft_size of {settings.fft_size}")
    return triangles / total


class DemoCodec(StreamingModule[CodecState]):
    """Encodes speech as 8 codes for every 80 ms and decodes it approximately; the demo's substitute for Mimi.

    Like Mimi it streams: inside `with codec.streaming(batch_size):` each call continues the one before.

    A frame stacks the log-mel spectra that end in it, so frame `t` depends only on samples before
    `(t + 1) * frame_size`. Each codebook in turn takes the entry that is nearest to the remaining residual. Entry 0 of
    every codebook is the zero vector: silence in the first, no change in the others. So digital silence is all zeros,
    and no codebook makes a frame worse.

    Args:
        settings: how sound is turned into vectors.
        codebooks: `[codebooks, cardinality, spectra_per_frame * mels]`, decibels.
    """

    stand_in: ClassVar[str] = (
        "Audio codes come from the demo's own small codec, which stands in for Mimi: Mimi's weights are a download. "
        "Losses are real, but say nothing about Moshi's quality; the preset 7b uses Mimi."
    )
    """A note for users who train on these codes."""
    stand_in_voice: ClassVar[str] = (
        "the voice is that of the demo's own small codec, which stands in for Mimi, and the demo's model is tiny and "
        "random but for what was trained: it babbles; the preset 7b speaks"
    )
    """A note for users who listen to its sound."""

    codebooks: Tensor
    filters: Tensor
    window: Tensor

    def __init__(self, settings: CodecSettings, codebooks: Tensor) -> None:
        super().__init__()
        width = settings.spectra_per_frame * settings.mels
        if codebooks.ndim != 3 or codebooks.shape[-1] != width or 0 in codebooks.shape:
            raise ValueError(f"codebooks are [codebooks, cardinality, {width}], not {list(codebooks.shape)}")
        if not bool(codebooks.isfinite().all()):
            raise ValueError("codebooks hold values that are not finite")
        self.settings = settings
        self.register_buffer("codebooks", codebooks.float(), persistent=False)
        self.register_buffer("filters", mel_filters(settings).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(settings.window_size), persistent=False)

    # --- files ---

    @classmethod
    def load(cls, path: str | Path | None = None, *, device: torch.device | str = "cpu") -> DemoCodec:
        """Read a codec's file; without a path, the one that the package ships.

        Raises:
            EnvironmentProblem: the file is missing, cut short or not a codec's.
        """
        file = Path(path) if path is not None else demo.CODEC
        try:
            require_file(file)
            with mapping_errors(), safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
                if _HEADER not in header or list(opened.keys()) != ["codebooks"]:
                    raise ValueError(f"its header has no {_HEADER}")
                codec = cls(_settings_from_json(header[_HEADER]), opened.get_tensor("codebooks"))
            verify_tensors(file)
        except (OSError, SafetensorError, ValueError, EnvironmentProblem) as error:
            raise EnvironmentProblem(
                f"{file}: cannot be read as the demo's codec: {error}; reinstall ttt-moshi, or make it anew with "
                f"scripts/make_demo.py"
            ) from error
        return codec.to(device)

    def save(self, path: str | Path) -> None:
        """Write codebooks (as float16) and settings, the settings in the header."""
        header = {_HEADER: json.dumps(asdict(self.settings))}
        write_tensors(Path(path), {"codebooks": self.codebooks.half()}, header)

    # --- Mimi's interface ---

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return self.settings.sample_rate

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return self.settings.frame_size

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.settings.sample_rate / self.settings.frame_size

    @property
    def overlap(self) -> int:
        """Samples before a frame that its codes depend on."""
        return self.settings.window_size - self.settings.hop_size

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return self.codebooks.shape[0]

    @property
    def cardinality(self) -> int:
        """Entries of a codebook."""
        return self.codebooks.shape[1]

    @torch.no_grad()
    def encode(self, wav: Tensor, *, before: Tensor | None = None) -> Tensor:
        """Encode sound `[B, 1, samples]` to codes `[B, codebooks, T]` int64; T = samples / frame_size, rounded up.

        If the last frame is not full, silence fills it. While streaming, a piece is of whole frames.

        Args:
            wav: the sound.
            before: the `overlap` samples before it, `[B, 1, overlap]`, if it continues another; else those of the
                stream, or silence.
        """
        if self._streaming_state is not None and before is None:
            self._require_whole(wav)
            before = self._streaming_state.heard.clone()
            self._streaming_state.hear(wav)
        residual = self.log_mels(wav, before=before).flatten(-2)
        codes = []
        for codebook in self.codebooks:
            # |r - c|² without |r|², which is the same for every entry
            nearest = (codebook.square().sum(-1) - 2 * residual @ codebook.T).argmin(-1)
            residual = residual - codebook[nearest]
            codes.append(nearest)
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor, *, iterations: int | None = None) -> Tensor:
        """Decode codes `[B, K, T]` approximately to sound `[B, 1, T * frame_size]`; K <= 8 first codebooks are enough.

        Mel spectra are spread back over frequency. Griffin and Lim's iteration (1984) with momentum (Perraudin et al.
        2013) finds the phases, from the same random start every time. While streaming, it finds those of one frame
        after another, so that pieces of any length give the same sound.

        Args:
            codes: K of the codebooks.
            iterations: None is 60; while streaming 16, which take a tenth of the time that the sound lasts.
        """
        spectra = self.decode_log_mels(codes)
        if spectra.shape[1] == 0:
            return spectra.new_zeros(spectra.shape[0], 1, 0)
        floor = 10.0 ** (self.settings.floor_db / 10)
        power = floor * torch.expm1(spectra * (math.log(10) / 10))
        if self._streaming_state is not None:
            steps = 16 if iterations is None else iterations
            frames = [self._next_frame(frame, self._streaming_state, steps) for frame in power.unbind(1)]
            return torch.cat(frames, 1)[:, None]
        return self._phases(self._spread(power.flatten(1, 2)).sqrt(), 60 if iterations is None else iterations)[:, None]

    # --- streaming ---

    def _init_streaming_state(self, batch_size: int) -> CodecState:
        return CodecState.fresh(batch_size, overlap=self.overlap, device=self.window.device)

    def _require_whole(self, wav: Tensor) -> None:
        """Refuse a piece of a stream that ends within a frame.

        Raises:
            UsageError: it does.
        """
        if wav.shape[-1] % self.frame_size:
            raise UsageError(
                f"a stream is encoded in whole frames of {self.frame_size} samples, not {wav.shape[-1]}; fill the last "
                f"one with silence"
            )

    def _next_frame(self, power: Tensor, state: CodecState, iterations: int) -> Tensor:
        """The sound `[B, frame_size]` of a frame's mel power `[B, spectra_per_frame, mels]`, after what was said."""
        settings = self.settings
        sound, expected = next_sound(
            self._spread(power).sqrt(),
            state.said,
            state.expected,
            window=self.window,
            hop=settings.hop_size,
            fft_size=settings.fft_size,
            iterations=iterations,
        )
        state.say(sound, expected)
        return sound

    # --- what is quantised ---

    def log_mels(self, wav: Tensor, *, before: Tensor | None = None) -> Tensor:
        """Mel spectra of sound `[B, 1, samples]`: `[B, T, spectra_per_frame, mels]`, decibels above the floor, >= 0.

        It continues the `overlap` samples `before`, `[B, 1, overlap]`; without them, silence.
        """
        if wav.ndim != 3 or wav.shape[1] != 1:
            raise UsageError(f"the codec takes sound as [batch, 1, samples], not {list(wav.shape)}")
        settings = self.settings
        frames = -(-wav.shape[-1] // settings.frame_size)
        missing = frames * settings.frame_size - wav.shape[-1]
        if frames == 0:
            return self.window.new_zeros(wav.shape[0], 0, settings.spectra_per_frame, settings.mels)
        # a spectrum's window ends with its hop, so a frame does not depend on later samples
        joined = F.pad(wav, (self.overlap, 0)) if before is None else torch.cat([before, wav], 2)
        padded = F.pad(joined[:, 0].to(self.window.dtype), (0, missing))
        pieces = padded.unfold(-1, settings.window_size, settings.hop_size) * self.window
        power = torch.fft.rfft(pieces, settings.fft_size).abs().square() / self.window.sum().square()
        decibels = 10 * torch.log10((power @ self.filters.T).clamp_min(1e-30))
        return (decibels - settings.floor_db).clamp_min(0).unflatten(1, (frames, settings.spectra_per_frame))

    def decode_log_mels(self, codes: Tensor) -> Tensor:
        """Log-mels of codes `[B, K, T]`: `[B, T, spectra_per_frame, mels]`, decibels above the floor, >= 0."""
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= self.num_codebooks:
            raise UsageError(
                f"the codec takes codes as [batch, 1 to {self.num_codebooks}, frames], not {list(codes.shape)}"
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.cardinality):
            raise UsageError(
                f"codes are 0 to {self.cardinality - 1}, but these are {int(codes.min())} to {int(codes.max())}; cut "
                f"padding (-1) off before decoding"
            )
        total = self.codebooks.new_zeros(codes.shape[0], codes.shape[2], self.codebooks.shape[-1])
        for codebook, column in zip(self.codebooks, codes.unbind(1), strict=False):
            total = total + codebook[column]
        return total.clamp_min(0).unflatten(-1, (self.settings.spectra_per_frame, self.settings.mels))

    # --- the inverse ---

    def _spread(self, mel_power: Tensor) -> Tensor:
        """Find a non-negative power spectrum `[B, S, bins]` whose mel bands approximate `[B, S, mels]`."""
        filters = self.filters
        power = mel_power @ (filters / filters.sum(0).clamp_min(1e-12))
        for _ in range(30):  # multiplicative updates (Lee and Seung 2001) keep it non-negative
            predicted = power @ filters.T
            ratio = mel_power / predicted.clamp_min(1e-20)
            power = power * ((ratio @ filters) / filters.sum(0).clamp_min(1e-12))
        return power

    def _phases(self, magnitude: Tensor, iterations: int) -> Tensor:
        """Find sound `[B, S * hop]` whose spectra have the magnitudes `[B, S, bins]`."""
        settings = self.settings
        rows, spectra, _ = magnitude.shape
        # torch centres a spectrum on its hop, but the codec's ends with it: so the sound is `lag` hops late, and the
        # last spectrum is repeated so that the end does not fade
        lag = settings.window_size // 2 // settings.hop_size - 1
        held = magnitude[:, -1:].expand(-1, lag + 2, -1)
        target = torch.cat([magnitude, held], dim=1).transpose(1, 2) * self.window.sum()
        generator = torch.Generator().manual_seed(0)
        angles = torch.rand(target.shape[1:], generator=generator).to(target.device) * (2 * math.pi)
        phase = torch.polar(torch.ones_like(angles), angles).expand(rows, -1, -1)
        length = (target.shape[-1] - 1) * settings.hop_size
        previous = torch.zeros_like(phase)
        for step in range(iterations + 1):
            sound = torch.istft(
                target * phase,
                settings.fft_size,
                settings.hop_size,
                settings.window_size,
                self.window,
                center=True,
                length=length,
            )
            if step == iterations:
                break
            consistent = torch.stft(
                sound,
                settings.fft_size,
                settings.hop_size,
                settings.window_size,
                self.window,
                center=True,
                pad_mode="constant",
                return_complex=True,
            )
            ahead = consistent + 0.99 * (consistent - previous)
            previous = consistent
            phase = ahead / ahead.abs().clamp_min(1e-12)
        return sound[:, lag * settings.hop_size :][:, : spectra * settings.hop_size]


def _settings_from_json(text: str) -> CodecSettings:
    values = json.loads(text)
    known = {field.name: field.type for field in fields(CodecSettings)}
    if not isinstance(values, dict) or set(values) != set(known):
        raise ValueError(f"its header's settings are not {', '.join(known)}")
    for name, value in values.items():
        wanted = (int,) if known[name] == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"its header's setting {name} is {value!r}")
    return CodecSettings(**values)
