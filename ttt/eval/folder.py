"""The folder of an evaluation: what it was made from, the rows of each task, and the results drawn from them.

    eval.json           what the numbers are of: model, adapter, settings; and the options of each task
    samples/TASK.jsonl  a row for each item
    positions/TASK/     arrays by position, `ITEM.ARM.npz`
    TASK_made/          what a task makes, as samples
    results.json, summary.md, pictures

A row is written when its whole batch is measured, and with it is on the disk. So a command that was killed goes on with
the batches that are missing. Nothing that was made from something else is used: `eval.json` is compared before, and the
files of each row by their hashes. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ttt.checksums import file_digest, parse_line, sealed_line
from ttt.dotted import dotted
from ttt.errors import EnvironmentProblem, UsageError
from ttt.eval.items import Item, Row, made_by
from ttt.eval.tasks import Arrays
from ttt.files import lock, read_json, sync, write_bytes, write_json, writing
from ttt.printable import json_text, shortened
from ttt.reading import read_file, unreadable
from ttt.words import first_entries

RECORD = "eval.json"
RESULTS = "results.json"
SUMMARY = "summary.md"
SAMPLES = "samples"
POSITIONS = "positions"
_MOST_ROWS = 1 << 31  # bytes of a file of rows
_NAMED = 3
_WAY_OUT = "name another --out, or measure anew with --overwrite"


class EvalFolder:
    """The folder of an evaluation.

    Args:
        path: the folder; it is made if need be.
        made_from: what every number in it is of.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        self.path = path
        self._made_from = dict(made_from)
        self._tasks: dict[str, Any] = {}
        self._wrote: list[str] = []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and lock it.

        Raises:
            UsageError: another process is evaluating into it, or it holds something else than an evaluation.
            EnvironmentProblem: it cannot be made.
        """
        if not (self.path / RECORD).exists():
            self._require_empty()
        with writing(self.path / SAMPLES):
            (self.path / SAMPLES).mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / SAMPLES, os.O_RDONLY)
        try:
            try:
                lock(handle, self.path / SAMPLES)
            except UsageError:
                raise UsageError(
                    f"{self.path}: another process is evaluating into it; wait for it, or name another --out"
                ) from None
            yield
        finally:
            os.close(handle)

    def claim(self, *, overwrite: bool) -> None:
        """Take the folder for what it shall hold, or refuse if it holds something else.

        Args:
            overwrite: forget what is there if it was made from something else.

        Raises:
            UsageError: it holds something else; the message names what differs.
        """
        record = self.path / RECORD
        if record.exists():
            written = self._written(overwrite=overwrite)
            self._tasks, self._wrote = _of_record(written)
            differing = _differences(written.get("made_from"), self._made_from)
            if differing and not overwrite:
                raise UsageError(f"{self.path}: holds results of something else ({differing}); {_WAY_OUT}")
            if differing:
                self._forget()
        self._write_record()

    def _require_empty(self) -> None:
        """Refuse a folder that holds something and is not an evaluation's: it might be replaced or taken away.

        Raises:
            UsageError: so it is; the message names a file of it.
        """
        other = next((file for file in sorted(self.path.rglob("*")) if not file.is_dir()), None)
        if other is not None:
            raise UsageError(
                f"{self.path}: holds other files ({other.name}), and an evaluation has a folder of its own; name "
                f"another --out"
            )

    def _written(self, *, overwrite: bool) -> dict[str, Any]:
        """The record that is there; empty if it is damaged and shall be overwritten.

        Raises:
            EnvironmentProblem: it is damaged; the message has the way out.
        """
        record = self.path / RECORD
        try:
            written = read_json(record, sealed=True)
            if not isinstance(written.get("made_from"), dict):
                raise EnvironmentProblem(f"{record}: does not say what the results are of")
        except EnvironmentProblem as error:
            if overwrite:
                return {}
            raise EnvironmentProblem(f"{error}; {_WAY_OUT}") from None
        return written

    def _forget(self) -> None:
        """Take away the results, the rows and the arrays: they are of something else."""
        self._forget_results()
        for task in self._tasks:
            self._forget_rows(task)
        self._tasks = {}

    def _forget_rows(self, task: str) -> None:
        """Take away the rows of a task, its arrays, and what it made."""
        with writing(self.path):
            self._rows_file(task).unlink(missing_ok=True)
        for folder in (self.path / POSITIONS / task, made_by(self.path, task)):
            shutil.rmtree(folder, ignore_errors=True)

    def _forget_results(self) -> None:
        """Take away the results: a command that is stopped before it writes new ones must not leave those of before."""
        with writing(self.path):
            for name in (RESULTS, SUMMARY, *self._wrote):
                (self.path / name).unlink(missing_ok=True)
        self._wrote = []

    def wrote(self, files: Iterable[Path]) -> None:
        """Keep which results were written: those and no others are taken away if they are of before."""
        names = {str(file.relative_to(self.path)) for file in files if file.is_relative_to(self.path)}
        self._wrote = sorted(names | set(self._wrote))
        self._write_record()

    def require_same(self, name: str, made_from: Mapping[str, Any], *, overwrite: bool) -> None:
        """Refuse rows of other options before a model is built.

        Args:
            name: the task.
            made_from: what its rows shall be of, as far as it is known.
            overwrite: rows of other options are forgotten, not refused.

        Raises:
            UsageError: there are rows of other options.
        """
        before = self._tasks.get(name)
        if isinstance(before, dict) and self._rows_file(name).exists() and not overwrite:
            self._require_equal(name, {key: before[key] for key in made_from if key in before}, made_from)

    def _require_equal(self, name: str, before: Any, made_from: Mapping[str, Any]) -> None:
        differing = _differences(before, made_from)
        if differing:
            raise UsageError(f"{self._rows_file(name)}: has results of other options ({differing}); {_WAY_OUT}")

    @property
    def tasks(self) -> Mapping[str, Any]:
        """The options of each task that has rows here."""
        return self._tasks

    def open_task(self, name: str, made_from: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Take a task's rows for what they shall be of; returns whether there are rows to go on from.

        Args:
            name: the task.
            made_from: its options, version and arms.
            overwrite: forget rows that are there.

        Raises:
            UsageError: there are rows of other options.
        """
        rows, before = self._rows_file(name), self._tasks.get(name)
        there = rows.exists() and before is not None and not overwrite
        if there:
            self._require_equal(name, before, made_from)
        else:
            if rows.exists():
                self._forget_results()
            self._forget_rows(name)
        self._tasks[name] = dict(made_from)
        self._write_record()
        return there

    def _write_record(self) -> None:
        content = {"made_from": self._made_from, "tasks": self._tasks, "files": self._wrote}
        write_json(self.path / RECORD, content)

    def _rows_file(self, task: str) -> Path:
        return self.path / SAMPLES / f"{task}.jsonl"

    def rows(self, task: str, items: Sequence[Item]) -> dict[str, Row]:
        """The rows of a task by item, of those items whose files are what they were.

        Raises:
            EnvironmentProblem: the file cannot be read, or is damaged before its last line.
        """
        file, by_id = self._rows_file(task), {item.id: item for item in items}
        found: dict[str, Row] = {}
        for entry in _read_lines(file):
            item = by_id.get(str(entry.get("item")))
            if item is None or entry.get("error") is not None or not isinstance(entry.get("arms"), dict):
                continue  # what failed is tried again
            if entry.get("files") == _digests(item):
                found[item.id] = Row(item, entry["arms"], entry["files"])
        return found

    def begin(self, task: str, rows: Iterable[Row]) -> None:
        """Write the rows to go on from, alone: torn lines and rows that are measured again are gone."""
        write_bytes(self._rows_file(task), "".join(f"{sealed_line(row.as_line())}\n" for row in rows).encode())

    def add(self, task: str, rows: Sequence[Row], arrays: Mapping[tuple[str, str], Mapping[str, np.ndarray]]) -> None:
        """Write the rows of a batch, after their arrays; they are on the disk when it returns."""
        for (item, arm), content in arrays.items():
            self._write_arrays(task, item, arm, content)
        file = self._rows_file(task)
        with writing(file), file.open("ab") as out:
            out.write("".join(f"{sealed_line(row.as_line())}\n" for row in rows).encode())
            out.flush()
            os.fsync(out.fileno())
        sync(file.parent)

    def _array_file(self, task: str, item: str, arm: str) -> Path:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", item)[:120]
        told = (
            plain if plain == item else f"{plain}-{sha256(item.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
        )  # else two might be one
        return self.path / POSITIONS / task / f"{told}.{arm}.npz"

    def _write_arrays(self, task: str, item: str, arm: str, content: Mapping[str, np.ndarray]) -> None:
        packed = io.BytesIO()
        np.savez_compressed(packed, **content)  # type: ignore[arg-type]
        file = self._array_file(task, item, arm)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, packed.getvalue())

    def arrays(self, task: str) -> Arrays:
        """The arrays of a task."""

        def read(item: str, arm: str) -> Mapping[str, np.ndarray]:
            file = self._array_file(task, item, arm)
            if not file.exists():
                return {}
            with np.load(file, allow_pickle=False) as content:
                return dict(content)

        return Arrays(read)


