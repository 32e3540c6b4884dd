"""`ttt check --data` for Moshi: every recording decoded to its end, every transcript and all codes read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console

from ttt.errors import EnvironmentProblem
from ttt.progress import Steps
from ttt_moshi.codes import CodeFile
from ttt_moshi.options import FRAME_RATE, MoshiData
from ttt_moshi.sources import SpeechSource, sources_of_split
from ttt_moshi.stored import StoredCodes


def read_data(data: MoshiData, *, split: str, console: Console, codes: StoredCodes | None = None) -> Sequence[str]:
    """Read the data of a split.

    Args:
        data: the config's section.
        codes: of the recordings, if the run reads some.
        split: `train` or `eval`.
        console: where to tell how far it is.

    Returns:
        What is odd, a sentence for each kind of it.

    Raises:
        EnvironmentProblem: recordings that cannot be used, of all sources.
    """
    notes: list[str] = []
    problems: list[str] = []
    sources = sources_of_split(data, split)
    for source in sources:
        try:
            problems += _read(source, notes, console, codes, data.duration_sec)
        except EnvironmentProblem as problem:
            problems += problem.details or (problem.message.removeprefix(f"{source.field}: "),)
    if problems:
        key = ".".join(sources[0].field.split(".")[:2])  # of all of them, as data.train_data
        raise EnvironmentProblem.about(problems, "recordings cannot be used", where=key)
    return notes


def _read(
    source: SpeechSource, notes: list[str], console: Console, codes: StoredCodes | None, duration_sec: float
) -> list[str]:
    """Read a source; returns what is wrong with the codes of its recordings."""
    total = max(source.count(), 1)
    with Steps(console, f"{source.path}: decoding", total=total, tenths=True, rated="recording") as steps:

        def counted(things: Iterable[Any]) -> Iterator[Any]:
            return steps.counted(things)

        found = source.recordings(frame_sec=1 / FRAME_RATE, notes=notes, wholly=True, counted=counted)
    if codes is None:
        return []
    settings = codes.settings(source, duration_sec)
    files = ((each, CodeFile.of(codes.folder, each.audio, settings)) for each in found)
    return [f"{each.place}: {each.audio}: {wrong}" for each, file in files if (wrong := file.damage()) is not None]
