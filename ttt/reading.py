"""Reading files of other programs: their kind and size are checked before they are read.

A name in a config can lead to a FIFO, on which a plain `open` waits for ever, to a device that never ends, or to ten
gigabytes where a page is expected. What is refused here is an `OSError` whose `strerror` says why, as `open` itself
raises for a file that is not there; so whoever reads has one thing to catch. This module imports nothing heavy.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ttt.amounts import show_bytes
from ttt.foreign import ENOUGH, FileKind, foreign, foreign_list, foreign_page, not_utf8

MAX_JSON = 64 << 20
"""Bytes of a JSON file: settings, a transcript, an index of shards."""
MAX_LINE = 1 << 20
"""Bytes of a line of a `.jsonl` file."""
MAX_TEXT = 10_000
"""Characters of a prompt, a caption or a word; encoders read some hundred tokens."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_STREAM = re.compile(r"/dev/(?:stdin|fd/\d+)|/proc/self/fd/\d+")
_OPENING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)
_PIECE = 1 << 16


def kind_in_words(mode: int) -> str | None:
    """What has this `st_mode`, "a FIFO"; None for a file."""
    return None if stat.S_ISREG(mode) else next((words for is_it, words in _KINDS if is_it(mode)), "no file")


def other_kind(path: str | Path) -> str | None:
    """What is under a name, links followed, if it is not a file: "a FIFO"; None for a file, and for nothing."""
    try:
        return kind_in_words(os.stat(path).st_mode)
    except (OSError, ValueError):  # not there, or a name that no file can have
        return None


def require_file(path: str | Path) -> os.stat_result:
    """What the system says of a file, links followed.

    Raises:
        OSError: it is not there, or is a folder, a FIFO, a socket or a device.
    """
    try:
        facts = os.stat(path)
    except ValueError:  # a NUL or half a character
        raise OSError(errno.EINVAL, "no file can have such a name") from None
    _refuse(facts, path)
    return facts


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading. Refuse what could keep the caller waiting, such as a FIFO.

    Raises:
        OSError: it is not there, not to be read, or is a folder, a FIFO, a socket or a device.
    """
    require_file(path)  # first, because opening is enough to make some devices act
    handle = os.open(path, _OPENING | getattr(os, "O_BINARY", 0))
    try:
        _refuse(os.fstat(handle), path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_file(path: str | Path, *, limit: int) -> bytes:
    """All of a file.

    Raises:
        OSError: as for `open_file`; or it is larger than `limit` bytes, or than memory.
    """
    with open_file(path) as file:
        promised = os.fstat(file.fileno()).st_size
        content = _read(file, limit + 1) if promised <= limit else b""
    if max(promised, len(content)) > limit:
        raise OSError(errno.EFBIG, f"larger than {show_bytes(limit)}", str(path))
    return content


def read_text(path: str | Path, *, limit: int, prose: bool = False) -> str:
    """All of a file of text in UTF-8, without a byte order mark.

    Args:
        path: the file.
        limit: the most bytes that are read.
        prose: whether it may be any text, a web page too.

    Raises:
        OSError: as for `read_file`; or it is something else, such as compressed or in another encoding: `strerror` says
            what it is, and how it becomes text.
    """
    return as_text(read_file(path, limit=limit), path, prose=prose)


def as_text(content: bytes, path: str | Path, *, prose: bool = False) -> str:
    """The text that is all of a file's content.

    Raises:
        OSError: it is no text in UTF-8; `path` is the name in the message.
    """
    start = content[:ENOUGH]
    _refuse_foreign(foreign(start, path) or (None if prose else foreign_page(start, path)), path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, not_utf8(content, error, path), str(path)) from None


def read_start(path: str | Path, count: int) -> bytes:
    """The first `count` bytes of a file, or all of a shorter one; of a stream that this process was handed, likewise.

    Such a stream, `/dev/stdin` or the `/dev/fd/63` that a shell's `<(…)` becomes, can be read once.

    Raises:
        OSError: as for `open_file`.
    """
    if is_stream(path):
        with open(path, "rb") as stream:
            return _read(stream, count)
    with open_file(path) as file:
        return _read(file, count)


def is_stream(path: str | Path) -> bool:
    """Whether a name is that of a stream that this process was handed: `/dev/stdin`, `/dev/fd/63`."""
    return _STREAM.fullmatch(str(path)) is not None and other_kind(path) not in ("a folder", None)


def read_lines(path: str | Path, *, limit: int = MAX_LINE, most: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Lines of a file that are not blank, with their numbers, none of them kept.

    Args:
        path: the file.
        limit: bytes of the longest line.
        most: bytes to read; a line that they cut is left out.

    Raises:
        OSError: as for `open_file`; a line is longer; or the file has no lines of JSON, but is something else that
            `ttt.foreign` knows, such as compressed.
    """
    left = most
    with open_file(path) as file:
        start = _read_ahead(file)
        _refuse_foreign(foreign_list(start, path), path)
        number = 0
        while left is None or left > 0:
            line = file.readline(limit + 2 if left is None else min(limit + 2, left + 1))
            if not line or (left is not None and len(line) > left):
                return
            number += 1
            if left is not None:
                left -= len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if len(line.rstrip(b"\r\n")) > limit:
                raise OSError(errno.EFBIG, f"line {number} is longer than {show_bytes(limit)}", str(path))
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def unreadable(error: OSError) -> str:
    """Why a file cannot be read, in the words of the system or of this module."""
    return error.strerror or str(error)


def wrong_with(text: str, *, most: int = MAX_TEXT) -> str | None:
    """Why an encoder cannot read a text, "is empty"; None if it can."""
    if not text.strip():
        return "is empty"
    if len(text) > most:
        return f"has {len(text):,} characters; {most:,} are the most that is read"
    half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)
    if half is not None:
        return f"holds U+{ord(half):04X}, half a character; write it as UTF-8"
    if "\0" in text:
        return "holds U+0000, which is not a letter"
    return None


def _read_ahead(file: BinaryIO) -> bytes:
    """The first bytes of a file, which are still to be read."""
    start = _read(file, ENOUGH)
    file.seek(0)
    return start


def _refuse_foreign(kind: FileKind | None, path: str | Path) -> None:
    if kind is not None:
        raise OSError(errno.EILSEQ, kind.instead_of_text, str(path))


def _refuse(facts: os.stat_result, path: str | Path) -> None:
    kind = kind_in_words(facts.st_mode)
    if kind == "a folder":
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if kind is not None:
        raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))


def _read(file: BinaryIO, count: int) -> bytes:
    """At most `count` bytes, piece by piece, so that memory is used for content alone."""
    pieces = []
    try:
        while count > 0 and (piece := file.read(min(count, _PIECE))):
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)
    except MemoryError:
        pieces.clear()
        raise OSError(errno.ENOMEM, "larger than the memory that is left") from None
