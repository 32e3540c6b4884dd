"""One run as its files tell it: its state, its config, its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttt.checkpoint_folder import TRAINER_STATE, step_folders
from ttt.config.source import parse_source
from ttt.errors import EnvironmentProblem
from ttt.files import is_locked, read_header, read_json
from ttt.reading import read_file, unreadable
from ttt.runs.evaluations import Evaluated, evaluated
from ttt.runs.finding import LeftOut
from ttt.runs.metrics_ends import Ends, newest_lines, number, over_layers
from ttt.train.claim import METRICS, SUMMARY
from ttt.train.failure import FAILURE
from ttt.train.stored_config import CONFIG, StoredConfig

FINISHED, RUNNING, FAILED, INTERRUPTED = STATES = ("finished", "running", "failed", "interrupted")
"""A run whose process was killed counts as interrupted: nothing tells it from one that somebody stopped."""

_MAX_CONFIG = 1 << 20
_TOO_LARGE = 1 << 63  # for a count; a float may not hold it
_OF_EVALUATION = ("eval_split", "eval_windows", "eval_loss", "eval_loss_ema", "eval_loss_gates_closed")
_NO_METRICS = {
    *("step", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "layers", "eval_windows_available"),
    *_OF_EVALUATION,
}
"""Keys of a line that are not the backbone's own metrics."""
_ADAPTER, _TRAINED_BACKBONE = "adapter_model.safetensors", "backbone_model.safetensors"


@dataclass(frozen=True)
class Run:
    """A run."""

    name: str
    """Its path below the folder in which runs were looked for."""
    path: Path
    state: str
    """One of `STATES`."""
    config: Mapping[str, Any]
    """Plain data as it was written, by a ttt of whatever version, for a backbone that may not be installed."""
    numbers: Mapping[str, Any]
    """By name, in the order of the table; None is a number that is not finite. What is not known is missing."""
    results: Evaluated = field(default_factory=Evaluated)
    """What `ttt eval` found."""
    notes: tuple[str, ...] = ()
    """What went wrong with it, or could not be read."""

    @property
    def metrics(self) -> Path:
        """Its `metrics.jsonl`."""
        return self.path / METRICS


@dataclass(frozen=True)
class _Files:
    """What the files of a run hold, each empty if it is not there or cannot be read."""

    summary: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    """The record of the newest checkpoint."""
    failure: Mapping[str, Any]
    ends: Ends
    folder: Path | None
    """The newest checkpoint's."""


def read_run(path: Path, name: str) -> Run | LeftOut:
    """What the files in a folder tell of a run; `LeftOut` if it is none, or none that can be understood."""
    notes: list[str] = []
    try:
        files = _read(path, notes)
        config = _config(path, files, notes)
    except OSError as error:
        return LeftOut(path, f"cannot be read: {unreadable(error)}")
    if isinstance(config, str):
        return LeftOut(path, config)
    has_begun = files.summary or files.checkpoint or files.failure or files.ends.last is not None
    if not has_begun and not _is_held(path):
        return LeftOut(path, _why_empty(notes))
    state = _state(path, files)
    results, problems = evaluated(path)
    notes += [*problems, *_failure_in_words(files)]
    return Run(name, path, state, config, _numbers(files, config, results), results, tuple(notes))


def _read(path: Path, notes: list[str]) -> _Files:
    summary = _json(path / SUMMARY, notes)
    folder: Path | None = None
    checkpoint: Mapping[str, Any] = {}
    for folder in reversed(step_folders(path)):
        checkpoint = _json(folder / TRAINER_STATE, notes)
        if checkpoint:
            break
    failure = _json(path / FAILURE, notes)
    return _Files(summary, checkpoint, failure, _ends(path, summary, notes), folder if checkpoint else None)


def _ends(path: Path, summary: Mapping[str, Any], notes: list[str]) -> Ends:
    """The newest lines of the metrics. The summary of a finished run holds all of them."""
    if summary:
        return Ends()
    try:
        return newest_lines(path / METRICS)
    except FileNotFoundError:
        return Ends()
    except OSError as error:
        notes.append(f"{path / METRICS}: cannot be read: {unreadable(error)}")
        return Ends()


def _json(file: Path, notes: list[str]) -> Mapping[str, Any]:
    """A file of the run's; empty, with a note, if it is damaged."""
    if not file.exists():
        return {}
    try:
        return read_json(file, sealed=True)
    except EnvironmentProblem as problem:
        notes.append(str(problem))
        return {}


def _config(path: Path, files: _Files, notes: list[str]) -> Mapping[str, Any] | str:
    """The run's config, or why there is none.

    The checkpoint has a record of it. The file is newer if the run goes on with another `max_steps`, but anybody may
    have changed it.
    """
    recorded = files.checkpoint.get("config")
    if _is_config(recorded):
        assert isinstance(recorded, Mapping)
        if files.summary or StoredConfig(path).is_as_written() is not True:
            return recorded
    written = _written(path / CONFIG)
    if not isinstance(written, str):
        return written
    if _is_config(recorded):
        assert isinstance(recorded, Mapping)
        notes.append(f"{path / CONFIG}: {written}; its checkpoint's record is taken instead")
        return recorded
    return f"{CONFIG}: {written}"


