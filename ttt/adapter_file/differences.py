"""How an adapter file and a config or a model differ, in words; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttt.adapter_file.format import AdapterInfo, SiteInfo
from ttt.config.lora import Adapter, LoraConfig, LoraSettings
from ttt.config.schema import TTTConfig
from ttt.dotted import dotted
from ttt.files import TensorFacts
from ttt.printable import shell_word

_FREE_SETTINGS = frozenset({"preset", "layers", "num_heads", "scan_checkpoint_group_size", "skip_nonfinite_tokens"})
"""Settings that need not agree: a name, one that costs memory alone, two that the sites say exactly, and one that no
finite token meets."""
_FREE_AT_START = _FREE_SETTINGS | {"mini_batch_size", "base_lr", "initial_gating_alpha", "persistent_states"}
"""Settings that a run may have otherwise than what it starts from: no tensor depends on them."""
_COMPUTED_WITH = ("mini_batch_size", "base_lr")
"""Those of them by which the same tensors compute something else."""


def free_settings(*, as_start: bool) -> frozenset[str]:
    """TTT settings that need not be the file's; with `as_start`, for a run that goes on from the adapter."""
    return _FREE_AT_START if as_start else _FREE_SETTINGS


def config_differences(
    info: AdapterInfo,
    ttt: TTTConfig,
    *,
    backbone: Mapping[str, Any],
    layers: Sequence[int],
    lora: LoraConfig | None = None,
    as_start: bool = False,
) -> list[str]:
    """What keeps an adapter from being loaded into a config's model, as far as settings say; needs no torch.

    Args:
        info: of the adapter.
        ttt: the config's settings.
        backbone: name and options of its backbone, as `backbone_identity` gives them.
        layers: its TTT layers.
        lora: its LoRA; None if it has none.
        as_start: as in `load_adapter`.

    Returns:
        A sentence for each difference that matters. If there is none, it can be loaded, provided that its tensors are
        what it says.
    """
    before, here = sorted(site.layer for site in info.sites), sorted(layers)
    differences = option_differences(info.backbone, backbone) + adapter_differences(info, bool(here), lora)
    if info.kind != kind_of(bool(here), lora):
        return differences
    if says_of_ttt(info):
        differences += setting_differences(info.ttt, ttt, free_settings(as_start=as_start))
    return differences + ([] if before == here else [_difference("ttt.layers", before, here)])


def kind_of(has_ttt: bool, lora: LoraConfig | LoraSettings | None) -> Adapter:
    """What is added to a backbone, as `adapter` in a config says it."""
    if lora is None:
        return "ttt"
    return "ttt+lora" if has_ttt else "lora"


def says_of_ttt(info: AdapterInfo) -> bool:
    """Whether an adapter's TTT settings mean something: not those of LoRA alone."""
    return info.kind != "lora"


def adapter_differences(info: AdapterInfo, has_ttt: bool, lora: LoraConfig | LoraSettings | None) -> list[str]:
    """How what a file adds to the backbone differs from what a config or a model adds: TTT, LoRA and its settings."""
    return [
        _difference(key, value, kind_of(has_ttt, lora) if key == "adapter" else getattr(lora, key.partition(".")[2]))
        for key, value in _other_lora(info, has_ttt, lora).items()
    ]


def _other_lora(info: AdapterInfo, has_ttt: bool, lora: LoraConfig | LoraSettings | None) -> dict[str, Any]:
    """The keys of LoRA that differ, as the file has them. A rank that is yet to be matched differs from none."""
    if info.kind != kind_of(has_ttt, lora):
        return {"adapter": info.kind}
    return {
        f"lora.{key}": getattr(info.lora, key)
        for key in (("rank", "scaling", "linears") if lora is not None else ())
        if getattr(lora, key) not in ("match", getattr(info.lora, key))
    }


def way_to_fit(
    info: AdapterInfo,
    ttt: TTTConfig,
    *,
    has_ttt: bool = True,
    lora: LoraConfig | LoraSettings | None = None,
    as_start: bool = False,
) -> str:
    """What to write so that a config's settings are those of an adapter; empty if they are."""
    keys = _other_lora(info, has_ttt, lora)
    if says_of_ttt(info):
        free = free_settings(as_start=as_start)
        keys |= {f"ttt.{key}": value for key, value in differing(info.ttt, ttt, free).items()}
    given = (f"--set {shell_word(f'{key}={json.dumps(value)}')}" for key, value in keys.items())
    return f"give the config the file's: {' '.join(given)}" if keys else ""


