"""Long material in files: books of chapters in Libri-Light's layout, or texts. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ttt.errors import EnvironmentProblem
from ttt.reading import other_kind

AUDIO = (".flac", ".wav", ".ogg", ".mp3")
TEXT = (".txt",)


@dataclass(frozen=True)
class Source:
    """A book, or a text."""

    key: str
    """Its path below the data's folder: names of files repeat between books."""
    owner: str
    """Whose it is, `speaker` of `speaker/book`; of a text, itself."""
    files: tuple[Path, ...]
    """Its chapters in order."""


def books(data: Path) -> list[Source]:
    """The books of a folder in Libri-Light's layout, `speaker/book/*.flac`, in the order of their keys.

    Chapters are in the order of the numbers in their names: `chapter_2` comes before `chapter_10`.

    Raises:
        EnvironmentProblem: there is no such folder, or it holds no books.
    """
    require_folder(data)
    found: dict[Path, list[Path]] = {}
    for file in data.glob("*/*/*"):
        if file.suffix.lower() in AUDIO and file.is_file():
            found.setdefault(file.parent, []).append(file)
    if not found:
        raise EnvironmentProblem(f"{data}: holds no books; they lie there as speaker/book/chapter.flac")
    return [
        Source(f"{folder.parent.name}/{folder.name}", folder.parent.name, tuple(sorted(files, key=_in_order)))
        for folder, files in sorted(found.items())
    ]


def texts(data: Path) -> list[Source]:
    """The `.txt` files of a folder at any depth, each by itself, in the order of their keys.

    Raises:
        EnvironmentProblem: there is no such folder, or it holds none.
    """
    require_folder(data)
    files = sorted(file for file in data.rglob("*") if file.suffix.lower() in TEXT and file.is_file())
    if not files:
        raise EnvironmentProblem(f"{data}: holds no .txt file")
    return [Source(str(key), str(key), (file,)) for file in files for key in [file.relative_to(data)]]


def require_folder(data: Path) -> None:
    """Refuse what is no folder.

    Raises:
        EnvironmentProblem: it is missing, or something else; the message says from where a relative path is read.
    """
    if other_kind(data) == "a folder":
        return
    where = "" if data.is_absolute() else f" in {Path.cwd()}, from where relative paths are read"
    home = "; ~ is not expanded" if str(data).startswith("~") else ""
    told = f"is {other_kind(data) or 'a file'}, not a folder" if is_there(data) else f"there is no such folder{where}"
    raise EnvironmentProblem(f"{data}: {told}{home}", fix="write the folder of the task's data")


def is_there(path: Path) -> bool:
    """Whether something has that name."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _in_order(file: Path) -> list[tuple[int, int, str]]:
    """Numbers in a name by their value, all else by its letters."""
    parts = re.findall(r"\d+|\D+", file.name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