def _written(file: Path) -> Mapping[str, Any] | str:
    """The config in a file, or what is wrong with it."""
    try:
        source = parse_source(read_file(file, limit=_MAX_CONFIG), file=CONFIG)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return f"cannot be read: {unreadable(error)}"
    if not source.complete:
        return f"not a config of ttt: {source.findings[0].message}"
    return source.data if _is_config(source.data) else "not a config of ttt: it names no backbone"


def _is_config(content: Any) -> bool:
    backbone = content.get("backbone") if isinstance(content, Mapping) else None
    return isinstance(backbone, Mapping) and isinstance(backbone.get("name"), str)


def _why_empty(notes: list[str]) -> str:
    return notes[0] if notes else "it has no step, no checkpoint and no summary: a run that did not begin"


def _is_held(path: Path) -> bool:
    """Whether a process trains there: it holds the folder, and its metrics while it makes steps."""
    return is_locked(path) or is_locked(path / METRICS)


def _state(path: Path, files: _Files) -> str:
    if files.summary:  # it is taken away when a run goes on
        return FINISHED
    if _is_held(path):
        return RUNNING
    evaluated = files.ends.evaluated
    ended = evaluated is not None and evaluated == files.ends.last and number(evaluated.get("eval_loss")) is None
    return FAILED if files.failure or ended else INTERRUPTED


def _failure_in_words(files: _Files) -> list[str]:
    error = files.failure.get("error")
    return [] if not error or files.summary else [f"failed after step {files.failure.get('step')}: {error}"]


def _numbers(files: _Files, config: Mapping[str, Any], results: Evaluated) -> dict[str, Any]:
    """The numbers of a run, from its summary or from the newest of its other files."""
    record, summary = files.checkpoint, files.summary
    last = files.ends.last or _mapping(record.get("line"))
    measured, evaluation = (summary, summary) if summary else (files.ends.measured or {}, files.ends.evaluated or {})
    totals = summary or record
    found: dict[str, Any] = {
        "steps": summary.get("steps", last.get("step", record.get("step"))),
        "max_steps": _mapping(config.get("train")).get("max_steps"),
        "loss": (summary or last).get("loss", _ABSENT),
        **{key: value for key, value in _mapping(record.get("line") if summary else last).items() if _is_metric(key)},
        **{key: evaluation[key] for key in _OF_EVALUATION if key in evaluation},
        "eval_gain": _gain(evaluation),
        **over_layers(measured.get("layers")),
        **{key: value for key, value in evaluation.items() if "/" in key},
        "evaluated": results.of or _ABSENT,
        **results.numbers,
        "learned_parameters": _learned(files),
        "tokens": totals.get("tokens"),
        "seconds": totals.get("seconds"),
        "tokens_per_second": _rate(totals, last),
        "peak_memory_bytes": summary.get("peak_memory_bytes", last.get("peak_memory_bytes")),
        "device": summary.get("device"),
    }
    plain = {
        "loss",
        "eval_loss",
        "eval_loss_ema",
        "eval_loss_gates_closed",
    }  # None in a file is a number that is not finite
    return {
        key: _plain(value)
        for key, value in found.items()
        if value is not _ABSENT and (value is not None or key in plain or key in results.numbers or "/" in key)
    }


_ABSENT = object()


def _is_metric(key: str) -> bool:
    return key not in _NO_METRICS and "/" not in key


def _plain(value: Any) -> Any:
    """A number, a text or None: whatever else a file may hold, as text."""
    fits = isinstance(value, (float, str)) or (isinstance(value, int) and abs(value) < _TOO_LARGE)
    return value if value is None or fits else str(value)


def _gain(line: Mapping[str, Any]) -> float | None:
    """By which part of the loss with gates closed TTT lowers it; None if there is no such number."""
    loss, closed = number(line.get("eval_loss")), number(line.get("eval_loss_gates_closed"))
    if loss is None or not closed or not math.isfinite(loss / closed):
        return None
    return (closed - loss) / closed


def _rate(totals: Mapping[str, Any], last: Mapping[str, Any]) -> float | None:
    tokens, seconds = number(totals.get("tokens")), number(totals.get("seconds"))
    if tokens is None or not seconds:
        return number(last.get("tokens_per_second"))
    return tokens / seconds


def _learned(files: _Files) -> int | None:
    """How many numbers learned; of a run before they were counted, those in its checkpoint's files."""
    counted = files.summary.get("learned_parameters", files.checkpoint.get("learned_parameters"))
    if counted is not None or files.folder is None:
        return counted if isinstance(counted, int) else None
    total = 0
    for name in (_ADAPTER, _TRAINED_BACKBONE):
        if (files.folder / name).is_file():
            try:
                header = read_header(files.folder / name)
            except EnvironmentProblem:
                return None
            total += sum(math.prod(facts.shape) for facts in header.tensors.values())
    return total or None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
