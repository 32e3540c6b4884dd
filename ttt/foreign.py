"""What a file is that should be text and is something else, by its first bytes, and how it becomes text.

Data come as they were downloaded or exported: compressed, in UTF-16, as a table, as the pointer that git-lfs leaves in
place of a file, as the web page of an error. What is recognised here is named, wherever a text is read, instead of
being refused as a letter that does not fit. This module imports nothing of the rest, and nothing heavy.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import NamedTuple

ENOUGH = 512
"""Bytes from the start of a file by which it is recognised."""


class Foreign(NamedTuple):
    """Something other than text in UTF-8."""

    words: str
    """What it is, as "a zip archive"."""
    way_out: str
    """What to do, as "unpack it"; `{file}` in it stands for the file's name."""

    def told(self, file: object) -> str:
        """The end of a sentence about the file: `it is a zip archive; unpack it: unzip a.zip`."""
        return f"it is {self.words}; {self.way_out.replace('{file}', str(file))}"


_CONVERT = "save it as UTF-8: iconv -f {encoding} -t UTF-8 {file}"
_TABLE = "write its rows as text, as its program exports them"
_NAME_THE_LIST = "name the list of the files instead"
_MARKS: tuple[tuple[bytes, str], ...] = (  # UTF-32 first: its mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_BY_START: tuple[tuple[bytes, Foreign], ...] = (
    (b"\x1f\x8b\x08", Foreign("compressed with gzip", "unpack it: gunzip {file}")),
    (b"\x28\xb5\x2f\xfd", Foreign("compressed with zstd", "unpack it: unzstd {file}")),
    (b"\xfd7zXZ\x00", Foreign("compressed with xz", "unpack it: unxz {file}")),
    (b"\x04\x22\x4d\x18", Foreign("compressed with lz4", "unpack it: unlz4 {file}")),
    (b"PK\x03\x04", Foreign("a zip archive", "unpack it: unzip {file}")),
    (b"PK\x05\x06", Foreign("an empty zip archive", "name another file")),
    (b"7z\xbc\xaf\x27\x1c", Foreign("a 7z archive", "unpack it: 7z x {file}")),
    (b"Rar!\x1a\x07", Foreign("a rar archive", "unpack it: unrar x {file}")),
    (b"PAR1\x15", Foreign("a Parquet table", _TABLE)),
    (b"ARROW1\x00", Foreign("an Arrow table", _TABLE)),
    (b"SQLite format 3\x00", Foreign("an SQLite database", _TABLE)),
    (b"\x89HDF\r\n\x1a\n", Foreign("an HDF5 file", _TABLE)),
    (b"\x93NUMPY", Foreign("a NumPy array", _TABLE)),
    (b"\xd0\xcf\x11\xe0", Foreign("a document of an office program", _TABLE)),
    (b"%PDF-", Foreign("a PDF", "write its text")),
    (b"\x89PNG", Foreign("a picture", "name another file")),
    (b"\xff\xd8\xff", Foreign("a picture", "name another file")),
    (b"fLaC\x00", Foreign("a FLAC file", _NAME_THE_LIST)),
    (b"OggS\x00", Foreign("an Ogg file", _NAME_THE_LIST)),
    (b"\xff\xfb", Foreign("an MP3 file", _NAME_THE_LIST)),
    (b"\x1a\x45\xdf\xa3", Foreign("a Matroska or WebM file", _NAME_THE_LIST)),
    (b"\x7fELF", Foreign("a program", "name another file")),
)
"""What begins so is no text: it is told by bytes that no text has, or that no text begins with."""
_BY_FORM: Mapping[bytes, Foreign] = {
    b"WAVE": Foreign("a WAV file", _NAME_THE_LIST),
    b"AVI ": Foreign("an AVI file", _NAME_THE_LIST),
    b"AIFF": Foreign("an AIFF file", _NAME_THE_LIST),
    b"AIFC": Foreign("an AIFF file", _NAME_THE_LIST),
}
"""By the form of a container in chunks, such as RIFF."""
_POINTER = b"version https://git-lfs"


