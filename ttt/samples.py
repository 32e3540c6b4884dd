"""A folder of samples: which ones exist, what they were made from, and how each is written whole or not at all.

Each sample, such as `003.mp4`, has a record beside it, `003.json`: its inputs and the SHA-256 of its files. So a
command that was killed can go on with the missing samples, and a command with other inputs never mixes its own in. A
sample is made in a temporary folder and moved when it is complete, its record first: so a file either has a record or
existed before. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ttt.adapter_file import AdapterInfo
from ttt.checksums import file_digest
from ttt.config.schema import DataOptions, RunConfig
from ttt.dotted import dotted
from ttt.errors import EnvironmentProblem, UnreadableError, UsageError
from ttt.files import TEMPORARY, lock, read_json, replaced_file, sync, temporary_beside, write_json, writing
from ttt.interrupt import interruptible
from ttt.plugins import SampleRequest
from ttt.printable import shortened
from ttt.reading import other_kind
from ttt.version import __version__
from ttt.words import first_entries

RECORD = ".json"
"""The suffix of a record's name."""
_NAMED = 3


def shared_origin(config: RunConfig, learned: AdapterInfo | None, *, as_start: bool) -> dict[str, Any]:
    """What all samples of a command share: the settings that decide their content, and the adapter.

    Args:
        config: the model's resolved config.
        learned: the adapter that is loaded; None if there is none.
        as_start: whether training would start from the adapter; then what it lacks is drawn from the run's seed.
    """
    settings = config.model_dump(mode="json")
    data = {key: value for key, value in settings["data"].items() if key not in DataOptions.model_fields}
    seed = {"train.seed": config.train.seed} if as_start else {}
    return {
        "adapter": None if learned is None else _content_of(learned),
        **dotted({"backbone": settings["backbone"], "ttt": settings["ttt"], "data": data}),
        **(dotted({"lora": settings["lora"]}) | {"ttt.layers": str(config.injected.layers)} if config.has_lora else {}),
        "train.param_dtype": config.train.param_dtype,
        **seed,
        "ttt_version": __version__,
    }


def _content_of(learned: AdapterInfo) -> str:
    """The checksum of an adapter; of its file, if it was written before adapters carried checksums."""
    return learned.checksum or file_digest(learned.path)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside it, which is removed at the end.

    What is to stay is moved by `put_in_place`. So a sample that fails, is interrupted or is killed leaves no half file
    under its name.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written.
    """
    staging = temporary_beside(out.with_suffix(""))
    try:
        with writing(staging):
            staging.mkdir()
        yield staging / out.name
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def put_in_place(files: Sequence[Path], folder: Path) -> list[Path]:
    """Move files to a folder on the same disk, and let no signal come between two of them; returns where they are.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    places = [folder / file.name for file in files]
    with writing(places[-1]), interruptible() as interrupt, interrupt.held():
        for file, place in zip(files, places, strict=True):
            os.replace(file, replaced_file(place))
        sync(folder)
    return places


def remove_unfinished(folder: Path, stems: Collection[str]) -> None:
    """Remove what killed processes left of samples of such names."""
    for left in folder.glob(f"{TEMPORARY}*"):
        if left.name[len(TEMPORARY) + 9 :] in stems:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


