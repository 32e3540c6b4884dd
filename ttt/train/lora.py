"""LoRA of a run: where it goes, with which rank, and what it starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ttt import inject
from ttt.config.lora import LoraSettings
from ttt.config.schema import RunConfig
from ttt.costs import matched_rank
from ttt.errors import ConfigError, UsageError
from ttt.files import read_tensors
from ttt.inject import Injection
from ttt.lora import Lora, LoraPlan, shapes_of
from ttt.lora_file import LoraFile, read_lora_file
from ttt.plugins import Backbone, LowRank, Site, capability


def lora_plan(config: RunConfig, backbone: Backbone, model: nn.Module, sites: Sequence[Site]) -> LoraPlan | None:
    """Where LoRA goes in a model that has no TTT yet; None if the config has no LoRA.

    Raises:
        ConfigError: `lora.rank: match` has no TTT layer to match.
        UsageError: the backbone has no LoRA, or no linear layer where `lora.linears` says.
    """
    if not config.has_lora:
        return None
    found = tuple(capability(backbone, LowRank).lora_sites(model, config.lora.linears))
    if not found:
        raise UsageError(
            f"lora.linears: {config.lora.linears}: the backbone {backbone.name} names no linear layer there; write "
            f"another lora.linears"
        )
    rank, matched_to = config.lora.rank, None
    if rank == "match":
        matched_to = _parameters_of_ttt(config, backbone, sites)
        rank = matched_rank(shapes_of(found), matched_to)
    return LoraPlan(found, LoraSettings(rank, config.lora.scaling, config.lora.linears), matched_to)


def _parameters_of_ttt(config: RunConfig, backbone: Backbone, sites: Sequence[Site]) -> int:
    """Parameters of the TTT layers that the `ttt` section describes, whether the run has them or not."""
    planned = inject.plan(sites, config.ttt, causal=backbone.causal)
    if not planned.sites:
        raise ConfigError(NOTHING_TO_MATCH)
    with torch.device("meta"):
        adapters = [inject.bare_adapter(site, config.ttt) for site in planned.sites]
    return sum(parameter.numel() for adapter in adapters for parameter in adapter.parameters())


NOTHING_TO_MATCH = "lora.rank: match: ttt.layers names no layer, so there are no parameters to match; write a number"


def load_lora_start(injection: Injection, backbone: Backbone, config: RunConfig) -> None:
    """Fill LoRA with the values of `lora.init_from`.

    Raises:
        ConfigError: the file has another rank, scaling, or other linear layers than the config.
        EnvironmentProblem: it is missing, damaged, or no LoRA.
    """
    path = config.lora.init_from
    if path is None or injection.lora is None:
        return
    file = read_lora_file(Path(path))
    problem = file.problem_with(injection.lora.settings.rank, injection.lora.settings.scaling)
    if problem is not None:
        raise ConfigError(f"lora.init_from: {problem.message}; {problem.fix}")
    tensors = capability(backbone, LowRank).read_lora(injection.model, read_tensors(file.path))
    _require_same(file, {name: tuple(value.shape) for name, value in tensors.items()}, injection)
    with torch.no_grad():
        for name, parameter in injection.lora_parameters.items():
            parameter.copy_(tensors[name])


def _require_same(file: LoraFile, theirs: dict[str, tuple[int, ...]], injection: Injection) -> None:
    ours = {name: tuple(parameter.shape) for name, parameter in injection.lora_parameters.items()}
    missing = [name for name in ours if name not in theirs]
    unknown = [name for name in theirs if name not in ours]
    if missing or unknown:
        told = [f"lacks {len(missing)} of them, as {missing[0]}"] if missing else []
        told += [f"holds {len(unknown)} others, as {unknown[0]}"] if unknown else []
        raise ConfigError(
            f"lora.init_from: {file.path}: is not LoRA of the {len(ours) // 2} linear layers that lora.linears: "
            f"{injection.lora.settings.linears if injection.lora else ''} names: it {' and '.join(told)}; write the "
            f"lora.linears with which it was trained (moshi-finetune's is all)"
        )
    wrong = next((name for name, shape in ours.items() if theirs[name] != shape), None)
    if wrong is not None:
        raise ConfigError(
            f"lora.init_from: {file.path}: {wrong} is {list(theirs[wrong])}, here {list(ours[wrong])}; it is LoRA of "
            f"another model"
        )


def lora_in_words(lora: Lora) -> str:
    """What LoRA a run has: its rank, linear layers and parameters, and what they were matched to."""
    count = sum(parameter.numel() for parameter in lora.parameters().values())
    matched = "" if lora.matched_to is None else f" (matched to TTT's {lora.matched_to:,})"
    linears = "linear" if len(lora.sites) == 1 else "linears"
    return f"LoRA of rank {lora.settings.rank} in {len(lora.sites)} {linears}: {count:,} parameters{matched}"


def mean_share(lora: Lora) -> float:
    """How far LoRA has moved its linear layers: the mean of `‖scaling · B A‖ / ‖W‖`."""
    shares = lora.shares().values()
    return math.fsum(shares) / len(shares)