def foreign(start: bytes) -> Foreign | None:
    """What begins so, if it is not text in UTF-8; None if it may be.

    Args:
        start: the first bytes of a file, `ENOUGH` of them, or all.
    """
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), None) or _unmarked(start)
    if encoding is not None:
        return Foreign(f"text in {encoding}", _CONVERT.replace("{encoding}", encoding))
    return _by_bytes(start) or _pointer(start)


def foreign_page(start: bytes) -> Foreign | None:
    """What begins so, if it is a web page, as a server sends in place of a file."""
    page = start.removeprefix(codecs.BOM_UTF8).lstrip()[:15].lower()
    if page.startswith((b"<!doctype html", b"<html")):
        return Foreign("a web page", "download the file itself")
    return None


def foreign_list(start: bytes) -> Foreign | None:
    """What begins so, if it is text but has no JSON object on each line; None if it may have.

    Args:
        start: as for `foreign`.
    """
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    first, _, _ = text.partition(b"\n")
    first = first.strip()
    if text.startswith(b"[") and _is_array(text):
        return Foreign("one JSON array", "write an object on each line: jq -c '.[]' {file}")
    if first == b"{" and b"\n" in text:
        return Foreign("JSON laid out over several lines", "write an object on each line: jq -c . {file}")
    if _is_header(first):
        return Foreign("a table of separated values", "write each row as a JSON object on a line of its own")
    return None


def not_utf8(content: bytes, error: UnicodeDecodeError, file: object) -> str:
    """Why content cannot be decoded, as the end of a sentence with the way out."""
    line = content.count(b"\n", 0, error.start) + 1
    return (
        f"it is not text in UTF-8: byte {error.start + 1:,}, in line {line:,}, is 0x{content[error.start]:02x}; save "
        f"it as UTF-8, if it is Latin-1: iconv -f LATIN1 -t UTF-8 {file}"
    )


def _by_bytes(start: bytes) -> Foreign | None:
    form = _BY_FORM.get(start[8:12]) if start[:4] in (b"RIFF", b"RF64", b"FORM") else None
    if form is not None:
        return form
    if start[4:8] == b"ftyp":
        return Foreign("an MP4 or M4A file", _NAME_THE_LIST)
    if start[:3] == b"ID3" and start[3:4] in (b"\x02", b"\x03", b"\x04"):
        return Foreign("an MP3 file", _NAME_THE_LIST)
    if start[:3] == b"BZh" and start[4:10] == b"1AY&SY":
        return Foreign("compressed with bzip2", "unpack it: bunzip2 {file}")
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Foreign("a pickle", "write its data as text")
    if start[8:9] == b"{" and b"\0" in start[:8]:
        return Foreign("a safetensors file", "name another file")
    return next((kind for letters, kind in _BY_START if start.startswith(letters)), None)


def _pointer(start: bytes) -> Foreign | None:
    """The few lines that stand in place of a file which git-lfs did not fetch."""
    if not start.startswith(_POINTER):
        return None
    size = next((line[5:].decode("ascii", "replace") for line in start.split(b"\n") if line[:5] == b"size "), "?")
    return Foreign(f"a git-lfs pointer to a file of {size} bytes", "fetch the file itself: git lfs pull")


def _unmarked(start: bytes) -> str | None:
    """UTF-16 without a mark: of ASCII's letters every other byte is zero."""
    pairs = start[: len(start) // 2 * 2]
    if len(pairs) < 4 or b"\0" not in pairs:
        return None
    even, odd = pairs[::2], pairs[1::2]
    told = (not any(odd) and 0 not in even) or (not any(even) and 0 not in odd)
    return "UTF-16" if told else None


def _is_array(text: bytes) -> bool:
    """Whether a text that begins with a bracket is an array of objects, or one that goes on in the next line."""
    if text[1:].lstrip()[:1] == b"{":
        return True
    first, newline, _ = text.partition(b"\n")
    return bool(newline) and first.strip() == b"["


def _is_header(first: bytes) -> bool:
    """Whether a first line names the columns of a table."""
    cells = [cell.strip().strip(b'"') for cell in first.translate(bytes.maketrans(b"\t;", b",,")).split(b",")]
    return len(cells) > 1 and all(cell.replace(b"_", b"").isalpha() for cell in cells)
