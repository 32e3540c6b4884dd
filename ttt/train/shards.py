"""The optimiser's state of several processes: each writes its own part, and any number of processes read it again.

PyTorch plans who writes what and who reads which pieces (`torch.distributed.checkpoint`). The files are safetensors,
one for each process, with our checksums, and hold in their headers where each piece belongs, as PyTorch's reader of
safetensors expects it. So no pickle is read, and a file that is damaged is known.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ttt.errors import EnvironmentProblem, TTTError
from ttt.files import read_header, write_tensors
from ttt.parallel.world import World
from ttt.words import first_line

_FILE = re.compile(r"optimizer-\d{5}-of-\d{5}\.safetensors")
_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""The keys under which PyTorch's reader finds where a piece belongs."""


def shard_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that hold parts of the optimiser's state; none if one file holds all of it."""
    return sorted(file for file in folder.iterdir() if _FILE.fullmatch(file.name))


def write_shards(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Write this process's part of tensors that may be split; all processes call it, each with the same names.

    Raises:
        EnvironmentProblem: in all of them, if one cannot write.
    """
    with _told_by_all():
        dcp.save(_with_places(tensors), storage_writer=_Writer(folder, world.rank, world.size))


def begin_shards(folder: Path, tensors: Mapping[str, Tensor], world: World) -> Callable[[float | None], bool]:
    """Begin to write this process's part of tensors, once they are copied to the CPU's memory; all processes call it.

    Returns:
        A function that waits so many seconds (None: to the end) and says whether all processes have written.

    Raises:
        EnvironmentProblem: from that function, in all processes, if one cannot write.
    """
    writer = _Writer(folder, world.rank, world.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls it experimental
        future = dcp.async_save(_with_places(tensors), storage_writer=writer, process_group=_beside_the_run())

    def is_written(seconds: float | None) -> bool:
        if seconds == 0:
            return bool(future.done())  # type: ignore[union-attr]
        with _told_by_all():
            future.result(seconds)  # type: ignore[union-attr]
        return True

    return is_written


_group: tuple[Any, Any] = (None, None)


def _beside_the_run() -> Any:
    """A process group of its own: what is planned in a thread must not mix with what the run sums."""
    global _group
    world = torch.distributed.group.WORLD
    if _group[0] is not world:
        _group = (world, torch.distributed.new_group(backend="gloo"))
    return _group[1]


def read_shards(
    folder: Path, room_for: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Read what `write_shards` wrote, each process what it needs of it.

    Args:
        folder: the checkpoint's.
        room_for: makes tensors to read into, split as this process has them, for whole shapes by name.

    Raises:
        EnvironmentProblem: a file is damaged, or the state is not whole.
    """
    wanted = room_for(_shapes_in(folder))
    state = _with_places(wanted)
    with _told_by_all(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other processes, where there are none
        alone = not torch.distributed.is_initialized()
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    return {name: state[name] if value.dim() else state[name].reshape(()) for name, value in wanted.items()}


def _with_places(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors in order of their names, those without a dimension with one: a piece has a place in its tensor."""
    return {name: value if value.dim() else value.reshape(1) for name, value in sorted(tensors.items())}


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The whole shape of each tensor of which there are pieces.

    Raises:
        EnvironmentProblem: a file is damaged, or a piece is missing.
    """
    shapes: dict[str, list[int]] = {}
    elements: dict[str, int] = {}
    for file in shard_files(folder):
        header = read_header(file)
        places = json.loads(header.metadata.get(_PLACES, "{}"))
        for name, facts in header.tensors.items():
            offsets = places.get(name, {}).get(_OFFSETS, [0] * len(facts.shape))
            ends = [offset + size for offset, size in zip(offsets, facts.shape, strict=True)]
            shapes[name] = [max(pair) for pair in zip(shapes.get(name, ends), ends, strict=True)]
            elements[name] = elements.get(name, 0) + math.prod(facts.shape)
    missing = [name for name, shape in shapes.items() if math.prod(shape) != elements[name]]
    if missing:
        raise EnvironmentProblem(f"{folder}: pieces of {missing[0]!r} are missing, or there twice")
    return {name: tuple(shape) if name.partition(".")[0] != "step" else () for name, shape in shapes.items()}


class _Writer(HuggingFaceStorageWriter):
    """Writes the pieces of a process into one file."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._file = folder / f"optimizer-{rank + 1:05d}-of-{size:05d}.safetensors"

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the pieces that the plan gives this process; no file if it gives none."""
        pieces: dict[str, Tensor] = {}
        places, written = {}, []
        for item in plan.items:
            assert item.tensor_data is not None
            name = item.index.fqn
            piece = planner.resolve_data(item)
            assert isinstance(piece, Tensor)
            pieces[name] = piece.detach()
            places[name] = {_OFFSETS: list(item.tensor_data.chunk.offsets)}
            size = pieces[name].numel() * pieces[name].element_size()
            written.append(WriteResult(item.index, size, self._file.name))
        if pieces:
            write_tensors(self._file, pieces, {"format": "ttt-optimizer", _PLACES: json.dumps(places, sort_keys=True)})
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done


@contextmanager
def _told_by_all() -> Iterator[None]:
    """Turn what PyTorch raises in all processes, if one cannot read or write, into that one's sentence."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        told = str(cause) if isinstance(cause, TTTError) else first_line(cause)
        raise EnvironmentProblem(f"rank {rank}: {told}") from error
