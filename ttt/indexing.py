"""An index of recordings: a `.jsonl` file with a line for each sound file in a folder, which training reads.

The order depends on names alone. The file is written whole or not at all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from rich.console import Console

from ttt.errors import EnvironmentProblem
from ttt.files import write_text
from ttt.plugins import Indexing
from ttt.printable import say
from ttt.progress import Steps
from ttt.words import duration_in_words


def write_index(backbone: Indexing, folder: Path, out: Path, *, leave_out: bool, console: Console) -> None:
    """Measure every recording in a folder, and write their index.

    Args:
        backbone: knows which files are recordings, and how long they are.
        folder: with recordings at any depth.
        out: the `.jsonl` file; paths in it are relative to its folder.
        leave_out: leave out recordings that cannot be read, and name them; else they are an error.
        console: where to report.

    Raises:
        EnvironmentProblem: there is no such folder, it holds no recording, or one cannot be read; nothing was written.
    """
    if folder.is_file():
        raise EnvironmentProblem(f"{folder}: a file, not a folder; name the folder that holds it")
    if not folder.is_dir():
        raise EnvironmentProblem(f"{folder}: no such folder")
    files = backbone.find_recordings(folder)
    if not files:
        raise EnvironmentProblem(f"{folder}: holds no recording")
    lines, problems, seconds = [], [], 0.0
    with Steps(console, "measured", total=len(files), tenths=len(files) >= 1000, rated="file") as steps:
        for file in steps.counted(files):
            try:
                lasts = backbone.measure_recording(file)
            except EnvironmentProblem as problem:
                problems.append(str(problem))
                continue
            seconds += lasts
            lines.append(_line(file, out.parent, lasts))
    if problems and not (leave_out and lines):
        error = EnvironmentProblem.about(problems, "recordings cannot be read", where=str(folder))
        way_out = "mend or remove them" if leave_out else "mend or remove them, or leave them out with --leave-out"
        raise EnvironmentProblem(error.message.removesuffix(":"), details=error.details, fix=way_out)
    write_text(out, "".join(lines))
    for told in problems:
        say(console, f"left out: {told}")
    count = f"{len(lines):,} recording" + "s" * (len(lines) != 1)
    say(console, f"wrote {out}: {count}, {duration_in_words(seconds)}")


def _line(file: Path, folder: Path, seconds: float) -> str:
    try:
        path = Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # another drive of Windows
        path = str(file.absolute())
    is_text = not any("\ud800" <= letter <= "\udfff" for letter in path)  # bytes of a name that are not UTF-8
    return json.dumps({"path": path, "duration": round(seconds, 3)}, ensure_ascii=not is_text) + "\n"
