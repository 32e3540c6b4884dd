"""Finding the model that a command names: a config, a run with its last checkpoint, or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ttt.printable import shell_word

if TYPE_CHECKING:
    from ttt.config import RunConfig

_DOES = {"sample": "sample", "eval": "evaluate"}
"""What a command does with a model."""


def warn_of_changes(model: Path, learned: Path | None, config: RunConfig) -> None:
    """Warn if a run's config is not the one that the run wrote."""
    import warnings

    from ttt.checkpoint_folder import TRAINER_STATE, read_checkpoint
    from ttt.errors import DamagedFileWarning
    from ttt.train.stored_config import StoredConfig

    if model.is_dir() and learned is not None and (learned / TRAINER_STATE).is_file():
        changed = StoredConfig(model).change_since(read_checkpoint(learned), config)
        if changed:
            warnings.warn(changed, DamagedFileWarning, stacklevel=2)


def find_model(
    path: Path, adapter: str | None, *, verify: bool, command: str = "sample"
) -> tuple[Path, Path | None, str]:
    """The config of a model, the adapter or checkpoint that it has learned, and a sentence about it.

    Args:
        path: a config, or a run's folder.
        adapter: what it has learned, instead of the run's last checkpoint.
        verify: compare the checkpoint with its checksums.
        command: what is done with the model, for messages: `sample`, `eval`.

    Raises:
        UsageError: the path is a folder, but not a run's, or the run has nothing to use yet.
    """
    from ttt.adapter_file import BACKBONE, MODEL
    from ttt.checkpoint_folder import CHECKPOINTS, newest_checkpoint
    from ttt.errors import UsageError
    from ttt.train.stored_config import CONFIG

    file, learned = path, None
    if path.is_dir():
        file = path / CONFIG
        if not file.is_file():
            raise UsageError(f"{path}: holds no run (no {CONFIG}); name a config or a run's folder")
        if adapter is None:
            newest = newest_checkpoint(path, verify=verify, only=(MODEL, BACKBONE))
            if newest.checkpoint is None:
                raise UsageError(
                    f"{path}: has no complete checkpoint{newest.why_none}; name {file} to {_DOES[command]} the model "
                    f"before training"
                )
            learned = newest.checkpoint.path
            newest.warn_of_passed_over(stacklevel=2)
    if adapter is not None:
        learned = Path(adapter)
    if learned is not None:
        return file, learned, f"{path}: with what was learned in {learned}"
    does = f"{_DOES[command]}s"
    run = f" (`ttt {command} {shell_word(path.parent)}` {does} the run)" if (path.parent / CHECKPOINTS).is_dir() else ""
    return file, None, f"{path}: no adapter: it {does} the untrained model{run}"