def _of_record(written: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tasks and the results that a record names; none of a damaged one, and none outside of the folder."""
    tasks, files = written.get("tasks"), written.get("files")
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    inside = [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]
    return (dict(tasks) if isinstance(tasks, dict) else {}), inside


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; a last line that a killed process left torn is passed over."""
    try:
        lines = read_file(file, limit=_MOST_ROWS).splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise EnvironmentProblem(f"{file}: cannot be read: {unreadable(error)}") from None
    for number, line in enumerate(lines, 1):
        try:
            yield parse_line(line)
        except ValueError as error:
            if number < len(lines):
                raise EnvironmentProblem(
                    f"{file}:{number}: {error}; take this line out and go on with --resume, or measure the task anew "
                    f"with --overwrite"
                ) from None


def _digests(item: Item) -> dict[str, str] | None:
    try:
        return {str(file): file_digest(file) for file in item.files}
    except OSError:
        return None


def _differences(before: Any, now: Mapping[str, Any]) -> str:
    """What differs between what was made and what shall be, in words; empty if nothing does."""
    then = dotted(before) if isinstance(before, dict) else {}
    here = dotted(_plain(now))
    told = [
        f"{key}: {_in_words(then, key)} then, {_in_words(here, key)} now"
        for key in dict.fromkeys((*then, *here))
        if then.get(key) != here.get(key) or (key in then) != (key in here)
    ]
    return "; ".join(first_entries(told, _NAMED))


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON gives it back."""
    import json

    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _in_words(content: Mapping[str, Any], key: str) -> str:
    return shortened(json_text(content[key], indent=None), 80) if key in content else "none"
