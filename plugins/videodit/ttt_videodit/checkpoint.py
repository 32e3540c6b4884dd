"""Reads the tensors of another program's checkpoint, after checking that its files are safe to open.

`look_at` needs no torch, so it refuses at once what is not a checkpoint: something other than a file, a zip whose
content is larger than the file, a pickle that `torch.save` would not write. `torch.load` reads the rest with
`weights_only`, which runs no code of a file.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, cast

from ttt.amounts import show_bytes
from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import mapping_errors, read_header, read_json
from ttt.reading import open_file, other_kind, unreadable
from ttt.words import first_few, first_line
from ttt_videodit import distributed

if TYPE_CHECKING:
    from torch import Tensor

MODEL_KEYS: Final = ("model", "state_dict", "module")
"""Keys of the model in checkpoints that hold more than a model."""
TOLD: Final = 5
"""How many names a message lists."""

_MOST_WRAPS: Final = 8
_MAX_DIRECTORY: Final = 4 << 20  # bytes of a zip's directory, about 60 for each tensor
_MAX_PICKLE: Final = 16 << 20  # bytes; the names and shapes of a thousand tensors take 0.2 MB
_MOST_STEPS: Final = 2_000_000  # of a pickle; a thousand tensors take some 40,000
_MOST_LEVELS: Final = 100
_MOST_PARTS: Final = 1_000_000  # of a tuple, counted as often as it is reached: Python hashes a key so
_ZIP: Final = b"PK\x03\x04"
_PICKLES_OF_THE_OLDER_FORMAT: Final = 5


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, its tensors still on the disk."""

    tensors: Mapping[str, Tensor]
    """The tensors by their names in the file."""
    others: Sequence[str]
    """Names of other content, for instance the optimiser's state."""


def open_checkpoint(source: Path) -> Checkpoint:
    """The tensors of a checkpoint, mapped from the disk.

    Raises:
        UsageError: it is not a checkpoint that can be imported.
        EnvironmentProblem: a file is missing or damaged.
    """
    files = look_at(source)
    if _safetensors(files):
        return Checkpoint(_read_safetensors(files), ())
    return _read_torch(files[0])


def look_at(source: Path) -> list[Path]:
    """The files that hold the tensors, checked to be safe to open; imports no torch.

    Raises:
        UsageError: it is not a checkpoint that can be imported.
        EnvironmentProblem: a file is missing or damaged.
    """
    if not source.exists():
        raise EnvironmentProblem(f"{source}: no such file or folder")
    distributed.refuse(source)
    files = _files(source)
    for file in files:
        if _safetensors(files):
            read_header(file)
        else:
            _look_at_torch(file)
    return files


def _safetensors(files: Sequence[Path]) -> bool:
    return all(file.suffix == ".safetensors" for file in files)


# --- which files ---


def _files(source: Path) -> list[Path]:
    """The files that hold the tensors."""
    if source.name.endswith(".safetensors.index.json"):
        return _indexed(source)
    if not source.is_dir():
        return [source]
    indices = sorted(source.glob("*.safetensors.index.json"))
    if indices:
        return _indexed(indices[0])
    safetensors = sorted(source.glob("*.safetensors"))
    if safetensors:
        return safetensors
    pickled = sorted(file for file in source.iterdir() if file.suffix in (".pt", ".pth", ".bin"))
    if len(pickled) != 1:
        found = f"{len(pickled)} .pt files" if pickled else "no .safetensors and no .pt file"
        raise UsageError(
            f"{source}: holds {found}; name the checkpoint's file, or its folder step-N if the trainer saved one"
        )
    return pickled


def _indexed(index: Path) -> list[Path]:
    """The files that an index of shards names."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, Mapping) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise EnvironmentProblem(f"{index}: no index of safetensors files: it has no weight_map")
    names = sorted(set(shards.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise EnvironmentProblem(f"{index}: names a file in another folder: {outside[0]}")
    return [index.parent / name for name in names]


# --- whether they are safe to open ---


def _look_at_torch(file: Path) -> None:
    """Check that `torch.save` could have written a file, and that its content is not larger than the file.

    Raises:
        UsageError: the file is something else.
        EnvironmentProblem: the file is damaged, or cannot be read.
    """
    kind = other_kind(file)
    if kind is not None:
        raise UsageError(f"{file}: is {kind}, not a file; name a checkpoint's file")
    try:
        with open_file(file) as opened:
            start = opened.read(len(_ZIP))
            opened.seek(0)
            if start == _ZIP:
                _look_at_zip(opened, file)
            elif start[:1] == pickle.PROTO:
                for _ in range(_PICKLES_OF_THE_OLDER_FORMAT):
                    _look_at_pickle(opened, file)
            else:
                raise EnvironmentProblem(
                    f"{file}: no file of torch.save, or a damaged one; one of safetensors has a name that ends so"
                )
    except OSError as error:
        raise EnvironmentProblem(f"{file}: cannot be read: {unreadable(error)}") from error
    except (ValueError, IndexError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise EnvironmentProblem(f"{file}: no file of torch.save, or a damaged one ({first_line(error)})") from None


def _look_at_zip(opened: IO[bytes], file: Path) -> None:
    size = _directory_size(opened)
    if size > _MAX_DIRECTORY:
        raise UsageError(f"{file}: its zip has a directory of {size:,} bytes, more than torch.save writes")
    with zipfile.ZipFile(opened) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise UsageError(f"{file}: two entries of its zip have the same name, as torch.save never writes them")
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise UsageError(
                f"{file}: {first_few(packed, TOLD)} of its zip {'is' if len(packed) == 1 else 'are'} compressed, as "
                f"torch.save never does; load and save it again"
            )
        if sum(entry.file_size for entry in entries) > os.fstat(opened.fileno()).st_size:
            raise UsageError(f"{file}: its zip promises more than the file holds")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as content:
                    _look_at_pickle(content, file)


def _directory_size(opened: IO[bytes]) -> int:
    """The size in bytes of a zip's directory, which `zipfile` reads at once."""
    length = opened.seek(0, os.SEEK_END)
    begin = max(0, length - (1 << 16) - 98)
    opened.seek(begin)
    end = opened.read()
    at = end.rfind(b"PK\x05\x06")
    size = int.from_bytes(end[at + 12 : at + 16], "little") if at >= 0 else 0
    locator = end[at - 20 : at] if at >= 20 else b""
    if locator.startswith(b"PK\x06\x07"):
        opened.seek(min(int.from_bytes(locator[8:16], "little"), length))
        size = max(size if size < 0xFFFFFFFF else 0, int.from_bytes(opened.read(56)[40:48], "little"))
    opened.seek(0)
    return size


