"""A run's folder: what lies in it, who may write to it, and checkpoints that are whole or not there.

    config.yaml           the resolved config; `ttt train RUN/config.yaml --resume` goes on from it. Its last line
                          is a checksum, so that a later change is told
    config.original.yaml  where one written or commented by hand lay in its place
    metrics.jsonl         one line of JSON for each logged step
    loss.png, inner_loss.png
    tensorboard/          where TensorBoard is installed
    summary.json          how it ended, and which checkpoint is the last: `final_checkpoint`
    checkpoints/step_000100/
        adapter_model.safetensors, adapter_config.json    the TTT layers, complete in themselves
        backbone_model.safetensors     the backbone parameters that learn, and those that learned in what the run
                                       started from (`train.init_from`)
        optimizer.safetensors          moments, step counts, float32 masters
        carried_states.safetensors     fast weights of each row, where `persistent_states`
        trainer_state.json             steps done, the config, and the name, size and checksum of every file above

Every file that is read again carries a checksum (`ttt.checksums`, docs/files.md).
The last adapter is not copied to the top: `summary.json` points to it, and `ttt info RUN` follows.
There is no state of random number generators to keep: each forward pass seeds them from the run's seed and its
own number.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt import checksums
from ttt.adapter_file import BACKBONE, MODEL, AdapterInfo, verify_adapter
from ttt.config.schema import RunConfig, with_its_target_eps
from ttt.errors import (
    ConfigError,
    DamagedFileWarning,
    EnvironmentProblem,
    NestedCheckpointWarning,
    UnreadableError,
    UsageError,
)
from ttt.files import (
    DAMAGED,
    TEMPORARY,
    lock,
    read_header,
    read_json,
    sync,
    temporary_beside,
    verify_tensors,
    write_json,
    write_text,
    writing,
)
from ttt.plugins import Backbone
from ttt.printable import shell_word
from ttt.reading import other_kind
from ttt.train import claim
from ttt.train.claim import CHECKPOINTS, CONFIG, METRICS, SUMMARY

__all__ = ["CHECKPOINTS", "CONFIG", "METRICS", "SUMMARY", "Checkpoint", "RunDir", "choose", "read_checkpoint"]

TRAINER_STATE = "trainer_state.json"

_FORMAT = "ttt-checkpoint"
_VERSION = 2
"""Of `trainer_state.json`: 2 records checksums, 1 sizes alone."""
_STEP = re.compile(r"step_(\d{6,})")

MAY_DIFFER = frozenset(
    {
        "run_dir",
        "eval.eval_freq",
        "train.max_steps",
        "train.device",
        "train.cpu_threads",
        "train.gradient_checkpointing",
        "train.log_freq",
        "train.evidence_freq",
        "train.ckpt_freq",
        "train.ckpt_keep",
        "ttt.scan_checkpoint_group_size",
        "data.verify",  # of plugins whose data carry checksums
    }
)
"""Keys that may change when a run is resumed: they decide how long, where and how often, not what is computed."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimiser steps done."""
    state: dict[str, Any]
    """What the trainer put into `trainer_state.json`."""


