"""Safetensors files: written whole and with a checksum, read with every damage told in one sentence.

This module imports no torch until tensors are read or written: a safetensors header is JSON behind its length.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt import checksums
from ttt.amounts import show_bytes
from ttt.checksums import DAMAGED
from ttt.errors import EnvironmentProblem, UnreadableError
from ttt.files.atomic import sync, temporary_beside, writing
from ttt.files.kinds import kind_of_file
from ttt.files.places import replaced_file, require_space
from ttt.reading import open_file

if TYPE_CHECKING:
    from torch import Tensor

_MAX_HEADER = 16 << 20  # safetensors' own limit is 100 MB, which take gigabytes to parse; 20 GB of weights have 0.2 MB
_MAX_EXTENT, _MAX_RANK = 1 << 63, 64
_DTYPES = {
    **{f"torch.float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"torch.int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"torch.uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{"torch.bfloat16": "BF16", "torch.bool": "BOOL", "torch.complex64": "C64"},
    **{"torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2"},
}
_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


@dataclass(frozen=True)
class TensorFacts:
    """What a safetensors header says of one tensor."""

    dtype: str
    """In safetensors' words: `F32`, `BF16`, …"""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A safetensors header."""

    tensors: dict[str, TensorFacts]
    metadata: dict[str, str]
    spans: dict[str, tuple[int, int]]
    """Where each tensor's bytes are in the file: the first, and the one after the last."""

    @property
    def checksum(self) -> str | None:
        """The checksum of its content; None in files of other programs, and in old ones of this one."""
        return self.metadata.get(checksums.KEY)


def _of_its_own(tensor: Tensor) -> Tensor:
    """The tensor in contiguous CPU memory that no other shares, which safetensors asks for; a copy if need be."""
    tensor = tensor.detach().cpu().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its checksum, whole or not at all.

    Raises:
        EnvironmentProblem: the disk is full, or the place cannot be written; what was there is still there.
    """
    from safetensors.torch import save_file

    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    require_space(path, needed, what=path.name)
    target = replaced_file(path)
    own = {name: _of_its_own(tensor) for name, tensor in tensors.items()}
    sealed = {**metadata, checksums.KEY: _digest_of(own, metadata)}
    folder = temporary_beside(target)  # a folder, since safetensors has names of its own for what it is writing
    temporary = folder / target.name
    with writing(path):
        try:
            folder.mkdir()
            temporary.touch()
            mode = temporary.stat().st_mode  # as the user's umask has it; safetensors makes files private
            save_file(own, temporary, metadata=sealed)
            _sort_metadata(temporary)
            os.chmod(temporary, mode)
            sync(temporary)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata, which safetensors writes in another order each time, so that equal content is equal bytes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as long as it was, but for the spaces that fill it up
            file.seek(8)
            file.write(text.ljust(length))


def _digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The checksum of tensors in contiguous CPU memory, as a file will hold them."""
    import torch

    buffers = [memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) for tensor in tensors.values()]
    pieces = checksums.digests_in_memory(buffers)
    return checksums.tensors_digest(
        metadata,
        [
            (name, _DTYPES[str(tensor.dtype)], tuple(tensor.shape), digests)
            for (name, tensor), digests in zip(tensors.items(), pieces, strict=True)
        ],
    )


