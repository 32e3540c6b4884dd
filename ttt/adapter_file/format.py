"""The format of adapter files: names, version, and the description of an adapter in its header."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt.config.lora import Adapter, LoraSettings
from ttt.config.schema import BackboneOptions, TTTConfig
from ttt.files import TensorFacts

if TYPE_CHECKING:
    from ttt.plugins import Backbone, Site

MODEL = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
BACKBONE = "backbone_model.safetensors"

FORMAT = "ttt-adapter"
VERSION = 4
"""Of the files' layout; a file with a greater one is refused. From 2 on each file carries a checksum, and from 3 on the
normalised target has an ε of its own (`with_its_target_eps`). Only files with LoRA are of version 4."""
VERSION_WITHOUT_LORA = 3
MAX_HEADER = 8_000_000
"""Bytes of a header's JSON: settings, and some 60,000 tensors."""
MAX_SITES = 10_000
"""Adapters in one file."""
SETTINGS = "adapter_config"
"""Key of the settings in the safetensors header, which holds text only."""


@dataclass(frozen=True)
class SiteInfo:
    """Where one adapter is."""

    layer: int
    name: str
    """Dotted path of the adapter in the model."""
    dim: int
    """Model width D there."""
    num_heads: int
    """Heads of the TTT layer."""


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says of itself."""

    path: Path
    """The safetensors file."""
    version: int
    """Of the files' layout."""
    checksum: str | None
    """Of the safetensors file's content, as it was written; None in files of version 1."""
    ttt_version: str
    """The version of `ttt-adapters` that wrote it."""
    backbone: Mapping[str, Any]
    """Name and options of the backbone that it was trained on."""
    backbone_weights: str | None
    """Fingerprint of that backbone's weights (`weights_fingerprint`); None if they were not known."""
    backbone_trained: str | None
    """Ties it to the `backbone_model.safetensors` that it needs; None if the backbone was frozen."""
    backbone_dtype: str | None
    """The dtype of that backbone's parameters, as `bfloat16`; None in files that do not say."""
    ttt: TTTConfig
    """Every TTT setting; if there are no sites, no layer has TTT and they say nothing."""
    sites: tuple[SiteInfo, ...]
    lora: LoraSettings | None
    """Of the LoRA among its tensors; None if there is none."""
    prepared: tuple[int, ...]
    """With LoRA alone: the layers that have what the backbone gives layers with TTT (`Site.prepare`)."""
    training: Mapping[str, Any]
    """How it was trained, as far as the writer said."""
    tensors: Mapping[str, TensorFacts]

    @property
    def kind(self) -> Adapter:
        """What it adds to the backbone, as `adapter` in a config says it."""
        if self.lora is None:
            return "ttt"
        return "ttt+lora" if self.sites else "lora"

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(facts.shape) for facts in self.tensors.values())


def backbone_identity(backbone: Backbone, options: BackboneOptions) -> dict[str, Any]:
    """Name and options of a backbone as an adapter file keeps them: those that say which model it is."""
    return {**backbone.identity(options), "name": backbone.name}


def site_infos(sites: Sequence[Site], config: TTTConfig) -> list[SiteInfo]:
    """What an adapter file says of the sites of a model."""
    return [SiteInfo(site.layer, site.name, site.dim, config.num_heads or site.num_heads) for site in sites]
