"""`ttt check --data` for Moshi: every recording of every source decoded to its end, every transcript read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from ttt.config.sources import sources_of
from ttt.errors import EnvironmentProblem
from ttt.jsonl import Line
from ttt.progress import Steps
from ttt_moshi import demo
from ttt_moshi.options import FRAME_RATE, MoshiData
from ttt_moshi.recordings import index_lines, read_recordings


def read_data(data: MoshiData, *, split: str, console: Console) -> Sequence[str]:
    """Read the data of a split.

    Args:
        data: the config's section.
        split: `train` or `eval`.
        console: where to tell how far it is.

    Returns:
        What is odd, a sentence for each kind of it.

    Raises:
        EnvironmentProblem: recordings that cannot be used, of all sources.
    """
    key = "eval_data" if split == "eval" and data.eval_data is not None else "train_data"
    sources = sources_of(data, key) or (data.source(str(demo.EVAL_DATA if split == "eval" else demo.TRAIN_DATA)),)
    notes: list[str] = []
    problems: list[str] = []
    for source in sources:
        try:
            _read(Path(source.path), f"data.{key}", notes, console)
        except EnvironmentProblem as problem:
            problems += problem.details or (problem.message.removeprefix(f"data.{key}: "),)
    if problems:
        raise EnvironmentProblem.about(problems, "recordings cannot be used", where=f"data.{key}")
    return notes


def _read(source: Path, field: str, notes: list[str], console: Console) -> None:
    count = sum(1 for _ in index_lines(source, field))
    with Steps(console, f"{source}: decoding", total=max(count, 1), tenths=True, rated="recording") as steps:

        def counted(lines: Iterable[Line]) -> Iterator[Line]:
            return steps.counted(lines)

        read_recordings(source, frame_sec=1 / FRAME_RATE, field=field, notes=notes, wholly=True, counted=counted)
