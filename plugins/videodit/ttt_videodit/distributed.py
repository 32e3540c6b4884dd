"""Recognises PyTorch's distributed checkpoints, as TTT-Video's trainer saves them, and refuses them with a way out.

Such a checkpoint is a folder of `.distcp` files with a `.metadata`, which is written last. The trainer saves them in
`DUMP/EXPERIMENT/checkpoint/step-N`; users may name any of these folders. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ttt.errors import EnvironmentProblem, UsageError
from ttt.printable import shell_word
from ttt.reading import unreadable
from ttt.words import first_few

METADATA: Final = ".metadata"
_SHARD: Final = ".distcp"
_LEVELS: Final = 3
_MOST_FOLDERS: Final = 2000
_NAMED: Final = re.compile(r"step-\d{1,15}")
_STEP: Final = re.compile(r".*?(\d{1,15})")


def refuse(source: Path) -> None:
    """Refuse a distributed checkpoint, or a folder with some in it, and say what to do with it.

    Raises:
        UsageError: the source is such a checkpoint, a part of one, or a folder that holds some and no tensors itself.
    """
    if source.suffix == _SHARD or source.name == METADATA:
        source = source.parent
    if not source.is_dir():
        return
    if (source / METADATA).exists():
        raise UsageError(f"{source}: is a distributed checkpoint of PyTorch; {_first(source)}")
    if _is_cut_short(source):
        raise UsageError(
            f"{source}: is a distributed checkpoint whose saving was cut short: it has no {METADATA}{_other(source)}"
        )
    try:
        if any(file.suffix in (".safetensors", ".pt", ".pth", ".bin") for file in source.iterdir()):
            return
    except OSError as error:
        raise EnvironmentProblem(f"{source}: cannot be read: {unreadable(error)}") from None
    whole, cut = _beneath(source)
    if whole or cut:
        raise UsageError(f"{source}: {_in_words(source, whole, cut)}")


def _first(folder: Path) -> str:
    name = f"{folder.name or folder.resolve().name or 'checkpoint'}.pt"
    return (
        "turn it into a file first, and import that: python -m torch.distributed.checkpoint.format_utils "
        f"dcp_to_torch {shell_word(folder)} {shell_word(name)}"
    )


def _in_words(source: Path, whole: Sequence[Path], cut: Sequence[Path]) -> str:
    """Say which checkpoints a folder holds, and which of them to take."""
    passed_over = f" ({cut[-1].name} was cut short: it has no {METADATA})" if cut else ""
    if not whole:
        return f"holds no whole checkpoint{passed_over}; name an earlier one, or another run"
    runs = {folder.parent: folder for folder in whole}  # the newest of each, which comes last
    if len(runs) > 1:
        newest = first_few(list(runs.values()))
        return f"holds the checkpoints of {len(runs)} runs; name one of them: {newest} are their newest"
    folder = whole[-1]
    count = (
        f"{len(whole)} distributed checkpoints of PyTorch, the newest"
        if len(whole) > 1
        else "the distributed checkpoint"
    )
    return f"holds {count} {folder.relative_to(source)}{passed_over}; {_first(folder)}"


def _other(folder: Path) -> str:
    """Name the newest whole checkpoint beside this one."""
    whole, _ = _beneath(folder.parent, levels=1)
    return f"; name another, such as {whole[-1]}" if whole else "; name another"


def _beneath(folder: Path, *, levels: int = _LEVELS) -> tuple[list[Path], list[Path]]:
    """The checkpoints beneath a folder, whole and cut short, run by run, the newest of each last."""
    found = list(_checkpoints(folder, levels))
    ordered = sorted(found, key=lambda path: (str(path.parent), _step(path), path.name))
    whole = [path for path in ordered if (path / METADATA).exists()]
    return whole, [path for path in ordered if path not in whole]


def _checkpoints(folder: Path, levels: int) -> Iterator[Path]:
    level = [folder]
    for _ in range(levels):
        level = [inner for outer in level for inner in _folders(outer)][:_MOST_FOLDERS]
        yield from (path for path in level if (path / METADATA).exists() or _is_cut_short(path))
        level = [path for path in level if not (path / METADATA).exists()]


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder; none in one that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _is_cut_short(folder: Path) -> bool:
    """Whether a folder has a checkpoint's parts without the file that is written last, or is empty with its name."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    nothing = not names and _NAMED.fullmatch(folder.name) is not None
    return METADATA not in names and (nothing or any(name.endswith(_SHARD) for name in names))


def _step(folder: Path) -> tuple[int, float]:
    """A sort key: the step in the folder's name, or its age if the name has none."""
    found = _STEP.fullmatch(folder.name)
    try:
        return (int(found[1]) if found else -1, folder.stat().st_mtime)
    except OSError:
        return (-1, 0.0)