@dataclass(frozen=True)
class ChangedSetting:
    """A setting that may change at the start of a run, and by which the same tensors then compute something else."""

    key: str
    """In the config, dotted."""
    theirs: Any
    """In the adapter's file."""
    ours: Any
    """In the config."""

    def __str__(self) -> str:
        return _difference(self.key, self.theirs, self.ours)

    @property
    def way_out(self) -> str:
        """The option of a command by which it computes as the file says."""
        return f"--set {self.key}={json.dumps(self.theirs)}"


def changed_at_start(info: AdapterInfo, ttt: TTTConfig) -> list[ChangedSetting]:
    """The settings by which a run that starts from an adapter computes something else from the same tensors."""
    return [
        ChangedSetting(f"ttt.{key}", getattr(info.ttt, key), getattr(ttt, key))
        for key in _COMPUTED_WITH
        if says_of_ttt(info) and getattr(info.ttt, key) != getattr(ttt, key)
    ]


def option_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """How two backbones differ in name and options."""
    before, here = dotted(theirs), dotted(ours)
    return [
        _difference(f"backbone.{key}", before.get(key), here.get(key))
        for key in sorted(before.keys() | here.keys(), key=lambda key: (key != "name", key))
        if before.get(key) != here.get(key)
    ]


def setting_differences(theirs: TTTConfig, ours: TTTConfig, free: frozenset[str]) -> list[str]:
    """How TTT settings differ, those that are free left out."""
    here = ours.model_dump(mode="json")
    return [_difference(f"ttt.{key}", before, here[key]) for key, before in differing(theirs, ours, free).items()]


def differing(theirs: TTTConfig, ours: TTTConfig, free: frozenset[str]) -> dict[str, Any]:
    """The settings that differ, as the file has them."""
    before, here = theirs.model_dump(mode="json"), ours.model_dump(mode="json")
    return {key: value for key, value in before.items() if value != here[key] and key not in free}


def prepared_differences(theirs: tuple[int, ...], here: tuple[int, ...]) -> list[str]:
    """Whether other layers than those of a file with LoRA alone have what the backbone gives layers with TTT."""
    if theirs == here:
        return []
    named = [", ".join(map(str, layers)) or "none" for layers in (theirs, here)]
    return [f"layers that are as those with TTT: {named[0]} in the file, {named[1]} here (ttt.layers names them)"]


def site_differences(theirs: Sequence[SiteInfo], ours: Sequence[SiteInfo]) -> list[str]:
    """How the adapters' sites differ."""
    layers, here = sorted(site.layer for site in theirs), sorted(site.layer for site in ours)
    if layers != here:
        return [_difference("ttt.layers", layers, here)]
    found = []
    for before, now in zip(sorted(theirs, key=lambda s: s.layer), sorted(ours, key=lambda s: s.layer), strict=True):
        for key in ("name", "dim", "num_heads"):
            if getattr(before, key) != getattr(now, key):
                found.append(_difference(f"layer {now.layer}: {key}", getattr(before, key), getattr(now, key)))
    return found


def shapes(tensors: Mapping[str, TensorFacts]) -> dict[str, tuple[int, ...]]:
    """The shapes alone."""
    return {name: facts.shape for name, facts in tensors.items()}


def tensor_differences(
    theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]], *, complete: bool
) -> list[str]:
    """How tensors differ in names and shapes; with `complete`, each of ours must be in the file."""
    found = [f"tensor {name}: not in the file" for name in ours if complete and name not in theirs]
    for name, shape in theirs.items():
        if name not in ours:
            found.append(f"tensor {name}: in the file, not here")
        elif shape != ours[name]:
            found.append(_difference(f"tensor {name}: shape", list(shape), list(ours[name])))
    return found if len(found) <= 8 else [*found[:8], f"and {len(found) - 8} tensors more"]


def _difference(what: str, theirs: Any, ours: Any) -> str:
    return f"{what}: {json.dumps(theirs)} in the file, {json.dumps(ours)} here"
