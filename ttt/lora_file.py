"""Files of LoRA as moshi-finetune writes them: `lora.safetensors`, and a `config.json` beside it. Imports no torch.

Each linear layer has `PATH.lora_A.weight`, `[rank, in]`, and `PATH.lora_B.weight`, `[out, rank]`. The scaling is in the
`config.json` alone; an adapter of this project that holds nothing but LoRA is such a file too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ttt.config.misfit import Misfit
from ttt.errors import EnvironmentProblem
from ttt.files import Header, read_header, read_json

LORA = "lora.safetensors"
ADAPTER = "adapter_model.safetensors"
FACTORS = (".lora_A.weight", ".lora_B.weight")
_SHOWN = 3


@dataclass(frozen=True)
class LoraFile:
    """What a file of LoRA is, from its header."""

    path: Path
    rank: int
    scaling: float | None
    """None if nothing beside the file says it."""

    def problem_with(self, rank: int | Literal["match"], scaling: float) -> Misfit | None:
        """What of a config's `lora` section does not fit the file; None if nothing does not.

        A rank that is yet to be matched is not compared.
        """
        if rank not in ("match", self.rank):
            return Misfit(
                f"{self.path} has rank {self.rank}, the config's is {rank}",
                keys=("rank",),
                fix=f"write rank: {self.rank}",
            )
        if self.scaling is not None and self.scaling != scaling:
            return Misfit(
                f"{self.path} was trained with a scaling of {self.scaling:g}, the config has {scaling:g}",
                keys=("scaling",),
                fix=f"write scaling: {self.scaling:g}",
            )
        return None


def read_lora_file(path: Path) -> LoraFile:
    """What a file of LoRA, or the one in a folder, says of itself; reads no tensor.

    Raises:
        EnvironmentProblem: it is missing, damaged, or holds something else; one sentence says which.
    """
    file = _in_folder(path) if path.is_dir() else path
    header = read_header(file)
    factors = {name: facts.shape for name, facts in header.tensors.items() if name.endswith(FACTORS)}
    others = [name for name in header.tensors if name not in factors]
    if not factors:
        raise EnvironmentProblem(f"{file}: no LoRA: none of its tensors is a lora_A.weight or lora_B.weight")
    if others:
        told = "1 tensor that is" if len(others) == 1 else f"{len(others)} tensors that are"
        named = ", ".join(others[:_SHOWN]) + (", …" if len(others) > _SHOWN else "")
        raise EnvironmentProblem(f"{file}: holds {told} not LoRA ({named}); {_why(header)}")
    ranks = {shape[1] for name, shape in factors.items() if name.endswith(FACTORS[1]) and len(shape) == 2}
    if len(ranks) != 1:
        raise EnvironmentProblem(f"{file}: no LoRA of one rank: its layers have the ranks {sorted(ranks)}")
    return LoraFile(file, ranks.pop(), _scaling(file, header))


def _in_folder(folder: Path) -> Path:
    """The file of LoRA in a folder: moshi-finetune's, or an adapter's of this project."""
    found = next((folder / name for name in (LORA, ADAPTER) if (folder / name).exists()), None)
    if found is None:
        raise EnvironmentProblem(
            f"{folder}: holds neither {LORA} nor {ADAPTER}; name the file, or start from a run with train.init_from"
        )
    return found


def _why(header: Header) -> str:
    if header.metadata.get("format") == "ttt-adapter":
        return "an adapter with TTT layers: start from it with train.init_from"
    return "embeddings that learned too, with moshi-finetune's ft_embed, have no place in LoRA here"


def _scaling(file: Path, header: Header) -> float | None:
    settings = _settings_in(header)
    if settings is None:
        beside = file.with_name("config.json")
        settings = read_json(beside) if beside.is_file() else {}
    found = settings.get("lora_scaling", settings.get("scaling"))
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _settings_in(header: Header) -> Mapping[str, Any] | None:
    """LoRA's settings in the header of an adapter of this project."""
    try:
        settings = json.loads(header.metadata["adapter_config"])["lora"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return settings if isinstance(settings, Mapping) else None
