"""Checkpoints during a run: written when due, proved by a finite loss, and loaded when the run is resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ttt.adapter_file import backbone_identity
from ttt.checkpoint_folder import Checkpoint
from ttt.errors import NonFiniteError
from ttt.files import require_space
from ttt.parallel.gathering import own_part
from ttt.parallel.heads import own_states
from ttt.train.behind import Behind
from ttt.train.checkpoint import Content, content_bytes, read_content, write_content
from ttt.train.divergence import listed, lowered, not_finite, tensors_of, way_on
from ttt.train.ema import write_averages
from ttt.train.log import RunLog
from ttt.train.parts import Parts
from ttt.train.pictures import Pictures
from ttt.train.progress import Progress
from ttt.train.shards import write_shards

_DRAW_SECONDS = 60.0
"""Pictures older than this are drawn again when a checkpoint is written."""


def require_space_for_one(parts: Parts) -> None:
    """Refuse to begin a run if not even one checkpoint fits on the disk.

    Raises:
        EnvironmentProblem: there is not enough space for one.
    """
    needed = content_bytes(parts.injection, parts.trained_tensors(), parts.optimizer)
    if parts.world.first:
        require_space(parts.directory.path, needed, what="one checkpoint of this run")


def restored(parts: Parts, checkpoint: Checkpoint) -> Progress:
    """Load what a checkpoint holds besides the weights into the parts of a run; returns how far the run was.

    Raises:
        EnvironmentProblem: a file of the checkpoint is damaged.
    """
    states = read_content(
        checkpoint.path,
        parts.optimizer,
        persistent=parts.config.ttt.persistent_states,
        device=parts.device,
        rows=parts.world.rows(parts.config.train.batch_size),
        verify=False,  # it was compared when it was found, if that was wanted
    )
    return Progress(
        done=checkpoint.step,
        seconds=float(checkpoint.state["seconds"]),
        tokens=int(checkpoint.state["tokens"]),
        states=own_states(states, parts.world),
        line=dict(checkpoint.state["line"]),
    )


class Saver:
    """Writes the checkpoints of a run.

    Weights are proved (`prove`) once a step or an evaluation with them is finite. Until then the previous checkpoint is
    not pruned; and when a run is rescued, no checkpoint is.

    Args:
        parts: the run's parts.
        progress: how far the run is.
        log: its metrics are synced to the disk before each checkpoint, so that after a power cut none is ahead of them.
        pictures: drawn again at a checkpoint if they are old.
        resumed: the checkpoint from which the run goes on.
    """

    def __init__(
        self,
        parts: Parts,
        progress: Progress,
        *,
        log: RunLog,
        pictures: Pictures,
        resumed: Checkpoint | None,
    ) -> None:
        self._parts = parts
        self._progress = progress
        self._metrics = log.metrics
        self._pictures = pictures
        self._step = 0 if resumed is None else resumed.step
        self._proven = resumed is None
        self._drawn = time.monotonic()
        self._behind: Behind | None = None
        self.saved: Path | None = None if resumed is None else resumed.path
        """The last checkpoint."""

    def save(self, *, rescuing: bool = False) -> None:
        """Write the checkpoint of the steps done, unless it already exists.

        Raises:
            NonFiniteError: a tensor to be saved is not finite; nothing was written.
            EnvironmentProblem: the disk is full or cannot be written.
        """
        self.settle()
        done = self._progress.done
        if done == self._step:  # no step is done, or all are saved
            return
        self._require_finite()
        keep = self._parts.config.train.ckpt_keep
        unproven = None if keep is None or rescuing else max(keep, 2)
        if self._parts.config.train.ckpt_async and not rescuing:
            self._behind = self._begun(unproven)
        else:
            self.saved = self._written(unproven)
        self._step = done
        self._proven = unproven == keep
        if not self._parts.world.first:
            return
        if time.monotonic() - self._drawn > _DRAW_SECONDS and self._metrics.last_step:
            self._pictures.draw()
            self._drawn = time.monotonic()

    def prove(self) -> None:
        """Mark the last checkpoint as good, because its weights gave finite numbers, and remove the oldest.

        A checkpoint that was written behind the run's back takes its place, if all of it is written.
        """
        self.settle(wait=False)
        if not self._proven:
            if self._parts.world.first:
                self._parts.directory.prune(self._parts.config.train.ckpt_keep)
            self._proven = True

    def settle(self, *, wait: bool = True) -> None:
        """Give the checkpoint that is being written beside the run its place, or, unless `wait`, look whether it can.

        Raises:
            EnvironmentProblem: the disk is full or cannot be written.
        """
        behind, parts = self._behind, self._parts
        if behind is None or (not wait and parts.world.any(not behind.is_written)):
            return
        self._behind = None
        try:
            behind.wait_for_shards()
            self.saved = parts.world.from_first(lambda: self._placed(behind))
        except BaseException:
            if parts.world.first:  # another process might remove what the first is about to give its place
                parts.directory.give_up(behind.folder)
            raise
        if self._proven and parts.world.first:
            parts.directory.prune(parts.config.train.ckpt_keep)

    def keep_begun(self) -> None:
        """Give the checkpoint that is being written its place, since the run has failed; asks no other process.

        Of several processes the first does it if all have written, and waits for none that may be gone.
        """
        behind, world = self._behind, self._parts.world
        if behind is None or not (world.alone or (world.first and behind.has_shards)):
            return
        self._behind = None
        try:
            behind.wait_for_shards()
            self.saved = self._placed(behind)
        except Exception:  # the error that ended the run is what has to be told
            self._step = 0  # whoever saves what is done writes it anew
            self._parts.directory.give_up(behind.folder)

    def _placed(self, behind: Behind) -> Path:
        """Give a checkpoint its place once this process has written its files; returns its folder."""
        behind.wait_for_files()
        self._metrics.sync()
        return self._parts.directory.save_checkpoint(
            behind.step, behind.state, lambda folder: None, keep=behind.keep, begun=behind.folder
        )

    def _begun(self, keep: int | None) -> Behind:
        """Copy everything to the CPU's memory, and begin to write it."""
        parts, world, done = self._parts, self._parts.world, self._progress.done
        content = self._content().copied()
        folder = world.from_first(lambda: parts.directory.begin_checkpoint(done))
        writing = self._writing(content)
        write = (lambda: writing(folder)) if world.first else None
        return Behind.begun(done, folder, self._state(), keep, write, parts.optimizer.tensors(), world)

    def _content(self) -> Content:
        parts, states = self._parts, self._progress.states
        carried = states if parts.config.ttt.persistent_states else None
        return Content.gathered(parts.injection, parts.trained_tensors(), parts.optimizer, carried, parts.world)

    def _written(self, keep: int | None) -> Path:
        """Write the checkpoint; returns its folder.

        Of several processes each writes its part of the optimiser's state, and the first everything else.
        """
        parts, world, done = self._parts, self._parts.world, self._progress.done
        write, unfinished = self._writing(self._content()), None
        if not world.alone:
            unfinished = world.from_first(lambda: parts.directory.begin_checkpoint(done))
            try:
                write_shards(unfinished, parts.optimizer.tensors(), world)
            except BaseException:
                if world.first:
                    parts.directory.give_up(unfinished)
                raise

        def place() -> Path:
            self._metrics.sync()
            return parts.directory.save_checkpoint(done, self._state(), write, keep=keep, begun=unfinished)

        return world.from_first(place)

    def _state(self) -> dict[str, object]:
        """The content of `trainer_state.json` besides the names of the files."""
        progress = self._progress
        return {
            "seconds": progress.seconds,
            "tokens": progress.tokens,
            "learned_parameters": self._parts.learned_parameters,
            "line": progress.line,
            "config": self._parts.directory.stored_config.record(self._parts.config),
        }

    def _writing(self, content: Content) -> Callable[[Path], None]:
        """A function that writes every other file of the checkpoint into a folder, with what is so now."""
        parts, progress = self._parts, self._progress
        backbone = backbone_identity(parts.backbone, parts.config.backbone)
        training = {
            "steps": progress.done,
            "tokens": progress.tokens,
            "trainable": parts.config.train.trainable,
            "config": parts.config.model_dump(mode="json"),
            "provenance": dict(parts.backbone.provenance(parts.config.backbone)),
            "model": list(parts.backbone.describe_model(parts.model)),
        }

        def write(folder: Path) -> None:
            write_content(
                folder,
                parts.injection,
                content,
                weights=parts.backbone_weights,
                backbone=backbone,
                training=training,
            )
            write_averages(
                folder,
                parts.injection,
                parts.learnable,
                state=content.averages,
                adapters=content.adapters,
                trained=content.trained,
                decay=parts.config.train.ema_decay,
                backbone=backbone,
                training=training,
                weights=parts.backbone_weights,
            )

        return write

    def _of_any(self, names: list[str]) -> list[str]:
        """The names that one of the processes has."""
        if not self._parts.world.any(bool(names)):
            return []
        return list(dict.fromkeys(name for each in self._parts.world.gather(names) for name in each))

    def _require_finite(self) -> None:
        parts, done = self._parts, self._progress.done
        weights = [
            *parts.injection.state_dict().items(),
            *parts.trained_tensors().items(),
            *parts.optimizer.tensors().items(),
        ]
        names = self._of_any(not_finite((name, own_part(tensor)) for name, tensor in weights))
        key = "train.lr" if names else "ttt.base_lr"
        names = names or self._of_any(not_finite(tensors_of(self._progress.states)))
        if names:
            on = way_on(parts.directory, parts.config, lowered(parts.config, key), before=done)
            raise NonFiniteError(
                f"step {done}: what the step left is not finite ({listed(names)}), so it is not saved; lower "
                f"{key}; {on}"
            )
