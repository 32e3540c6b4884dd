"""Checksums of what this project writes and reads again: a byte that changed is told, and never loaded.

Each kind of file carries its own, over its content and not over its layout:

- safetensors: `sha256` in the header's metadata, over the rest of the metadata and every tensor's name, type, shape
  and bytes. A tensor is hashed in pieces of 16 MiB, several at once, and the digests are hashed in order.
- a JSON object: `sha256` among its keys, over the rest in sorted order.
- a line of JSON: `crc32` as its last key, over the bytes before it.

What was written before there were checksums has none and is read as it is. A changed byte in the checksum's own name
leaves a key that differs from it in one letter, and is told too.

`docs/files.md` says which file holds what. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

KEY: Final = "sha256"
"""Key of the checksum, in a safetensors header's metadata and in a JSON object."""
LINE_KEY: Final = "crc32"
"""Key of the checksum of a line of JSON."""
PIECE: Final = 1 << 24
"""Bytes that are hashed by themselves, 16 MiB; part of the format."""
DAMAGED: Final = "restore it from a copy, or write it anew"
"""The way out if a file is not what was written."""

_BUFFER: Final = 1 << 20
_WORTH_THREADS: Final = 4 * PIECE
_MOST_THREADS: Final = 8
_SEALED_LINE: Final = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)
_SPOILT_LINE: Final = re.compile(rb'"[0-9a-f]{8}"\}$')  # its key may have become anything, `\rc32` for one
_SEALED_PART: Final = re.compile(rb'\{"[^\n]*?, "crc32": "[0-9a-f]{8}"\}')


# --- tensors ---


def tensors_digest(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, Sequence[int], Sequence[str]]]
) -> str:
    """The checksum of a safetensors file's content, whatever its order in the file.

    Args:
        metadata: of the header; its checksum is left out.
        tensors: name, type in safetensors' words, shape, and the digests of its pieces in order.
    """
    rest = {key: value for key, value in metadata.items() if key != KEY}
    entries = sorted([name, dtype, list(shape), list(pieces)] for name, dtype, shape, pieces in tensors)
    return _of_text(_canonical([rest, entries]))


def digests_in_memory(buffers: Sequence[memoryview]) -> list[list[str]]:
    """For each buffer of bytes, the digests of its pieces."""
    pieces = [[buffer[start : start + PIECE] for start in range(0, len(buffer), PIECE)] for buffer in buffers]
    return _nested(pieces, lambda piece: hashlib.sha256(piece).hexdigest(), sum(map(len, buffers)))


def digests_in_file(path: Path, spans: Sequence[tuple[int, int]]) -> list[list[str]]:
    """For each span of a file, from its first byte to the one after its last, the digests of its pieces.

    Raises:
        OSError: the file cannot be read, or is shorter.
    """
    pieces = [[(at, min(at + PIECE, stop)) for at in range(start, stop, PIECE)] for start, stop in spans]

    def digest(piece: tuple[int, int]) -> str:
        return _of_span(path, *piece)

    return _nested(pieces, digest, sum(stop - start for start, stop in spans))


def _of_span(path: Path, start: int, stop: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_BUFFER, stop - start)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            count = file.readinto(buffer[: stop - start])
            if not count:
                raise OSError(f"ends after {start} bytes")
            digest.update(buffer[:count])
            start += count
    return digest.hexdigest()


def _nested(pieces: Sequence[Sequence[Any]], digest: Callable[[Any], str], size: int) -> list[list[str]]:
    """The digest of each piece, in the same order; in several threads if that pays; hashing lets them run."""
    flat = [piece for several in pieces for piece in several]
    if size < _WORTH_THREADS:
        found = iter([digest(piece) for piece in flat])
    else:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            found = iter(list(pool.map(digest, flat)))
    return [[next(found) for _ in several] for several in pieces]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    return _of_span(path, 0, path.stat().st_size)


# --- JSON ---


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum."""
    return {**content, KEY: _of_object(content)}


def holds(content: Mapping[str, Any]) -> bool | None:
    """Whether a JSON object fits its checksum; None if it has none."""
    if KEY in content:
        return bool(content[KEY] == _of_object(content))
    return False if has_spoilt(content, KEY) else None


def has_spoilt(keys: Iterable[str], key: str) -> bool:
    """Whether there is a key that differs from the checksum's in one letter, as a changed byte leaves it."""
    return any(len(k) == len(key) and sum(a != b for a, b in zip(k, key, strict=True)) == 1 for k in keys)


class DuplicateKeyError(ValueError):
    """A key stands twice in one JSON object."""

    def __init__(self, key: str) -> None:
        super().__init__("a key stands twice")
        self.key = key


def no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads` as `object_pairs_hook`.

    Raises:
        DuplicateKeyError: a key stands twice; `json` alone would take the last.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DuplicateKeyError(key)
        found[key] = value
    return found


def _of_object(content: Mapping[str, Any]) -> str:
    return _of_text(_canonical({key: value for key, value in content.items() if key != KEY}))


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- lines of JSON ---


def sealed_line(content: Mapping[str, Any]) -> str:
    """A JSON object that is not empty as a line, its checksum last, without a newline."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)[:-1]
    return f'{text}, "{LINE_KEY}": "{zlib.crc32(_encoded(text)):08x}"}}'


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def parse_line(line: bytes) -> dict[str, Any]:
    """The object in a line, its checksum compared and left out; a line that has none is taken as it is.

    Raises:
        ValueError: it is not a JSON object, or not what was written; the message says which.
    """
    line = line.strip()
    match = _SEALED_LINE.fullmatch(line)
    if match is not None and zlib.crc32(match[1]) != int(match[2], 16):
        raise ValueError("damaged: its checksum is not that of its content")
    try:
        content = json.loads(line.decode("utf-8", "surrogatepass"), object_pairs_hook=no_duplicates)
    except UnicodeDecodeError:
        raise ValueError("not JSON: no UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    written = content.pop(LINE_KEY, None)
    if match is None and (written is not None or has_spoilt(content, LINE_KEY) or _SPOILT_LINE.search(line)):
        raise ValueError("damaged: its checksum does not read as one")
    return content


def whole_parts(line: bytes) -> list[tuple[dict[str, Any], bytes]]:
    """Whole objects, with their bytes, in a line that is not one: the newline between them was lost."""
    found = []
    for part in _SEALED_PART.findall(line):
        with contextlib.suppress(ValueError):
            found.append((parse_line(part), part))
    return found
