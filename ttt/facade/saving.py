"""Writing the files of a model with TTT."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttt.adapter_file import save_adapter
from ttt.errors import UsageError
from ttt.facade.attached import Attached, beside_peft
from ttt.facade.card import write_card
from ttt.facade.options import SaveOptions
from ttt.files import write_tensors

BESIDE_PEFT = "ttt"
"""Folder of TTT's files in one of PEFT's, which has files of the same names."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""What `transformers.Trainer` calls its checkpoints."""
_FOR_TRAINER = "model.safetensors"
"""What it reads when it resumes from one, or loads the best one at the end."""


def as_path(folder: Any) -> Path:
    """The folder that is meant.

    Raises:
        UsageError: it is no path, or there is a file in its place.
    """
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise UsageError(f"save_pretrained takes the path of a folder, not {folder!r:.60}")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file, and save_pretrained writes a folder; name another place")
    return path


def save(attached: Attached, folder: Path, options: SaveOptions) -> None:
    """Write the adapter's files and its model card; none of the backbone's frozen weights.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written.
        UsageError: the `state_dict` given is not of this model, or PEFT's adapter is merged at the moment.
    """
    if not options.is_main_process:
        return
    _require_not_merged(attached.model)
    tensors = _gathered(attached, options.state_dict)
    trained = attached.trained_backbone()
    beside = beside_peft(attached.model)
    file = save_adapter(
        folder,
        attached.injection,
        backbone={**attached.backbone, **({"peft": beside} if beside else {})},
        backbone_tensors={name: value.detach() for name, value in trained.items()},
        training=_training(attached),
        tensors=tensors,
    )
    if _CHECKPOINT.fullmatch(folder.name):
        everything = {**(tensors or attached.injection.state_dict()), **{n: v.detach() for n, v in trained.items()}}
        write_tensors(folder / _FOR_TRAINER, everything, {"format": "pt"})
    loaded = attached.loaded
    write_card(file, loaded.figures if loaded is not None and loaded.is_still(attached.model) else ())


def _require_not_merged(model: nn.Module) -> None:
    """Refuse backbone weights that are others as long as PEFT's adapter is merged: TTT would belong to these.

    Raises:
        UsageError: it is merged.
    """
    if any("base_layer" in module._modules and getattr(module, "merged", False) for module in model.modules()):
        raise UsageError(
            "PEFT's adapter is merged into the backbone's weights, to which TTT would then belong; call "
            "unmerge_adapter() before save_pretrained, or merge_and_unload() to keep it merged"
        )


def _training(attached: Attached) -> dict[str, Any]:
    """How it was trained, as far as that is known; of what was loaded and trained further, what it began as."""
    loaded = attached.loaded
    if loaded is None:
        return attached.training
    if loaded.is_still(attached.model):
        return {**attached.training, **loaded.training}
    return {**attached.training, "began_as": dict(loaded.training)}


def _gathered(attached: Attached, given: Mapping[str, Any] | None) -> dict[str, Tensor] | None:
    """The adapters' values in a state dict of the model or of what wraps it.

    Raises:
        UsageError: it does not hold them.
    """
    if given is None:
        return None
    found = {}
    for name, own in attached.injection.state_dict().items():
        value = next((given[prefix + name] for prefix in ("", "base_model.model.") if prefix + name in given), None)
        if not isinstance(value, Tensor) or (value.shape != own.shape and own.numel()):
            raise UsageError(
                f"the state_dict given to save_pretrained does not hold {name} as the model does; leave it out"
            )
        found[name] = value
    return found
