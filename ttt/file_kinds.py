"""What a file is by its first bytes, and what to do if another kind was meant: the one table of signatures.

A clone without `git lfs` leaves pointers of 130 bytes where weights should be; a download link that needs a login
saves a page; `torch.save` makes pickles; data come as they were downloaded or exported: compressed, in UTF-16, as a
table. `ttt.foreign` asks for texts, `ttt.files` for weights and settings. A signature is never the beginning of a text
in UTF-8, except those in `TEXTS`. This module imports nothing of the rest, and nothing heavy.
"""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Callable
from typing import Final, NamedTuple

ENOUGH: Final = 512
"""Bytes from the start of a file by which it is known."""


class FileKind(NamedTuple):
    """What a file is."""

    name: str
    """In one word or two, as "pickle"; nothing else depends on the words below."""
    words: str
    """As the end of "it is …": "a git-lfs pointer to a file of 153 bytes"."""
    way_out: str
    """What to do if data or weights were meant; empty if there is no more to say than to name another."""
    to_text: str = ""
    """What to do if a text was meant, if that is something else."""

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.words, self.way_out)))

    @property
    def way_to_text(self) -> str:
        """What to do if a text was meant."""
        return self.to_text or self.way_out or "name another file"

    @property
    def instead_of_text(self) -> str:
        """The end of a sentence about a file that should be text: `it is a zip archive; unpack it: unzip a.zip`."""
        return f"it is {self.words}; {self.way_to_text}"

    def of(self, file: object) -> FileKind:
        """The same, with the file's name in the commands."""
        quoted = shlex.quote(str(file))
        return self._replace(
            way_out=self.way_out.replace("{file}", quoted), to_text=self.to_text.replace("{file}", quoted)
        )


EMPTY: Final = FileKind("empty file", "an empty file", "was its download or copy broken off? fetch it again")
NEVER_MEANT: Final = frozenset({"empty file", "git-lfs pointer", "git-annex pointer", "HTML page", "XML page"})
"""The names of kinds that no program reads: a file of such a kind stands for another one."""
PAGES: Final = frozenset({"HTML page", "XML page"})
"""The names of what servers send in place of a file."""
TEXTS: Final = PAGES | {"JSON text"}
"""The names of kinds that are text in UTF-8."""


def kind_of_start(start: bytes, file: object = "FILE") -> FileKind | None:
    """What a file is that begins with `start`; None if that does not say.

    Args:
        start: its first bytes, `ENOUGH` of them, or all.
        file: its name, for the commands that make something else of it.
    """
    kind = next((kind for is_it, kind in _SIGNATURES if is_it(start)), None)
    if kind is _LFS:
        kind = kind._replace(words=f"a git-lfs pointer to a file of {_pointed(start)} bytes")
    return None if kind is None else kind.of(file)


def _pointed(start: bytes) -> str:
    """The size of the file that a pointer of git-lfs stands for."""
    size = re.search(rb"^size (\d+)", start, re.MULTILINE)
    return size[1].decode("ascii") if size is not None else "?"


# --- what begins how ---


def _begins(*signatures: bytes) -> Callable[[bytes], bool]:
    return lambda start: start.startswith(signatures)


def _has_form(container: tuple[bytes, ...], *forms: bytes) -> Callable[[bytes], bool]:
    """A container in chunks, such as RIFF, that says what it is of."""
    return lambda start: start[:4] in container and start[8:12] in forms


def _begins_as_text(*signatures: bytes) -> Callable[[bytes], bool]:
    return lambda start: start.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(signatures)


def _is_torch_archive(start: bytes) -> bool:
    """A zip of `torch.save`, whose first member is `data.pkl`."""
    return start.startswith(b"PK\x03\x04") and b"/data.pkl" in start[:256]


def _is_pickle(start: bytes) -> bool:
    return len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2:3] in _AFTER_PROTOCOL