class _Limited:
    """A file from which a pickle can be read up to a number of bytes."""

    def __init__(self, opened: IO[bytes]) -> None:
        self._opened = opened
        self._left = _MAX_PICKLE

    def read(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"a pickle of more than {show_bytes(_MAX_PICKLE)}")
        self._left -= count
        return self._opened.read(count)

    def readline(self) -> bytes:
        line = self._opened.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise ValueError(f"a pickle of more than {show_bytes(_MAX_PICKLE)}")
        return line


def _look_at_pickle(opened: IO[bytes], file: Path) -> None:
    """Step through a pickle without loading it, and refuse one that would take far more time than its length."""
    stack: list[tuple[int, int]] = []  # of each object on the unpickler's stack, its parts and its levels
    marks: list[int] = []
    memo: dict[int, tuple[int, int]] = {}
    for step, (code, argument, _) in enumerate(pickletools.genops(cast("IO[bytes]", _Limited(opened)))):
        if step == _MOST_STEPS:
            raise UsageError(f"{file}: its pickle has more than {_MOST_STEPS:,} steps; save the state_dict alone")
        if code.name == "MARK":
            marks.append(len(stack))
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[cast(int, argument)])
        elif code.name == "DUP":
            stack.append(stack[-1])
        else:
            taken = _taken(code, stack, marks)
            parts = min(_MOST_PARTS + 1, 1 + sum(part for part, _ in taken))
            levels = 1 + max((level for _, level in taken), default=0)
            if levels > _MOST_LEVELS or (code.name.startswith("TUPLE") and parts > _MOST_PARTS):
                raise UsageError(f"{file}: its pickle is nested as no checkpoint is; save the state_dict alone")
            stack += [(parts, levels)] * len(code.stack_after)


def _taken(code: pickletools.OpcodeInfo, stack: list[tuple[int, int]], marks: list[int]) -> list[tuple[int, int]]:
    """The objects that an opcode takes from the stack."""
    before = list(code.stack_before)
    taken = []
    if pickletools.markobject in before:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(stack.pop())
    return taken


# --- reading ---


def _read_safetensors(files: Sequence[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in files:
        names = read_header(file).tensors
        twice = sorted(tensors.keys() & names.keys())
        if twice:
            raise UsageError(f"{file}: holds {first_few(twice, TOLD)}, which another file of the checkpoint holds too")
        try:
            with mapping_errors(), safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise EnvironmentProblem(f"{file}: cannot be read: {error}") from error
    return tensors


def _read_torch(file: Path) -> Checkpoint:
    """Read the tensors of a `torch.save` file; `weights_only` runs no code of a file."""
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:  # whose advice is weights_only=False, which would run code of the file
        raise UsageError(
            f"{file}: holds more than tensors, or is not a file of torch.save; no code in it was run. Save the model's "
            f"state_dict alone, best as .safetensors"
        ) from None
    except Exception as error:  # torch.load raises errors of many kinds for a damaged file
        raise EnvironmentProblem(
            f"{file}: no file of torch.save, or a damaged one ({type(error).__name__}: {first_line(error)})"
        ) from None
    content, others = _state_dict(content, file)
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise UsageError(f"{file}: {name} is a tensor whose numbers are not all in the file; save it contiguous")
    return Checkpoint(tensors, [*others, *(_named(name) for name in content if name not in tensors)])


def _state_dict(content: Any, file: Path) -> tuple[Mapping[Any, Any], list[str]]:
    """The mapping with the tensors, and the names of other content."""
    from torch import Tensor

    if not isinstance(content, Mapping):
        raise UsageError(f"{file}: holds no state_dict")
    others: list[str] = []
    for _ in range(_MOST_WRAPS):  # a mapping can hold itself
        if any(isinstance(value, Tensor) for value in content.values()):
            return content, others
        key = next((key for key in MODEL_KEYS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        others += [_named(other) for other in content if other != key]
        content = content[key]
    raise UsageError(f"{file}: holds no state_dict, and none under {', '.join(MODEL_KEYS)}")


def _named(key: object) -> str:
    return key if isinstance(key, str) else f"an entry under a {type(key).__name__}"
