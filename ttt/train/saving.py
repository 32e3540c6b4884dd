"""Checkpoints within a run: written when due, taken for good when proved, and gone on from."""

from __future__ import annotations

import time
from pathlib import Path

from ttt.adapter_file import backbone_identity
from ttt.checkpoint_folder import Checkpoint
from ttt.errors import NonFiniteError
from ttt.files import require_space
from ttt.train.checkpoint import content_bytes, read_content, write_content
from ttt.train.divergence import listed, lowered, not_finite, tensors_of, way_on
from ttt.train.metrics import MetricsFile
from ttt.train.parts import Parts
from ttt.train.pictures import Pictures
from ttt.train.progress import Progress

_DRAW_SECONDS = 60.0
"""How old the pictures may be when a checkpoint is written."""


def require_space_for_one(parts: Parts) -> None:
    """Refuse to begin a run whose checkpoints do not fit on the disk.

    Raises:
        EnvironmentProblem: not enough is free for one.
    """
    needed = content_bytes(parts.injection, parts.trained_tensors(), parts.optimizer)
    require_space(parts.directory.path, needed, what="one checkpoint of this run")


def restored(parts: Parts, checkpoint: Checkpoint) -> Progress:
    """Load everything that a checkpoint holds into the parts of a run; how far the run was.

    Raises:
        EnvironmentProblem: a file of it is damaged.
        AdapterMismatchError: the backbone is not the one that the run was started with.
    """
    states = read_content(
        checkpoint.path,
        parts.injection,
        parts.optimizer,
        backbone=backbone_identity(parts.backbone, parts.config.backbone),
        persistent=parts.config.ttt.persistent_states,
        device=parts.device,
        verify=False,  # done, or not asked for, when it was found
    )
    return Progress(
        done=checkpoint.step,
        seconds=float(checkpoint.state["seconds"]),
        tokens=int(checkpoint.state["tokens"]),
        states=states,
        line=dict(checkpoint.state["line"]),
    )


class Saver:
    """Writes the checkpoints of a run.

    Weights are proved once a step or an evaluation that read them was finite (`prove`). Until then the checkpoint
    before is not pruned; and when a run is rescued, none is.

    Args:
        parts: of the run.
        progress: how far it is.
        metrics: is on the disk before each checkpoint, so that a power cut never leaves one that is ahead of its lines.
        pictures: are drawn anew at a checkpoint if they are old.
        resumed: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        parts: Parts,
        progress: Progress,
        *,
        metrics: MetricsFile,
        pictures: Pictures,
        resumed: Checkpoint | None,
    ) -> None:
        self._parts = parts
        self._progress = progress
        self._metrics = metrics
        self._pictures = pictures
        self._step = 0 if resumed is None else resumed.step
        self._proven = resumed is None
        self._drawn = time.monotonic()
        self.saved: Path | None = None if resumed is None else resumed.path
        """The last checkpoint."""

    def save(self, *, rescuing: bool = False) -> None:
        """Write the checkpoint of the steps done, unless it is there already.

        Raises:
            NonFiniteError: what would be saved is not finite; nothing was written.
            EnvironmentProblem: the disk is full or cannot be written.
        """
        done = self._progress.done
        if done == self._step:  # none is done, or they are saved
            return
        self._require_finite()
        keep = self._parts.config.train.ckpt_keep
        unproven = None if keep is None or rescuing else max(keep, 2)
        self._metrics.sync()
        self.saved = self._parts.directory.save_checkpoint(done, self._state(), self._write, keep=unproven)
        self._step = done
        self._proven = unproven == keep
        if time.monotonic() - self._drawn > _DRAW_SECONDS and self._metrics.last_step:
            self._pictures.draw()
            self._drawn = time.monotonic()

    def prove(self) -> None:
        """Take the last checkpoint for good, now that its weights gave finite numbers, and drop the oldest."""
        if not self._proven:
            self._parts.directory.prune(self._parts.config.train.ckpt_keep)
            self._proven = True

    def _state(self) -> dict[str, object]:
        """What `trainer_state.json` holds beside the names of the files."""
        progress = self._progress
        return {
            "seconds": progress.seconds,
            "tokens": progress.tokens,
            "line": progress.line,
            "config": self._parts.config.model_dump(mode="json"),
        }

    def _write(self, folder: Path) -> None:
        """Write every other file."""
        parts, progress = self._parts, self._progress
        write_content(
            folder,
            parts.injection,
            parts.trained_tensors(),
            parts.optimizer,
            progress.states if parts.config.ttt.persistent_states else None,
            backbone=backbone_identity(parts.backbone, parts.config.backbone),
            training={
                "steps": progress.done,
                "tokens": progress.tokens,
                "trainable": parts.config.train.trainable,
                "config": parts.config.model_dump(mode="json"),
                "provenance": dict(parts.backbone.provenance(parts.config.backbone)),
            },
        )

    def _require_finite(self) -> None:
        parts, done = self._parts, self._progress.done
        weights = [
            *parts.injection.state_dict().items(),
            *parts.trained_tensors().items(),
            *parts.optimizer.tensors().items(),
        ]
        names = not_finite(weights)
        key = "train.lr" if names else "ttt.base_lr"
        names = names or not_finite(tensors_of(self._progress.states))
        if names:
            on = way_on(parts.directory, parts.config, lowered(parts.config, key), before=done)
            raise NonFiniteError(
                f"step {done}: what the step left is not finite ({listed(names)}), so it is not saved; lower "
                f"{key}; {on}"
            )
