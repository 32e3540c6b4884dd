"""A run's folder: what is in it, which process may write to it, and how checkpoints are written whole or not at all.

    config.yaml           the resolved config; `ttt train RUN/config.yaml --resume` goes on from it
    config.original.yaml  a config.yaml that was written or commented by hand (see `ttt.train.stored_config`)
    metrics.jsonl         one line of JSON for each logged step
    loss.png, inner_loss.png
    tensorboard/          if TensorBoard is installed, or `train.loggers` names it
    wandb/, wandb_run.txt, trackio_run.txt    if it names W&B and Trackio; under which name they know the run
    profile.txt, trace.json.gz    where the time of a step goes, of `ttt train --profile`
    summary.json          the run's result and its last checkpoint, `final_checkpoint`
    checkpoints/step_000100/
        adapter_model.safetensors, adapter_config.json    the TTT layers, complete in themselves
        backbone_model.safetensors     the backbone parameters that learn, and those that learned before, in the adapter
                                       that the run started from (`train.init_from`)
        optimizer.safetensors          moments, step counts, float32 masters, averages; of several processes instead
        optimizer-00001-of-00004.safetensors, …           the part that each of them has
        ema/                           the averaged weights as an adapter of the same files, if `train.ema_decay`
        carried_states.safetensors     fast weights of each row, if `persistent_states`
        trainer_state.json             steps done, the config, and the name, size and checksum of every file above

Every file that is read again carries a checksum (`ttt.checksums`, docs/files.md).
The last adapter is not copied to the top of the folder: `summary.json` names its checkpoint, and `ttt info RUN` reads
it there. No state of random number generators is stored: each forward pass seeds them from the run's seed and its own
number.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ttt.checkpoint_folder import (
    CHECKPOINTS,
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    step_folder,
    step_folders,
    write_record,
)
from ttt.config.schema import RunConfig
from ttt.errors import EnvironmentProblem, UnreadableError, UsageError
from ttt.files import TEMPORARY, lock, sync, temporary_beside, writing
from ttt.plugins import Backbone
from ttt.printable import shell_word
from ttt.reading import other_kind
from ttt.train import claim
from ttt.train.claim import METRICS
from ttt.train.stored_config import CONFIG, StoredConfig


class RunDir:
    """A run's folder. Making the object writes nothing."""

    def __init__(self, path: Path, *, numbered: bool = False) -> None:
        """If `numbered` and the folder exists already, `create` takes the next free `PATH-2`, `PATH-3`, …."""
        self.path = path
        self._numbered = numbered
        self._hold: claim.Hold | None = None
        self._damaged: set[Path] = set()
        """Checkpoints whose checksums do not match, although their files have the right sizes."""

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def stored_config(self) -> StoredConfig:
        """The config in the folder."""
        return StoredConfig(self.path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context that keeps other processes from training in the folder, from the time that it exists.

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
        """Refuse a folder that holds a run with checkpoints, or in which no run can begin.

        If a run ended there before its first checkpoint, the folder is taken over: nothing in it is worth keeping.

        Raises:
            UsageError: it holds a run, or is not a folder; the message says how to go on.
            EnvironmentProblem: it cannot be written, or something else has the name of a run's file.
        """
        claim.require_possible(self.path)
        if self._numbered:
            return
        with claim.looking(self.path):
            claim.require_places(self.path)
            if step_folders(self.path):
                raise UsageError(
                    f"run_dir: {self.path} already holds a run; continue it with `{self.resume_command()}`, or name "
                    f"another run_dir"
                )
            claim.require_startable(self.path)

    def create(self, config: RunConfig) -> None:
        """Make the folder, lock it inside `held`, and write the resolved config.

        It repeats the checks of `require_unused`, since another run may have begun in the meantime.

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
        self.stored_config.keep_original()
        self.stored_config.write(config)

    def reopen(
        self, config: RunConfig, backbone: Backbone, *, verify: bool = True
    ) -> tuple[Checkpoint | None, list[str]]:
        """Prepare to continue the run: check the config against the stored one and find the checkpoint.

        Writes nothing: only the process that has locked the metrics file writes the config.

        Args:
            config: the config to go on with.
            backbone: the run's backbone.
            verify: compare the checkpoint's content with its checksums.

        Returns:
            The newest checkpoint that is whole; and a sentence for each newer folder that was passed over, and for
            changes in the stored config. If no checkpoint was ever saved, it is None, and the run starts.

        Raises:
            UsageError: no checkpoint is complete, another process is training there, or the folder is not a run's.
            ConfigError: the config differs from the run's; the message names every key.
            EnvironmentProblem: something else has the name of a run's file.
        """
        claim.require_possible(self.path)
        self._require_idle()
        with claim.looking(self.path):
            if not step_folders(self.path):
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
        self.stored_config.require_same(checkpoint, config, backbone)
        told = [f"passed over a checkpoint that is not whole: {problem}" for problem in passed_over]
        changed = self.stored_config.change_since(checkpoint, config)
        return checkpoint, [*told, changed] if changed else told

    def tidy(self, keep: int | None) -> None:
        """Remove what a killed process left, and checkpoints beyond `keep`. Call it only while the run is locked.

        Raises:
            EnvironmentProblem: something cannot be removed.
        """
        with writing(self.path):
            self.remove_unfinished()
            self.prune(keep)

    def remove_unfinished(self) -> None:
        """Remove what a killed process left under a temporary name. Call it only while the metrics file is locked."""
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
            verify: as for `newest_checkpoint`.
            only: as for `newest_checkpoint`.

        Raises:
            UnreadableError: as for `newest_checkpoint`.
        """
        found = newest_checkpoint(self.path, verify=verify, only=only)
        self._damaged |= found.damaged
        return found.checkpoint, list(found.passed_over)

    def complete(self) -> list[Checkpoint]:
        """Every complete checkpoint, the newest first, except the ones that `latest` found damaged."""
        found = []
        for folder in reversed(step_folders(self.path)):
            with contextlib.suppress(EnvironmentProblem):
                found.append(read_checkpoint(folder))
        return [checkpoint for checkpoint in found if checkpoint.path not in self._damaged]

    def beside(self) -> Path:
        """The path of a folder for a run that goes on from this one with another config; it does not exist yet."""
        return next(path for path in _numbered(self.path) if not os.path.lexists(path))

    def begin_checkpoint(self, step: int) -> Path:
        """Make the folder, under a temporary name, in which several processes write a checkpoint.

        Raises:
            EnvironmentProblem: it cannot be made.
        """
        temporary = temporary_beside(step_folder(self.path, step))
        with writing(temporary):
            temporary.mkdir(parents=True)
        return temporary

    def give_up(self, unfinished: Path) -> None:
        """Remove what `begin_checkpoint` made."""
        shutil.rmtree(unfinished, ignore_errors=True)

    def save_checkpoint(
        self,
        step: int,
        state: Mapping[str, Any],
        write: Callable[[Path], None],
        *,
        keep: int | None,
        begun: Path | None = None,
    ) -> Path:
        """Write a checkpoint under a temporary name, rename it, then remove the oldest.

        Args:
            step: optimiser steps done.
            state: the JSON content of `trainer_state.json`.
            write: writes every other file into the folder that it is given.
            keep: how many checkpoints stay; None keeps all.
            begun: from `begin_checkpoint`, with some of the files; None makes it.

        Raises:
            EnvironmentProblem: the disk is full or cannot be written; nothing half written is left.
        """
        final = step_folder(self.path, step)
        temporary = begun or self.begin_checkpoint(step)
        with writing(final):
            try:
                write(temporary)
                write_record(temporary, step, state)
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
        """Remove the oldest complete checkpoints beyond `keep`; a folder that is not a checkpoint stays."""
        if keep is None:
            return
        with writing(self / CHECKPOINTS):
            for checkpoint in self.complete()[keep:]:
                self._discard(checkpoint.path)

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint folder. It is renamed first, so that a half-removed one never counts as a checkpoint."""
        if folder.exists():
            temporary = temporary_beside(folder)
            os.rename(folder, temporary)
            shutil.rmtree(temporary, ignore_errors=True)

    def _require_idle(self) -> None:
        """Refuse a run in which another process is training, before its files are read or replaced."""
        if other_kind(self / METRICS) is not None:
            return
        with contextlib.suppress(OSError), open(self / METRICS, "r+b") as file:
            lock(file, self / METRICS)


def choose(config: RunConfig, *, resume: bool) -> RunDir:
    """The run's folder: `run_dir`, or a new folder under `runs/` named after the backbone and the time.

    Raises:
        UsageError: `resume` is set and the config does not say which run; the message suggests one.
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
    """The newest run under `runs/` that has this label and can be resumed."""
    runs = [RunDir(path) for path in Path("runs").glob(f"{label}-*") if (path / CONFIG).is_file()]
    able = []
    for run in runs:
        with contextlib.suppress(UnreadableError):  # this is only a hint
            able += [run] if run.latest()[0] is not None else []
    return max(able, key=lambda run: (run / CONFIG).stat().st_mtime, default=None)


def _made(path: Path) -> bool:
    """Make a folder; False if it exists already."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not os.path.lexists(path):  # something above it is in the way
            raise
        return False
    return True


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1
