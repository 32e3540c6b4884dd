"""The data of a moshi-finetune config: weighted sources, speech without transcripts, the order they are read in."""

from __future__ import annotations

from typing import Any

from ttt.plugins import Import
from ttt.plugins.imported import number
from ttt_moshi.importing_values import figure, flag, is_on

_LIBRILIGHT = "librilight"
"""If a source's text has this word, moshi-finetune's fork reads all of its sources as sound without transcripts."""
_AUDIO_NOTE = (
    "{} in its path: there the fork read mono speech, in both channels; here it is Moshi's voice, the user silent"
)


def move_data(moving: Import) -> None:
    """Move where the data are, what they are, in which order they are read, and where the run goes."""
    parsed = {key: _sources(moving.get(f"data.{key}")) for key in ("train_data", "eval_data")}
    audio = {key: _is_audio(moving.get(f"data.{key}")) for key, sources in parsed.items() if sources}
    one_format = len(set(audio.values())) < 2
    for key, sources in parsed.items():
        _move_sources(moving, key, sources, form="audio" if not one_format and audio.get(key) else None)
    if one_format and any(audio.values()):
        moving.add("data.format", "audio", _AUDIO_NOTE.format(_LIBRILIGHT))
    empty = moving.get("run_dir") == ""
    moving.move("run_dir", "run_dir", value=None if empty else moving.get("run_dir"), note=_EMPTY if empty else "")
    _move_order(moving)


_EMPTY = "an empty text is null"
_ORDERS = {"train_data": "by weight: in turn here, at random there", "eval_data": "read one after another, as there"}


def _sources(written: Any) -> list[tuple[str, float]]:
    """`a.jsonl:3,b.jsonl` as paths and weights; empty if it is not such a text."""
    if not isinstance(written, str):
        return []
    sources = []
    for part in filter(None, (part.strip() for part in written.split(","))):
        path, _, weight = part.rpartition(":")
        value = number(figure(weight)) if path else None
        sources.append((part, 1.0) if value is None else (path.strip(), float(value)))
    return sources


def _is_audio(written: Any) -> bool:
    return isinstance(written, str) and _LIBRILIGHT in written.casefold()


def _move_sources(moving: Import, key: str, sources: list[tuple[str, float]], *, form: str | None) -> None:
    old, written = f"data.{key}", moving.get(f"data.{key}")
    if written is None or (isinstance(written, str) and not sources):
        moving.move(old, old, value=None, note=_EMPTY if written is not None else "")
    elif not isinstance(written, str):
        moving.move(old, old)
    elif form is None and len(sources) == 1:
        path, weight = sources[0]
        moving.move(
            old, old, value=path, note=_told_of(path, f"the weight {weight:g} of a source alone" * (path != written))
        )
    else:
        entries = [
            _entry(path, weight if len(sources) > 1 and key == "train_data" else None, form) for path, weight in sources
        ]
        told = _AUDIO_NOTE.format(_LIBRILIGHT) if form else _ORDERS[key]
        moving.move(old, old, value=entries, note=_told_of(written, told))


def _entry(path: str, weight: float | None, form: str | None) -> dict[str, Any]:
    """One source, with what is said of it."""
    entry = {"path": path, "weight": weight, "format": form}
    return {key: value for key, value in entry.items() if value is not None}


def _told_of(path: str, note: str) -> str:
    """The note, and what is said of a path that a shell would expand."""
    unexpanded = [sign for sign in ("$", "~") if sign in path]
    told = f"{unexpanded[0]} is expanded neither there nor here: write the path out" if unexpanded else ""
    return "; ".join(filter(None, (note, told)))


def _move_order(moving: Import) -> None:
    """`shuffle` draws windows; with carried fast weights windows of a file stay in order, and files are drawn."""
    shuffled = is_on(moving, "data.shuffle", default=False)
    if shuffled and _carries(moving):
        note = "true, with ttt.persistent_states: files in random order, the windows of a file in order"
        moving.move("data.shuffle", "data.shuffle", value="files", note=note)
    else:
        moving.move("data.shuffle", "data.shuffle", value=flag(moving.get("data.shuffle")))
    if not moving.has("data.shuffle"):
        moving.add("data.shuffle", False, "moshi-finetune's default, which the file left to it")


def _carries(moving: Import) -> bool:
    """Whether the fork's TTT layers carry their fast weights from window to window; its default does."""
    section = moving.source.data.get("ttt")
    has_ttt = isinstance(section, dict) and section and is_on(moving, "ttt.enable", default=True)
    return bool(has_ttt) and is_on(moving, "ttt.persistent_states", default=True)