class SampleFolder:
    """A folder of samples, each with its record.

    Args:
        requests: the samples in order, all in one folder.
        files: the files of each sample, as `Sampling.plan_sample` names them.
        origin: what they share, from `shared_origin`.
        adapter: the adapter's file, for the record.
    """

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        files: Sequence[Sequence[Path]],
        *,
        origin: Mapping[str, Any],
        adapter: Path | None,
    ) -> None:
        self.path = requests[0].out.parent
        self._requests = requests
        self._files = {request.out: tuple(several) for request, several in zip(requests, files, strict=True)}
        self._origin = origin
        self._adapter = None if adapter is None else str(adapter)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make and lock the folder, and remove the unfinished samples of a killed process.

        Raises:
            UsageError: another process is sampling into it.
            EnvironmentProblem: the folder cannot be made.
        """
        before = next(folder for folder in (self.path, *self.path.absolute().parents) if os.path.lexists(folder))
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with self._locked():
            remove_unfinished(self.path, {request.out.stem for request in self._requests})
            try:
                yield
            finally:
                for folder in (self.path, *self.path.parents):  # remove folders that stayed empty
                    if folder.absolute() == before.absolute() or any(folder.iterdir()):
                        break
                    folder.rmdir()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except PermissionError:  # Windows opens no folders
            yield
            return
        try:
            try:
                lock(handle, self.path / RECORD)
            except UsageError:
                raise UsageError(
                    f"{self.path}: another process is sampling into it; wait for it, or name another --out"
                ) from None
            yield
        finally:
            os.close(handle)

    def missing(self, *, overwrite: bool, verify: bool) -> list[SampleRequest]:
        """The samples that are still to be made.

        Args:
            overwrite: if a sample was made from something else, make it again instead of refusing.
            verify: compare files with their checksums.

        Raises:
            UsageError: a sample was made from something else; the message names what differs.
            EnvironmentProblem: a record is damaged.
        """
        found: list[SampleRequest] = []
        problems: list[str] = []
        for request in self._requests:
            for file in (*self._files[request.out], self._record(request)):
                replaced_file(file)
            try:
                problem, complete = self._look_at(request, verify=verify)
            except UnreadableError:
                raise
            except EnvironmentProblem as error:
                if not overwrite:
                    raise EnvironmentProblem(f"{error}; or make it anew with --overwrite") from None
                problem, complete = str(error), False
            if problem is not None and not overwrite:
                problems.append(problem)
            elif not complete:
                found.append(request)
        if problems:
            raise _refusal(problems, self.path)
        return found

    def _look_at(self, request: SampleRequest, *, verify: bool) -> tuple[str | None, bool]:
        """Why a sample cannot be made or kept, if anything; and whether it already exists."""
        record, files = self._record(request), self._files[request.out]
        there = [file for file in files if file.exists()]
        if not record.exists():
            return (f"{there[0]}: is there, and no {record.name} says what it was made from" if there else None), False
        said = read_json(record, sealed=True)
        if not there:
            return None, False
        different = self._differences(said, request)
        if different:
            return f"{there[0]}: was made from something else ({different})", False
        digests = said.get("files")
        for file in there:
            written = digests.get(file.name) if isinstance(digests, dict) else None
            if verify and written != _digest(file):
                return f"{file}: is not the file that was written there", False
        return None, len(there) == len(files)

    def _differences(self, record: Mapping[str, Any], request: SampleRequest) -> str:
        """The settings that differ from the record's, in words; empty if none do."""
        written: Any = record.get("made_from")
        before = written if isinstance(written, dict) else {}
        told = []
        for key, now in self._made_from(request).items():
            if key not in before or before[key] != now:
                told.append(_difference(key, before.get(key), now, record.get("adapter"), self._adapter))
        return "; ".join(first_entries(told, _NAMED))

    def _made_from(self, request: SampleRequest) -> dict[str, Any]:
        asked = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(request).items()}
        del asked["out"]
        return {**asked, **self._origin}

    def _record(self, request: SampleRequest) -> Path:
        return request.out.with_suffix(RECORD)

    @contextlib.contextmanager
    def making(self, request: SampleRequest) -> Iterator[SampleRequest]:
        """A context with the request for a temporary folder; at the end, its files are moved into this folder.

        Raises:
            EnvironmentProblem: the disk is full or cannot be written.
        """
        with staged(request.out) as place:
            yield replace(request, out=place)
            self._move(place.parent, request)

    def _move(self, staging: Path, request: SampleRequest) -> None:
        files = [file for file in self._files[request.out] if (staging / file.name).exists()]
        record = self._record(request)
        content = {
            "made_from": self._made_from(request),
            "adapter": self._adapter,
            "files": {file.name: _digest(staging / file.name) for file in files},
        }
        write_json(staging / record.name, content)
        put_in_place([staging / file.name for file in (record, *files)], self.path)


def _refusal(problems: Sequence[str], folder: Path) -> UsageError:
    way_out = "name another --out, or make what differs anew with --overwrite"
    if len(problems) == 1:
        return UsageError(f"{problems[0]}; {way_out}")
    told = f"{folder}: holds something else in {len(problems)} places; {way_out}:"
    return UsageError(told, details=first_entries(problems, _NAMED))


def _difference(key: str, before: Any, now: Any, adapter_before: Any, adapter_now: str | None) -> str:
    if key == "adapter":
        was, is_now = (path or "none" for path in (adapter_before, adapter_now))
        return f"adapter: {was} then, {is_now} now" if was != is_now else f"adapter: {was} has changed since"
    return f"{key}: {_in_words(before)} then, {_in_words(now)} now"


def _in_words(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), 80)


def _digest(file: Path) -> str:
    kind = other_kind(file)
    try:
        if kind is not None:
            raise OSError(f"{kind}, not a file")
        return file_digest(file)
    except OSError as error:
        raise UnreadableError(f"{file}: cannot be read: {error.strerror or error}") from error