class RunDir:
    """A run's folder. Making the object writes nothing."""

    def __init__(self, path: Path, *, numbered: bool = False) -> None:
        """With `numbered`, where the folder is there already, `create` takes the next free `PATH-2`, `PATH-3`, …."""
        self.path = path
        self._numbered = numbered
        self._hold: claim.Hold | None = None
        self._damaged: set[Path] = set()
        """Checkpoints whose content is not what was written; their sizes alone would not tell."""

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process trains in the folder, from when it is there on.

        Raises:
            UsageError: another process is training in it.
        """
        with claim.Hold() as hold:
            if not self._numbered:
                hold.take(self.path)
            self._hold = hold
            try:
                yield
            finally:
                self._hold = None

    def require_unused(self) -> None:
        """Refuse a folder in which something was trained, and one with which a run cannot begin.

        A run that ended before its first checkpoint left nothing worth keeping, so its folder is taken over.

        Raises:
            UsageError: it holds a run, or is no folder; the message says how to go on.
            EnvironmentProblem: it cannot be written, or something else lies where a run's files go.
        """
        claim.require_possible(self.path)
        if self._numbered:
            return
        with claim.looking(self.path):
            claim.require_places(self.path)
            if self._step_folders():
                raise UsageError(
                    f"run_dir: {self.path} already holds a run; continue it with `{self.resume_command()}`, or name "
                    f"another run_dir"
                )
            claim.require_startable(self.path)

    def create(self, config: RunConfig) -> None:
        """Make the folder, hold it where `held` asks for that, and write the resolved config.

        What was true when the run was about to be built is looked at once more: another may have begun since.

        Raises:
            UsageError: another process is training in it, or has trained.
            EnvironmentProblem: it cannot be written.
        """
        with writing(self.path):
            if self._numbered:
                self.path = next(path for path in _numbered(self.path) if _made(path))
                self._numbered = False
            self.path.mkdir(parents=True, exist_ok=True)
        if self._hold is not None:
            self._hold.take(self.path)
        self._require_idle()
        self.require_unused()
        with writing(self.path):
            (self / CHECKPOINTS).mkdir(exist_ok=True)
            claim.keep_original(self.path)
        self.write_config(config)

    def reopen(
        self, config: RunConfig, backbone: Backbone, *, verify: bool = True
    ) -> tuple[Checkpoint | None, list[str]]:
        """Prepare to continue the run: check the config against the stored one and find the checkpoint.

        Writes nothing: the config is written by who holds the metrics file.

        Args:
            config: to go on with.
            backbone: of the run.
            verify: compare the checkpoint's content with its checksums.

        Returns:
            The newest checkpoint that is whole, and a sentence for each newer folder that was passed over and for
            what was changed in the stored config. No checkpoint where none was ever saved: there the run starts.

        Raises:
            UsageError: no checkpoint is complete, another process is at the run, or the folder is none of a run.
            ConfigError: the config asks for another run; the message names every key.
            EnvironmentProblem: something else lies where a run's files go.
        """
        claim.require_possible(self.path)
        self._require_idle()
        with claim.looking(self.path):
            if not self._step_folders():
                self.require_unused()
                return None, []
            claim.require_places(self.path)
        checkpoint, passed_over = self.latest(verify=verify)
        if checkpoint is None:
            raise UsageError(
                f"run_dir: {self.path} holds no complete checkpoint ({'; '.join(passed_over)}), so there is nothing to "
                f"resume; put the files back, name another run_dir, or delete {self / CHECKPOINTS} to start anew there"
            )
        if not isinstance(checkpoint.state.get("config"), dict) and not (self / CONFIG).is_file():
            raise UsageError(
                f"run_dir: {self.path} holds checkpoints, but no {CONFIG} to compare with; put it back, or start a new "
                f"run from its weights, with train.init_from: {checkpoint.path} and another run_dir"
            )
        self._require_same_config(config, backbone)
        told = [f"passed over a checkpoint that is not whole: {problem}" for problem in passed_over]
        changed = self.config_change(checkpoint, config)
        return checkpoint, [*told, changed] if changed else told

    def tidy(self, keep: int | None) -> None:
        """Remove what a killed process left, and checkpoints beyond `keep`; only for who holds the run.

        Raises:
            EnvironmentProblem: it cannot be removed.
        """
        with writing(self.path):
            self.remove_unfinished()
            self.prune(keep)

    def remove_unfinished(self) -> None:
        """Remove what a killed process left under a temporary name; only for who holds the metrics file."""
        for folder in (self.path, self / CHECKPOINTS):
            for leftover in folder.glob(f"{TEMPORARY}*") if folder.is_dir() else ():
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)

    def resume_command(self) -> str:
        """The command that continues the run."""
        return f"ttt train {shell_word(self / CONFIG)} --resume"

    # --- checkpoints ---

    def latest(
        self, *, verify: bool = False, only: Collection[str] | None = None
    ) -> tuple[Checkpoint | None, list[str]]:
        """The newest complete checkpoint, and why each newer folder was passed over.

        Args:
            verify: compare the content of its files too, which reads them; else what is small is compared.
            only: names of the files whose content is compared; None is all.

        Raises:
            UnreadableError: the disk does not give a file; an older checkpoint would lose steps that are there.
        """
        passed_over: list[str] = []
        for folder in reversed(self._step_folders()):
            try:
                checkpoint = read_checkpoint(folder)
            except UnreadableError:
                raise
            except EnvironmentProblem as problem:
                passed_over.append(str(problem))
                continue
            try:
                if verify:
                    verify_checkpoint(checkpoint, only=only)
                return checkpoint, passed_over
            except UnreadableError:
                raise
            except EnvironmentProblem as problem:
                passed_over.append(str(problem))
                self._damaged.add(folder)
        return None, passed_over

    def complete(self) -> list[Checkpoint]:
        """Every complete checkpoint, the newest first."""
        found = []
        for folder in reversed(self._step_folders()):
            with contextlib.suppress(EnvironmentProblem):
                found.append(read_checkpoint(folder))
        return [checkpoint for checkpoint in found if checkpoint.path not in self._damaged]

    def beside(self) -> Path:
        """A folder for a run that goes on from this one with another config; it is not there yet."""
        return next(path for path in _numbered(self.path) if not os.path.lexists(path))

    def save_checkpoint(
        self, step: int, state: Mapping[str, Any], write: Callable[[Path], None], *, keep: int | None
    ) -> Path:
        """Write a checkpoint beside its place, put it there in one rename, then drop the oldest.

        Args:
            step: optimiser steps done.
            state: what goes into `trainer_state.json`, as JSON.
            write: writes every other file into the folder that it is given.
            keep: how many checkpoints stay; None keeps all.

        Raises:
            EnvironmentProblem: the disk is full or cannot be written; nothing half written is left.
        """
        final = self / CHECKPOINTS / f"step_{step:06d}"
        temporary = temporary_beside(final)
        with writing(final):
            try:
                temporary.mkdir(parents=True)
                write(temporary)
                files = {file.name: _record_of(file) for file in sorted(temporary.iterdir())}
                content = {"format": _FORMAT, "version": _VERSION, "step": step, "files": files, **state}
                write_json(temporary / TRAINER_STATE, content)
                sync(temporary)
                self._discard(final)
                os.rename(temporary, final)
                self._damaged.discard(final)
                sync(final.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            self.prune(keep)
        return final

    def prune(self, keep: int | None) -> None:
        """Drop the oldest complete checkpoints beyond `keep`; a folder that is none of ours stays."""
        if keep is None:
            return
        with writing(self / CHECKPOINTS):
            for checkpoint in self.complete()[keep:]:
                self._discard(checkpoint.path)

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint folder; it loses its name first, so that half of it is never taken for one."""
        if folder.exists():
            temporary = temporary_beside(folder)
            os.rename(folder, temporary)
            shutil.rmtree(temporary, ignore_errors=True)

    def _step_folders(self) -> list[Path]:
        """Folders named like checkpoints, in order of step, whatever is in them."""
        try:  # newer Pythons' `is_dir` takes a disk that fails for a folder that is not there: a run would start over
            entries = sorted((self / CHECKPOINTS).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        named = [(match, folder) for folder in entries if (match := _STEP.fullmatch(folder.name))]
        return [folder for match, folder in sorted(named, key=lambda pair: int(pair[0][1])) if folder.is_dir()]

    # --- the config ---

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved config; of a run that goes on, only for who holds the metrics file."""
        from ttt.config.dumping import dump_config

        text = dump_config(config.model_copy(update={"run_dir": str(self.path)}))
        write_text(self / CONFIG, claim.with_checksum(text))

    def keep_comments(self) -> None:
        """Put a stored config that somebody commented aside, before `write_config` replaces it.

        Raises:
            EnvironmentProblem: it cannot be written.
        """
        with writing(self.path):
            claim.keep_comments(self.path)

    def config_change(self, checkpoint: Checkpoint, config: RunConfig) -> str | None:
        """What somebody, or a damaged disk, has changed in the stored config since the run wrote it, as a sentence.

        Args:
            checkpoint: whose record says how the run was configured.
            config: what the stored config says now, overrides included.

        Returns:
            None where the stored config is as it was written, says the same in other words, or cannot tell.
        """
        recorded = checkpoint.state.get("config")
        if self.config_is_as_written() is not False or not isinstance(recorded, dict):
            return None
        before, now = _flat(recorded), _flat(config.model_dump(mode="json"))
        differing = [key for key in before if key in now and before[key] != now[key] and key != "run_dir"]
        listed = "; ".join(f"{key}: {_in_words(before[key])} then, {_in_words(now[key])} now" for key in differing)
        return f"{self / CONFIG} was changed since the run wrote it ({listed})" if differing else None

    def config_is_as_written(self) -> bool | None:
        """Whether the stored config has the checksum that it was written with; None where it has none."""
        try:
            text = (self / CONFIG).read_bytes().decode("utf-8", "replace")
        except OSError:
            return None
        return claim.is_as_written(text)

    def _require_idle(self) -> None:
        """Refuse a run that another process is at, before its files are looked at or replaced."""
        if other_kind(self / METRICS) is not None:
            return
        with contextlib.suppress(OSError), open(self / METRICS, "r+b") as file:
            lock(file, self / METRICS)

    def _require_same_config(self, config: RunConfig, backbone: Backbone) -> None:
        recorded = self._recorded_config(backbone)
        known = _flat(recorded)  # without keys that only a later ttt has
        differences = [found for found in _differences(recorded, config.model_dump(mode="json")) if found[0] in known]
        if differences:
            listed = "; ".join(
                f"{key}: {_in_words(before)} in the run, {_in_words(now)} now" for key, before, now in differences
            )
            edited = self.config_is_as_written() is False
            changed = f"; its {CONFIG} was changed since the run wrote it" if edited else ""
            raise ConfigError(
                f"{self.path}: the run to resume was started with another config ({listed}); take these back, or "
                f"start a new run in another run_dir{changed}"
            )

    def _recorded_config(self, backbone: Backbone) -> dict[str, Any]:
        """How the run was configured: what the last checkpoint recorded; of an older run, what the stored config says.

        The checkpoint's is covered by its checksum, while the file may be what is compared with.
        """
        from ttt.check.load import load_config

        checkpoint, _ = self.latest()
        recorded = checkpoint.state.get("config") if checkpoint is not None else None
        if isinstance(recorded, dict):
            ttt = recorded.get("ttt")
            return {**recorded, "ttt": with_its_target_eps(ttt)} if isinstance(ttt, dict) else recorded
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NestedCheckpointWarning)  # the config at hand is warned of already
            return load_config(self / CONFIG, backbone=backbone, resuming=True).config.model_dump(mode="json")


def _record_of(file: Path) -> dict[str, Any]:
    """What `trainer_state.json` keeps of a file: its size, and a checksum of its content."""
    return {"bytes": file.stat().st_size, checksums.KEY: _small_digest(file)}


def _small_digest(file: Path) -> str | None:
    """The checksum of a file without reading much of it: of safetensors what their header says, else of its bytes."""
    return read_header(file).checksum if file.suffix == ".safetensors" else checksums.file_digest(file)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, once it is sure that every file of it is there in full; no tensor is read.

    Raises:
        EnvironmentProblem: it is not complete, or none of ours; one sentence says why.
    """
    state = read_json(folder / TRAINER_STATE, sealed=True)
    if state.get("format") != _FORMAT:
        raise EnvironmentProblem(f"{folder / TRAINER_STATE}: not a checkpoint of ttt")
    version = state.get("version")
    if version not in (1, _VERSION):
        raise EnvironmentProblem(
            f"{folder / TRAINER_STATE}: checkpoint version {version!r}, this ttt reads up to {_VERSION}"
        )
    step, files = state.get("step"), state.get("files")
    match = _STEP.fullmatch(folder.name)
    if not isinstance(step, int) or not isinstance(files, dict) or (match and int(match[1]) != step):
        raise EnvironmentProblem(f"{folder / TRAINER_STATE}: does not describe this checkpoint")
    for name, record in files.items():
        _require_file(folder / name, record if isinstance(record, dict) else {"bytes": record})
    return Checkpoint(folder, step, state)


def _require_file(file: Path, record: Mapping[str, Any]) -> None:
    """Hold a file against its record, as far as that takes no reading of tensors."""
    if not file.is_file():
        raise EnvironmentProblem(f"{file}: missing")
    if file.stat().st_size != record.get("bytes"):
        raise EnvironmentProblem(f"{file}: {file.stat().st_size} bytes, {record.get('bytes')} were written")
    found = None if file.suffix != ".safetensors" else read_header(file).checksum
    if checksums.KEY not in record:  # written before there were checksums
        return
    try:
        found = found or _small_digest(file)
    except OSError as error:
        raise UnreadableError(f"{file}: cannot be read: {error.strerror or error}") from error
    if found != record[checksums.KEY]:
        raise EnvironmentProblem(f"{file}: damaged: its checksum is not the one that was recorded; {DAMAGED}")


def verify_checkpoint(
    checkpoint: Checkpoint, *, only: Collection[str] | None = None, without: Collection[str] = ()
) -> None:
    """Compare the content of a complete checkpoint's files with their checksums; needs no torch.

    Args:
        checkpoint: from `read_checkpoint`, which has compared what is small.
        only: names of the files to compare; None is all.
        without: names of files that were compared already.

    Raises:
        EnvironmentProblem: a file is not what was written; the message names it.
    """
    for name in checkpoint.state["files"]:
        if name.endswith(".safetensors") and (only is None or name in only) and name not in without:
            verify_tensors(checkpoint.path / name)


def verify_files(info: AdapterInfo, path: Path) -> None:
    """Compare an adapter with its checksums, and all that would be read again of its checkpoint and of its run.

    Needs no torch.

    Args:
        info: of the adapter, from `path`.
        path: its file, its folder, or a run's folder; then the run's own files are compared too, and checkpoints that
            were passed over are named.

    Raises:
        EnvironmentProblem: files are not what was written; the message names each.
    """
    folder = info.path.parent
    is_run = path.is_dir() and folder.parent == path / CHECKPOINTS
    problems = RunDir(path).latest()[1] if is_run else []
    problems += _problems(lambda: verify_adapter(info))
    if (folder / TRAINER_STATE).is_file():
        others = _checkpoint_problems(folder)
        problems += [problem for problem in others if problem not in problems]
    if path.is_dir() and (path / CONFIG).is_file():
        problems += _problems(lambda: (path / SUMMARY).is_file() and read_json(path / SUMMARY, sealed=True))
        problems += _metrics_problems(path / METRICS)
        if RunDir(path).config_is_as_written() is False:
            warnings.warn(f"{path / CONFIG} is not as the run wrote it", DamagedFileWarning, stacklevel=2)
    if problems:
        raise EnvironmentProblem("; ".join(problems))


def _checkpoint_problems(folder: Path) -> list[str]:
    def compare() -> None:
        verify_checkpoint(read_checkpoint(folder), without=(MODEL, BACKBONE))

    return _problems(compare)


def _metrics_problems(path: Path) -> list[str]:
    """What is damaged in a `metrics.jsonl`, its first few lines that are."""
    found = []
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                checksums.parse_line(line)
            except ValueError as error:
                if line.endswith(b"\n"):  # else a crash cut it short
                    found.append(f"{path}:{number}: {error}")
    return [*found[:5], f"{len(found) - 5} lines more of it"] if len(found) > 5 else found


def _problems(look: Callable[[], object]) -> list[str]:
    try:
        look()
    except EnvironmentProblem as problem:
        return [str(problem)]
    return []


def choose(config: RunConfig, *, resume: bool) -> RunDir:
    """Where the run goes: `run_dir`, or a folder of its own under `runs/`, named after the backbone and the time.

    Raises:
        UsageError: a run is to be resumed and the config does not say which; the message suggests one.
    """
    if config.run_dir is not None:
        return RunDir(Path(config.run_dir))
    label = "-".join(filter(None, [config.backbone.name, getattr(config.backbone, "preset", None)]))
    if resume:
        newest = _newest_run(label)
        hint = f", as `{newest.resume_command()}`" if newest else ""
        raise UsageError(f"--resume: which run? Give its {CONFIG}{hint}, or its run_dir")
    return RunDir(Path("runs") / f"{label}-{time.strftime('%Y%m%d-%H%M%S')}", numbered=True)


def _newest_run(label: str) -> RunDir | None:
    """The newest run of that label that can be resumed."""
    runs = [RunDir(path) for path in Path("runs").glob(f"{label}-*") if (path / CONFIG).is_file()]
    able = []
    for run in runs:
        with contextlib.suppress(UnreadableError):  # it is a hint only
            able += [run] if run.latest()[0] is not None else []
    return max(able, key=lambda run: (run / CONFIG).stat().st_mtime, default=None)


def _made(path: Path) -> bool:
    """Make a folder; False where there is one already."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not os.path.lexists(path):  # it is a folder above that is in the way
            raise
        return False
    return True


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def config_differences(stored: RunConfig, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Keys, with both values, in which the configs differ and a resumed run may not."""
    return _differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))


def _differences(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    before, now = _flat(stored), _flat(config)
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in MAY_DIFFER
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _in_words(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
