"""Windows from codes on disk (`ttt_moshi.codes`), in the place of a codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt.errors import EnvironmentProblem
from ttt.files import mapping_errors, read_tensors, verify_tensors
from ttt.reading import require_file, unreadable
from ttt_moshi.codes import CodeFile, CodeSettings, channel_in_words, require_all, silence_file
from ttt_moshi.options import FRAME_RATE
from ttt_moshi.pieces import Piece, Place, SoundPieces, Spans
from ttt_moshi.sources import SpeechSource

SAMPLE_RATE: Final = 24_000  # Mimi's; what codes are made of is not read


@dataclass(frozen=True)
class StoredCodes:
    """The codes that a codec has made, of recordings in windows."""

    folder: Path
    codec: str
    """Which codec, by its weights."""
    num_codebooks: int
    cardinality: int
    stand_in: str | None
    """What a user must know of the codec."""
    frame_rate: float = FRAME_RATE
    sample_rate: int = SAMPLE_RATE

    def settings(self, source: SpeechSource, duration_sec: float) -> CodeSettings:
        """What the codes of a source's recordings depend on."""
        return CodeSettings(self.codec, float(duration_sec), channel_in_words(source.transcribed, source.channel))

    def file(self, spans: Spans, number: int) -> CodeFile:
        """The file of a recording's codes."""
        settings = self.settings(spans.sources[number], spans.duration_sec)
        return CodeFile.of(self.folder, spans.recordings[number].audio, settings)

    def rows(self, source: SpeechSource) -> int:
        """Rows of its recordings' codes."""
        return self.num_codebooks * (2 if source.transcribed else 1)

    def pieces(self, sounds: SoundPieces) -> StoredPieces:
        """The codes of every window.

        Raises:
            EnvironmentProblem: codes are missing, or of another codec, other windows or other recordings.
        """
        spans = sounds.spans
        files = [self.file(spans, number) for number in range(len(spans.recordings))]
        require_all(
            files,
            [recording.place for recording in spans.recordings],
            rows=[self.rows(source) for source in spans.sources],
            windows=[len(windows) for windows in spans.files],
        )
        return StoredPieces(sounds, [file.path for file in files])

    def silence_of(self, spans: Spans) -> Path | None:
        """The file of the codes of silence; None if nobody is silent."""
        alone = [source for source in spans.sources if not source.transcribed]
        return silence_file(self.folder, self.settings(alone[0], spans.duration_sec)) if alone else None

    def silence(self, spans: Spans) -> Tensor | None:
        """The codes of digital silence, `[codebooks, T]`; None if nobody is silent.

        Raises:
            EnvironmentProblem: they are missing or damaged.
        """
        file = self.silence_of(spans)
        if file is None:
            return None
        try:
            return read_tensors(file)["codes"].long()
        except EnvironmentProblem as error:
            raise EnvironmentProblem(f"data.codes: {error}; run ttt precompute again") from None


class StoredPieces:
    """The codes of each window from a file that `ttt precompute` made, and its words.

    Args:
        sounds: which has the words.
        files: of each recording's codes.
    """

    def __init__(self, sounds: SoundPieces, files: Sequence[Path]) -> None:
        self._sounds = sounds
        self._files = tuple(files)
        self._unverified = set(self._files)
        """Those whose checksum was not compared yet."""

    def __getitem__(self, index: int) -> Piece:
        """The piece of a window.

        Raises:
            EnvironmentProblem: a file is missing or damaged.
        """
        place = self._sounds.spans.locate(index)
        return Piece(self._codes(place), self._sounds.words_of(place.number))

    def _codes(self, place: Place) -> Tensor:
        file = self._files[place.number]
        try:
            require_file(file)
            if file in self._unverified:
                verify_tensors(file)
                self._unverified.remove(file)
            with mapping_errors(), safe_open(file, framework="pt") as opened:
                frames = opened.get_tensor("frames").tolist()
                start = sum(frames[: place.window])
                codes: Tensor = opened.get_slice("codes")[:, start : start + frames[place.window]]
        except EnvironmentProblem as error:  # it names the file
            raise EnvironmentProblem(f"data.codes: {error}; run ttt precompute again") from None
        except (OSError, SafetensorError) as error:
            why = unreadable(error) if isinstance(error, OSError) else str(error)
            raise EnvironmentProblem(f"data.codes: {file}: cannot be read: {why}; run ttt precompute again") from None
        return codes.long()
