"""What a file's first bytes say that it is, for messages about a file that is not what was meant.

A clone without `git lfs` leaves pointers of 130 bytes where weights should be; a download link that needs a login
saves a page; `torch.save` makes pickles. Whoever cannot read a file asks here what it is instead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from ttt.amounts import show_bytes
from ttt.reading import read_start, require_file

KIND_SHOWS: Final = 512
"""Bytes by which a file is known."""


class FileKind(NamedTuple):
    """What a file is."""

    name: str
    """In one word or two, as "pickle"; nothing else depends on the words below."""
    words: str
    """With its article, and its size where that tells something: "a git-lfs pointer, 134 bytes"."""
    way_out: str
    """What to do if a file of data or weights was meant; empty if there is no more to say than to name another."""

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.words, self.way_out)))


NEVER_MEANT: Final = frozenset({"empty file", "git-lfs pointer", "git-annex pointer", "HTML page", "XML page"})
"""The names of kinds that no program reads: a file of such a kind stands for another one."""

_AGAIN = "download the file itself again"
_UNPACK = "unpack it"
_CONVERT = "convert it to safetensors, or write the path of a file that is"


def kind_of_file(path: str | Path) -> FileKind | None:
    """What a file is by its first bytes; None if they do not say.

    Raises:
        OSError: it cannot be read, or is a folder, a FIFO, a socket or a device.
    """
    size = require_file(path).st_size
    return kind_of_content(read_start(path, KIND_SHOWS), size)


def kind_of_content(start: bytes, size: int) -> FileKind | None:
    """What a file of `size` bytes is that begins with `start`; None if that does not say."""
    if size == 0:
        return FileKind("empty file", "an empty file", "was its download or copy broken off? fetch it again")
    return next((_of_size(kind, size) for is_it, kind in _KINDS if is_it(start)), None)


def _of_size(kind: FileKind, size: int) -> FileKind:
    return kind._replace(words=f"{kind.words}, {show_bytes(size)}") if kind.name in _POINTERS else kind


# --- signatures ---

_POINTERS: Final = ("git-lfs pointer", "git-annex pointer")


def _begins(*signatures: bytes) -> Callable[[bytes], bool]:
    return lambda start: start.startswith(signatures)


def _text(start: bytes) -> bytes:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()


def _is_page(start: bytes) -> bool:
    return _text(start).startswith((b"<!doctype html", b"<html", b"<head"))


def _is_xml(start: bytes) -> bool:
    return _text(start).startswith((b"<?xml", b"<error"))


def _is_torch_archive(start: bytes) -> bool:
    """A zip of `torch.save`, whose first member is `data.pkl`."""
    return start.startswith(b"PK\x03\x04") and b"/data.pkl" in start[:256]


def _is_pickle(start: bytes) -> bool:
    return len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2:3] in _AFTER_PROTOCOL


_AFTER_PROTOCOL: Final = (b"\x8a", b"\x95", b"}", b"]", b"(", b"c", b"X", b"K", b"J", b"N")
"""The opcodes with which pickles go on; `torch.save` of old begins with a long (`\\x8a`)."""


def _is_tar(start: bytes) -> bool:
    return start[257:262] == b"ustar"


def _is_safetensors(start: bytes) -> bool:
    length = int.from_bytes(start[:8], "little")
    return 2 <= length <= 1 << 32 and start[8:9] == b"{"


def _is_sentencepiece(start: bytes) -> bool:
    """A SentencePiece model: a protobuf whose first field is a piece with a text, mostly `<unk>`."""
    return start[:1] == b"\n" and start[2:3] == b"\n" and b"\x15" in start[4:64] and b"\n" in start[8:128]


def _is_audio(start: bytes) -> bool:
    is_wave = start[:4] in (b"RIFF", b"RF64", b"RIFX", b"FORM") and start[8:12] in (b"WAVE", b"AIFF", b"AIFC")
    return is_wave or start[:4] in (b"fLaC", b"OggS") or start[:3] == b"ID3" or start[4:8] == b"ftyp"


def _is_json(start: bytes) -> bool:
    return _text(start)[:1] in (b"{", b"[")


_KINDS: Final[tuple[tuple[Callable[[bytes], bool], FileKind], ...]] = (
    (
        _begins(b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/"),
        FileKind("git-lfs pointer", "a git-lfs pointer", "fetch the file itself (git lfs pull)"),
    ),
    (
        _begins(b"/annex/objects/", b"../.git/annex/objects/", b".git/annex/objects/"),
        FileKind("git-annex pointer", "a git-annex pointer", "fetch the file itself (git annex get)"),
    ),
    (_is_page, FileKind("HTML page", "an HTML page, not the file that it links to", _AGAIN)),
    (_is_xml, FileKind("XML page", "an XML page, as a server sends for an error", _AGAIN)),
    (_is_torch_archive, FileKind("pickle", "a pickle by torch.save", _CONVERT)),
    (_begins(b"PK\x03\x04", b"PK\x05\x06"), FileKind("zip archive", "a zip archive", _UNPACK)),
    (_is_pickle, FileKind("pickle", "a pickle", _CONVERT)),
    (_begins(b"\x1f\x8b"), FileKind("gzip file", "compressed with gzip", f"{_UNPACK} (gunzip)")),
    (_begins(b"BZh"), FileKind("bzip2 file", "compressed with bzip2", f"{_UNPACK} (bunzip2)")),
    (_begins(b"\xfd7zXZ\x00"), FileKind("xz file", "compressed with xz", f"{_UNPACK} (unxz)")),
    (_begins(b"\x28\xb5\x2f\xfd"), FileKind("zstd file", "compressed with zstd", f"{_UNPACK} (unzstd)")),
    (_begins(b"7z\xbc\xaf\x27\x1c", b"Rar!"), FileKind("archive", "an archive", _UNPACK)),
    (_is_tar, FileKind("tar archive", "a tar archive", _UNPACK)),
    (_begins(b"GGUF"), FileKind("GGUF file", "a GGUF file of llama.cpp", "")),
    (_begins(b"\x89HDF"), FileKind("HDF5 file", "an HDF5 file", "")),
    (_begins(b"\x93NUMPY"), FileKind("NumPy array", "an array by NumPy", "")),
    (_begins(b"PAR1"), FileKind("Parquet file", "a Parquet file", "")),
    (_begins(b"%PDF", b"\x89PNG", b"\xff\xd8\xff"), FileKind("document", "a picture or a PDF", "")),
    (_is_audio, FileKind("recording", "a recording", "")),
    (_begins(b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"), FileKind("UTF-32 text", "UTF-32 text", "save it as UTF-8")),
    (_begins(b"\xff\xfe", b"\xfe\xff"), FileKind("UTF-16 text", "UTF-16 text", "save it as UTF-8")),
    (_is_safetensors, FileKind("safetensors file", "a safetensors file", "")),
    (_is_sentencepiece, FileKind("SentencePiece model", "a SentencePiece model", "")),
    (_is_json, FileKind("JSON text", "JSON text", "")),
)
"""Tests in the order in which they are made, the sure ones first."""