_AFTER_PROTOCOL: Final = (b"\x8a", b"\x95", b"}", b"]", b"(", b"c", b"X", b"K", b"J", b"N")
"""The opcodes with which pickles go on; `torch.save` of old begins with a long (`\\x8a`)."""


def _is_safetensors(start: bytes) -> bool:
    length = int.from_bytes(start[:8], "little")
    return 2 <= length <= 1 << 32 and start[8:9] == b"{"


def _is_bzip2(start: bytes) -> bool:
    return start[:3] == b"BZh" and start[4:10] == b"1AY&SY"


def _is_tar(start: bytes) -> bool:
    return start[257:262] == b"ustar" and b"\0" in start[:257]


def _is_gguf(start: bytes) -> bool:
    return start[:4] == b"GGUF" and b"\0" in start[4:8]


def _is_mp3(start: bytes) -> bool:
    """It begins with a frame, or with a tag before it."""
    tagged = start[:3] == b"ID3" and start[3:4] in (b"\x02", b"\x03", b"\x04")
    return tagged or start[:2] in (b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2")


def _is_mp4(start: bytes) -> bool:
    return start[:1] == b"\0" and start[4:8] == b"ftyp"


def _is_unmarked_utf16(start: bytes) -> bool:
    """UTF-16 without a mark: of ASCII's letters every other byte is zero."""
    pairs = start[: len(start) // 2 * 2]
    if len(pairs) < 4 or b"\0" not in pairs:
        return False
    even, odd = pairs[::2], pairs[1::2]
    return (not any(odd) and 0 not in even) or (not any(even) and 0 not in odd)


def _is_sentencepiece(start: bytes) -> bool:
    """A SentencePiece model: a protobuf whose first field is a piece with a text, mostly `<unk>`."""
    return start[:1] == b"\n" and start[2:3] == b"\n" and b"\x15" in start[4:64] and b"\n" in start[8:128]


# --- what there is ---


def _encoded(encoding: str) -> FileKind:
    way_out = f"save it as UTF-8: iconv -f {encoding} -t UTF-8 {{file}}"
    return FileKind(f"{encoding} text", f"text in {encoding}", way_out)


def _packed(by: str, unpack: str) -> FileKind:
    return FileKind(f"{by} file", f"compressed with {by}", f"unpack it: {unpack} -c {{file}} > NEW")


def _table(name: str, words: str) -> FileKind:
    return FileKind(name, words, "", "write its rows as text, as its program exports them")


def _recording(name: str, words: str) -> FileKind:
    return FileKind(name, words, "")


def _pickle(words: str) -> FileKind:
    return FileKind("pickle", words, _CONVERT, "write its data as text")


_CONVERT: Final = "convert it to safetensors, or write the path of a file that is"
_AGAIN: Final = "download the file itself"
_LFS: Final = FileKind("git-lfs pointer", "a git-lfs pointer", "fetch the file itself: git lfs pull")
_ANNEX: Final = FileKind("git-annex pointer", "a git-annex pointer", "fetch the file itself: git annex get {file}")
_Signatures = tuple[tuple[Callable[[bytes], bool], FileKind], ...]

_RECORDINGS: Final[_Signatures] = (
    (_has_form((b"RIFF",), b"WAVE"), _recording("WAV file", "a WAV file")),
    (_has_form((b"RIFX",), b"WAVE"), _recording("RIFX file", "a WAV file whose bytes are the other way round")),
    (_has_form((b"RF64", b"BW64"), b"WAVE"), _recording("RF64 file", "an RF64 file, a WAV file of any length")),
    (_begins(b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb"), _recording("Wave64 file", "a Wave64 file")),
    (_has_form((b"FORM",), b"AIFF", b"AIFC"), _recording("AIFF file", "an AIFF file")),
    (_has_form((b"RIFF",), b"AVI "), _recording("AVI file", "an AVI file")),
    (_begins(b"fLaC\x00", b"fLaC\x80"), _recording("FLAC file", "a FLAC file")),
    (_begins(b"OggS\x00"), _recording("Ogg file", "an Ogg file")),
    (_is_mp3, _recording("MP3 file", "an MP3 file")),
    (_is_mp4, _recording("MP4 file", "an MP4 or M4A file")),
    (_begins(b"\x1a\x45\xdf\xa3"), _recording("Matroska file", "a Matroska or WebM file")),
    (_begins(b"caff\x00"), _recording("CAF file", "a CAF file")),
    (_begins(b".snd\x00"), _recording("Sun audio file", "a Sun/NeXT audio file")),
)
RECORDINGS: Final = frozenset(kind.name for _, kind in _RECORDINGS)
"""The names of kinds that hold sound, or pictures with sound."""

_SIGNATURES: Final[_Signatures] = (
    (_begins(b"version https://git-lfs", b"version https://hawser."), _LFS),
    (_begins(b"/annex/objects/", b"../.git/annex/objects/", b".git/annex/objects/"), _ANNEX),
    (_begins_as_text(b"<!doctype html", b"<html", b"<head"), FileKind("HTML page", "a web page", _AGAIN)),
    (_begins_as_text(b"<?xml", b"<error"), FileKind("XML page", "an XML page, as a server sends for an error", _AGAIN)),
    (_is_safetensors, FileKind("safetensors file", "a safetensors file", "")),
    # UTF-32 first: its mark begins with UTF-16's
    (_begins(codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), _encoded("UTF-32")),
    (_begins(codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), _encoded("UTF-16")),
    (_is_unmarked_utf16, _encoded("UTF-16")),
    (_is_torch_archive, _pickle("a pickle by torch.save")),
    (_is_pickle, _pickle("a pickle")),
    (_begins(b"PK\x03\x04"), FileKind("zip archive", "a zip archive", "unpack it: unzip {file}")),
    (_begins(b"PK\x05\x06"), FileKind("zip archive", "an empty zip archive", "")),
    (_begins(b"7z\xbc\xaf\x27\x1c"), FileKind("7z archive", "a 7z archive", "unpack it: 7z x {file}")),
    (_begins(b"Rar!\x1a\x07"), FileKind("rar archive", "a rar archive", "unpack it: unrar x {file}")),
    (_is_tar, FileKind("tar archive", "a tar archive", "unpack it: tar -xf {file}")),
    (_begins(b"\x1f\x8b\x08"), _packed("gzip", "gunzip")),
    (_is_bzip2, _packed("bzip2", "bunzip2")),
    (_begins(b"\xfd7zXZ\x00"), _packed("xz", "unxz")),
    (_begins(b"\x28\xb5\x2f\xfd"), _packed("zstd", "unzstd")),
    (_begins(b"\x04\x22\x4d\x18"), _packed("lz4", "unlz4")),
    (_is_gguf, FileKind("GGUF file", "a GGUF file of llama.cpp", "")),
    (_begins(b"\x89HDF\r\n\x1a\n"), _table("HDF5 file", "an HDF5 file")),
    (_begins(b"\x93NUMPY"), _table("NumPy array", "an array by NumPy")),
    (_begins(b"PAR1\x15"), _table("Parquet file", "a Parquet table")),
    (_begins(b"ARROW1\x00"), _table("Arrow file", "an Arrow table")),
    (_begins(b"SQLite format 3\x00"), _table("SQLite database", "an SQLite database")),
    (_begins(b"\xd0\xcf\x11\xe0"), _table("office document", "a document of an office program")),
    (_begins(b"%PDF-"), FileKind("PDF", "a PDF", "", "write its text")),
    (_begins(b"\x89PNG", b"\xff\xd8\xff"), FileKind("picture", "a picture", "")),
    *_RECORDINGS,
    (_begins(b"\x7fELF"), FileKind("program", "a program", "")),
    (_is_sentencepiece, FileKind("SentencePiece model", "a SentencePiece model", "")),
    (_begins_as_text(b"{", b"["), FileKind("JSON text", "JSON text", "")),
)
"""Tests in the order in which they are made, the sure ones first."""
