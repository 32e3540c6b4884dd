"""Files that are written whole or not at all, and safetensors read with every damage told in one sentence.

This module imports no torch until tensors are read or written: a safetensors header is JSON behind its length.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ttt import checksums
from ttt.errors import EnvironmentProblem, UnreadableError, UsageError
from ttt.reading import MAX_JSON, open_file, other_kind, read_file

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".writing-"
"""Start of the names that unfinished files and folders have."""
DAMAGED = "restore it from a copy, or write it anew"
"""The way out where a file is not what was written."""

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
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
    """Where each tensor's bytes lie in the file: the first, and the one after the last."""

    @property
    def checksum(self) -> str | None:
        """Of its content, as it was written; None in files of others, and in those from before there were any."""
        return self.metadata.get(checksums.KEY)


def size_in_words(count: float) -> str:
    """A number of bytes as people say it, `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn what the system says while `what` is written into one sentence.

    Raises:
        EnvironmentProblem: the disk is full, or the place cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in _FULL or "(os error 28)" in str(error):
            raise EnvironmentProblem(
                f"{what}: no space left on the disk; nothing half written was left there. Free some space "
                f"({_free_in_words(what)}) or choose another place"
            ) from error
        cause = getattr(error, "strerror", None) or str(error)
        raise EnvironmentProblem(f"{what}: cannot be written: {cause}") from error


def _existing(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def free_bytes(path: Path) -> int | None:
    """Bytes that are free where `path` is or will be; None where the system does not say."""
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def _free_in_words(path: Path) -> str:
    free = free_bytes(path)
    return "how much is free is not known" if free is None else f"{size_in_words(free)} are free"


def require_space(path: Path, needed: int, *, what: str) -> None:
    """Refuse to begin what cannot end.

    Raises:
        EnvironmentProblem: less than `needed` bytes are free where `path` is; `what` names what needs them.
    """
    free = free_bytes(path)
    if free is not None and free < needed:
        raise EnvironmentProblem(
            f"{path}: {what} takes {size_in_words(needed)}, but only {size_in_words(free)} are free; free some "
            f"space or choose another place"
        )


def require_place(path: Path) -> None:
    """Refuse to begin what could not be written to `path` in the end; folders that are missing can be made.

    Raises:
        EnvironmentProblem: what should be its folder is a file, or may not be written.
    """
    above = next((folder for folder in path.absolute().parents if os.path.lexists(folder)), None)
    if above is None:
        return
    if not above.is_dir():
        raise EnvironmentProblem(f"{path}: cannot be written: {above} is no folder; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"{path}: cannot be written: no permission to write in {above}; name another place")


def temporary_beside(path: Path) -> Path:
    """A name in the same folder, and so on the same disk, that nobody else uses and that says what it is."""
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")


def sync(path: Path) -> None:
    """Have the system put a file or folder on the disk, so that a rename after it cannot overtake it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(handle)


def lock(file: IO[Any] | int, path: Path) -> None:
    """Hold an open file of a run, or the handle of its folder, until it is closed.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{path.parent}: another process is training in this run_dir; wait for it, or name another"
        ) from None
    except OSError:  # a file system without locks
        return


def replaced_file(path: Path) -> Path:
    """What writing to `path` replaces: the file itself, one that is not there yet, or the one that a link leads to.

    Raises:
        EnvironmentProblem: something else is there, a device, say, whose node a rename would destroy.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise EnvironmentProblem(f"{path}: cannot be written: it is a link that leads to itself; name another place")
    kind = other_kind(target)
    if kind is not None:
        raise EnvironmentProblem(f"{path}: cannot be written: it is {kind}, not a file; name another place")
    return target


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; where a link is, the file that it leads to.

    Raises:
        EnvironmentProblem: the disk is full, or the place cannot be written; what was there is still there.
    """
    target = replaced_file(path)
    temporary = temporary_beside(target)
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; see `write_bytes`."""
    write_bytes(path, text.encode())


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
    """Have the same content be the same bytes: safetensors writes metadata in another order each time."""
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
        EnvironmentProblem: the file is missing, cut short, or no safetensors file; one sentence says which.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8) or b""  # None where the kernel has nothing to say as yet, as /proc/kmsg
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise EnvironmentProblem(f"{path}: no safetensors file, or cut short: {size} bytes hold no header")
            if length > most_bytes:
                raise EnvironmentProblem(
                    f"{path}: its header takes {size_in_words(length)}, and no file of its kind needs more than "
                    f"{size_in_words(most_bytes)}; it is damaged or made to do harm"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise EnvironmentProblem(f"{path}: no such file") from None
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header, end = _parse_header(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EnvironmentProblem(f"{path}: no safetensors file: its header does not parse") from None
    if end != size:
        raise EnvironmentProblem(f"{path}: damaged: its header promises {end} bytes, the file has {size}")
    return header


def _parse_header(text: bytes) -> tuple[Header, int]:
    """The header and the length that it gives the file; any of the usual exceptions where it is none."""
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
    """Around safetensors' `safe_open`: PyTorch maps the file, and a disk that refuses is an OSError here as elsewhere.

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
        header: of it, where it was read already.

    Returns:
        The checksum; None where the file has none, as those of others do.

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
        device: where the tensors go.
        verify: compare the content with its checksum, where it has one.

    Raises:
        EnvironmentProblem: the file is missing, cut short, damaged, or no safetensors file; one sentence says which.
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


def require_digests(folder: Path, digests: Mapping[str, str], *, way_out: str) -> None:
    """Compare files whose SHA-256 is known, such as a package's own, with it.

    Args:
        folder: where they are.
        digests: by file name, in hexadecimal.
        way_out: ends the message.

    Raises:
        EnvironmentProblem: a file is missing, or is not the one that is meant; the message names it.
    """
    for name, digest in digests.items():
        try:
            found = checksums.file_digest(folder / name)
        except OSError as error:
            raise EnvironmentProblem(
                f"{folder / name}: cannot be read: {error.strerror or error}; {way_out}"
            ) from error
        if found != digest:
            raise EnvironmentProblem(f"{folder / name}: damaged: its SHA-256 is another; {way_out}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, whole or not at all; see `write_bytes`."""
    write_text(path, json.dumps(checksums.sealed(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: of the file.
        sealed: compare it with its checksum, where it has one, and leave that out.

    Raises:
        EnvironmentProblem: the file is missing, holds no JSON object, or not the one that was written.
    """
    try:
        text = read_file(path, limit=MAX_JSON).decode("utf-8")
        content = json.loads(text, object_pairs_hook=checksums.no_duplicates if sealed else None)
    except FileNotFoundError:
        raise EnvironmentProblem(f"{path}: no such file") from None
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise EnvironmentProblem(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError):  # no UTF-8, a number of too many digits, a key that stands twice
        raise EnvironmentProblem(f"{path}: not JSON") from None
    if not isinstance(content, dict):
        raise EnvironmentProblem(f"{path}: not a JSON object")
    if sealed:
        if checksums.holds(content) is False:
            raise EnvironmentProblem(f"{path}: damaged: its checksum is not that of its content; {DAMAGED}")
        content.pop(checksums.KEY, None)
    return content
