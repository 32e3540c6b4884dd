"""Codes on disk: `ttt precompute` encodes each recording once; training reads its windows from there.

A recording's codes are a safetensors file, `CONTENT-SETTINGS.safetensors`. CONTENT is short for what the recording
holds, wherever it lies and whatever it is called; SETTINGS for the codec and for how it is cut. So recordings may be
moved, runs with other windows may share a folder, and codes of something else are never read. The file holds `codes`
`[channels · codebooks, T]` int16 of all windows one after another, each encoded by itself as training would, and
`frames` `[windows]`, T of each window.

The name has a recording's size, beginning, middle and end. The header has the date of its file and the checksum of all
of it: if the date is another, the recording is compared as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ttt import checksums
from ttt.errors import EnvironmentProblem, UnreadableError
from ttt.files import Header, read_header, verify_tensors
from ttt.reading import unreadable

HEADER: Final = "ttt_moshi.codes"
_VERSION: Final = 1  # of how sound becomes codes, codec aside
_SPAN: Final = 1 << 16
_AGAIN: Final = "run ttt precompute with this config"


@dataclass(frozen=True)
class CodeSettings:
    """What codes depend on beside the recording."""

    codec: str
    """Which codec, by its weights."""
    duration_sec: float
    """Length of a window, which is encoded by itself."""
    channel: str
    """`both`; or which channel is the voice, of recordings without transcripts."""
    version: int = _VERSION

    @property
    def short(self) -> str:
        """A short name for them."""
        return _short(asdict(self))

    def differences(self, others: Any) -> list[str]:
        """In what the settings of a file differ, in words."""
        told = {
            "codec": "another codec, {there}",
            "duration_sec": "windows of {there} s, not {here} s",
            "channel": "channel {there}, not {here}",
            "version": "another version of ttt-moshi",
        }
        there = others if isinstance(others, dict) else {}
        return [
            text.format(there=there.get(key), here=value)
            for (key, value), text in zip(asdict(self).items(), told.values(), strict=True)
            if there.get(key) != value
        ]


def channel_in_words(transcribed: bool, channel: str | None) -> str:
    """`CodeSettings.channel` of a source."""
    return "both" if transcribed else channel or "only"


@dataclass(frozen=True)
class Content:
    """What identifies a recording's content without reading all of it."""

    short: str
    """A short name for its size, beginning, middle and end."""
    mtime_ns: int
    """When its file was changed."""

    @classmethod
    def of(cls, audio: Path) -> Content:
        """Look at a sound file.

        Raises:
            EnvironmentProblem: it cannot be read.
        """
        try:
            with audio.open("rb") as file:
                size = file.seek(0, 2)
                parts = []
                for start in (0, (size - _SPAN) // 2, size - _SPAN):
                    file.seek(max(0, start))
                    parts.append(hashlib.sha256(file.read(_SPAN)).hexdigest())
            return cls(_short([size, *parts]), audio.stat().st_mtime_ns)
        except OSError as error:
            raise EnvironmentProblem(f"{audio}: cannot be read: {unreadable(error)}") from None


@dataclass(frozen=True)
class CodeFile:
    """Where the codes of a recording are, or will be."""

    path: Path
    audio: Path
    content: Content
    settings: CodeSettings

    @classmethod
    def of(cls, folder: Path, audio: Path, settings: CodeSettings) -> CodeFile:
        """The file of a recording's codes in a folder.

        Raises:
            EnvironmentProblem: the recording cannot be read.
        """
        content = Content.of(audio)
        return cls(folder / f"{content.short}-{settings.short}.safetensors", audio, content, settings)

    def header(self) -> dict[str, str]:
        """What is kept beside the codes."""
        kept = {
            "audio": self.audio.name,
            "mtime_ns": self.content.mtime_ns,
            "sha256": checksums.file_digest(self.audio),
            **asdict(self.settings),
        }
        return {HEADER: json.dumps(kept)}

    def what_is_wrong(self, *, rows: int, windows: int) -> str | None:
        """Why the codes cannot be read, and the way out; None if they can.

        Args:
            rows: channels · codebooks.
            windows: of the recording.
        """
        if self.path.is_dir():
            return f"{self.path} is a folder, not a file of codes; move it away and {_AGAIN}"
        if not self.path.is_file():
            return self._missing()
        try:
            header = read_header(self.path)
        except UnreadableError as error:  # its content may be whole
            return str(error)
        except EnvironmentProblem as error:
            return f"{error}; delete it and {_AGAIN}"
        if self._is_of_another_content(header):
            return f"was changed since it was encoded, in its middle; delete {self.path} and {_AGAIN}"
        codes, frames = header.tensors.get("codes"), header.tensors.get("frames")
        if codes is None or frames is None or codes.dtype != "I16" or codes.shape[0] != rows:
            return f"{self.path} holds no codes of {rows} rows; delete it and {_AGAIN}"
        if frames.shape != (windows,):
            return f"{self.path} holds another number of windows than {windows}; delete it and {_AGAIN}"
        return None

    def is_current(self, *, wholly: bool = False) -> bool:
        """Whether the codes are there, whole, and of this content; all of them is read.

        Args:
            wholly: compare all of the recording, whatever its date.
        """
        if not self.path.is_file():
            return False
        try:
            header = read_header(self.path)
            verify_tensors(self.path, header)
        except UnreadableError:
            raise
        except EnvironmentProblem:
            return False
        return not self._is_of_another_content(header, wholly=wholly)

    def damage(self) -> str | None:
        """What is wrong with them if all of them and of the recording is read, and the way out; None if nothing is."""
        if not self.path.is_file():
            return self._missing()
        good = self.is_current(wholly=True)
        return None if good else f"{self.path} is damaged, or of another content; delete it and {_AGAIN}"

    def _is_of_another_content(self, header: Header, *, wholly: bool = False) -> bool:
        kept = kept_in(header)
        look = wholly or kept.get("mtime_ns") != self.content.mtime_ns
        return look and kept.get("sha256") != checksums.file_digest(self.audio)

    def _missing(self) -> str:
        return f"{missing(self.path.parent, self.content, self.settings) or self._none()}; {_AGAIN}"

    def _none(self) -> str:
        return f"no codes of it in {self.path.parent}"


def missing(folder: Path, content: Content, settings: CodeSettings) -> str | None:
    """Why a folder has no codes of a recording by these settings, in words; None if it has some.

    If `settings.codec` is empty, codes of any codec are meant.
    """
    told = f"no codes of it in {folder}"
    for file in sorted(folder.glob(f"{content.short}-*.safetensors")):
        try:
            kept = kept_in(read_header(file))
        except EnvironmentProblem:
            continue
        differences = settings.differences(kept if settings.codec else {**kept, "codec": ""})
        if not differences:
            return None
        told = f"its codes in {folder} are of {' and '.join(differences)}"
    return told


def codec_identity(codebooks: int, weights: Path, *, own: bool) -> str:
    """Which codec it is that makes so many codebooks: of Mimi or the demo's own, by its weights.

    Raises:
        EnvironmentProblem: they cannot be read.
    """
    try:
        digest = checksums.file_digest(weights)[:16]
    except OSError as error:
        raise EnvironmentProblem(f"{weights}: cannot be read: {unreadable(error)}") from None
    return f"{'the demo codec' if own else 'a Mimi'} of {codebooks} codebooks (sha256 {digest})"


def kept_in(header: Header) -> dict[str, Any]:
    """What a file of codes keeps beside them; empty of another file."""
    try:
        kept = json.loads(header.metadata.get(HEADER, ""))
    except ValueError:
        return {}
    return kept if isinstance(kept, dict) else {}


def require_all(
    files: Sequence[CodeFile], places: Sequence[str], *, rows: Sequence[int], windows: Sequence[int]
) -> None:
    """Require the codes of every recording.

    Raises:
        EnvironmentProblem: some are missing, or are of something else; the message names the first few.
    """
    problems = [
        f"{place}: {file.audio}: {wrong}"
        for file, place, count, of_file in zip(files, places, rows, windows, strict=True)
        if (wrong := file.what_is_wrong(rows=count, windows=of_file)) is not None
    ]
    if problems:
        raise EnvironmentProblem.about(problems, "recordings have no codes that can be read", where="data.codes")


def silence_file(folder: Path, settings: CodeSettings) -> Path:
    """The file of the codes of digital silence, which a silent user has: `codes` `[codebooks, T]` of a window."""
    return folder / f"silence-{_short([settings.version, settings.codec, settings.duration_sec])}.safetensors"


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