def read_header(path: Path, *, most_bytes: int = _MAX_HEADER) -> Header:
    """The header of a safetensors file, checked against the file's length; no tensor is read.

    Args:
        path: of the file.
        most_bytes: a longer header is refused unread.

    Raises:
        EnvironmentProblem: the file is missing, cut short, or not a safetensors file; one sentence says which.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8) or b""  # None if there is nothing to read yet, as of /proc/kmsg
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                _refuse_other_kind(path)
                raise EnvironmentProblem(f"{path}: no safetensors file, or cut short: {size} bytes hold no header")
            if length > most_bytes:
                raise EnvironmentProblem(
                    f"{path}: its header takes {show_bytes(length)}, and no file of its kind needs more than "
                    f"{show_bytes(most_bytes)}; it is damaged or made to do harm"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise EnvironmentProblem(f"{path}: no such file") from None
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header, end = _parse_header(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _refuse_other_kind(path)
        raise EnvironmentProblem(f"{path}: no safetensors file: its header does not parse") from None
    if end != size:
        raise EnvironmentProblem(f"{path}: damaged: its header promises {end} bytes, the file has {size}")
    return header


def _refuse_other_kind(path: Path) -> None:
    """Say what a file is, if its first bytes tell that it is no safetensors file.

    Raises:
        EnvironmentProblem: they do.
    """
    with contextlib.suppress(OSError):  # it was read a moment ago
        kind = kind_of_file(path)
        if kind is None or kind.name == "safetensors file":
            return
        raise EnvironmentProblem(f"{path}: no safetensors file, but {kind}")


def _parse_header(text: bytes) -> tuple[Header, int]:
    """The header and the length that it gives the file; any of the usual exceptions if it is not one."""
    content = json.loads(text.decode("utf-8"), object_pairs_hook=checksums.no_duplicates)
    metadata = content.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__")
    begin = 8 + len(text)
    tensors, spans = {}, {}
    for name, entry in content.items():
        first, last = (_whole(offset) for offset in entry["data_offsets"])
        facts = TensorFacts(_word(entry["dtype"]), tuple(_whole(extent) for extent in entry["shape"]))
        width = _BYTES.get(facts.dtype)
        if len(facts.shape) > _MAX_RANK or (width and last - first != width * math.prod(facts.shape)):
            raise ValueError(name)
        tensors[name], spans[name] = facts, (begin + first, begin + last)
    end = begin
    for first, last in sorted(spans.values()):  # as safetensors has it: no gap, no overlap
        if first != end or last < first:
            raise ValueError("data_offsets")
        end = last
    return Header(tensors, metadata, spans), end


@contextlib.contextmanager
def mapping_errors() -> Iterator[None]:
    """For safetensors' `safe_open`: PyTorch maps the file, and an error of the disk is an OSError here as elsewhere.

    Raises:
        OSError: the file cannot be opened or mapped, which PyTorch says as a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:  # others are about memory
        if not str(error).startswith("unable to "):
            raise
        raise OSError(str(error)) from error


def _whole(number: object) -> int:
    if type(number) is not int or not 0 <= number < _MAX_EXTENT:
        raise ValueError(number)
    return number


def _word(text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(text)
    return text


def verify_tensors(path: Path, header: Header | None = None) -> str | None:
    """Compare a safetensors file's content with the checksum in its header; needs no torch.

    Args:
        path: of the file.
        header: the file's, if it was read already.

    Returns:
        The checksum; None if the file has none, as files of other programs.

    Raises:
        EnvironmentProblem: the content is not what was written, or the file cannot be read.
    """
    header = header or read_header(path)
    written = header.checksum
    if written is None:
        if checksums.has_spoilt(header.metadata, checksums.KEY):
            raise EnvironmentProblem(f"{path}: damaged: the checksum in its header lost its name; {DAMAGED}")
        return None
    try:
        pieces = checksums.digests_in_file(path, [header.spans[name] for name in header.tensors])
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from error
    found = checksums.tensors_digest(
        header.metadata,
        [
            (name, facts.dtype, facts.shape, digests)
            for (name, facts), digests in zip(header.tensors.items(), pieces, strict=True)
        ],
    )
    if found != written:
        raise EnvironmentProblem(f"{path}: damaged: its checksum is not that of its content; {DAMAGED}")
    return written


def read_tensors(path: Path, *, device: Any = "cpu", verify: bool = True) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after its header was checked.

    Args:
        path: of the file.
        device: of the tensors.
        verify: compare the content with its checksum, if it has one.

    Raises:
        EnvironmentProblem: the file is missing, cut short, damaged, or not a safetensors file; one sentence says which.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    if verify:
        verify_tensors(path, header)
    try:
        with mapping_errors():
            return load_file(path, device=str(device))
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error}") from error
    except SafetensorError as error:
        raise EnvironmentProblem(f"{path}: cannot be read: {error}") from error
