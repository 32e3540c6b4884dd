"""A config's model with what it has learned, for use: its samples, its evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ttt.adapter_file import (
    AdapterInfo,
    backbone_identity,
    changed_at_start,
    config_differences,
    load_adapter,
    read_info,
    way_to_fit,
)
from ttt.config.schema import RunConfig, select_layers
from ttt.errors import AdapterMismatchError
from ttt.inject import Injection
from ttt.plugins import Backbone
from ttt.train.setup import build, choose_device, memory_errors, threads, with_backbone_options


def fitting(
    config: RunConfig, backbone: Backbone, *, adapter: str | Path | None, verify: bool
) -> tuple[RunConfig, AdapterInfo | None]:
    """The config with the backbone's options, and the adapter that fits it, before a model is built.

    Args:
        config: resolved.
        backbone: the plugin that it names.
        adapter: an adapter's file or folder, or a run's folder; None takes what training would start from.
        verify: compare the adapter with its checksums.

    Returns:
        The config, and the adapter; None if training would start from nothing.

    Raises:
        AdapterMismatchError: the adapter belongs to another model; the message names each difference.
    """
    config = with_backbone_options(config, backbone)
    path = config.train.init_from if adapter is None else adapter
    info = None if path is None else read_info(path, verify=verify)
    if info is not None:
        # settings may differ only for weights that training would start from
        _require_fit(info, config, backbone, as_start=adapter is None)
    return config, info


@contextlib.contextmanager
def learned_model(
    config: RunConfig, backbone: Backbone, info: AdapterInfo | None, *, as_start: bool, ways: Sequence[str]
) -> Iterator[tuple[nn.Module, Injection]]:
    """A context with the model, its adapter loaded, in eval mode; running out of memory becomes a sentence.

    Args:
        config: from `fitting`.
        backbone: the plugin.
        info: from `fitting`.
        as_start: whether the adapter is what training would start from.
        ways: what takes less memory.
    """
    device = choose_device(config.train.device)
    with memory_errors(ways), threads(config.train.cpu_threads), torch.no_grad():
        model, injection = build(config, backbone, device)
        if info is not None:
            identity = backbone_identity(backbone, config.backbone)
            load_adapter(
                info.path, model, injection=injection, backbone=identity, as_start=as_start, verify=False
            )  # verified by `fitting`, if at all
        yield model.eval(), injection


def _require_fit(info: AdapterInfo, config: RunConfig, backbone: Backbone, *, as_start: bool) -> None:
    layers = select_layers(config.injected.layers, backbone.facts(config).num_layers)
    identity = backbone_identity(backbone, config.backbone)
    lora = config.lora if config.has_lora else None
    differences = config_differences(info, config.ttt, backbone=identity, layers=layers, lora=lora, as_start=as_start)
    way_out = way_to_fit(info, config.ttt, has_ttt=bool(layers), lora=lora, as_start=as_start)
    if differences:
        raise AdapterMismatchError(
            f"{info.path}: belongs to something else: {'; '.join(differences)}{way_out and f'; {way_out}'}"
        )
    changed = changed_at_start(info, config.ttt)
    if changed:  # training may go on with other settings, but a sample needs those of the training
        raise AdapterMismatchError(
            f"{info.path}: was trained with other settings than the config's: {'; '.join(map(str, changed))}; give "
            f"the config the file's: {' '.join(setting.way_out for setting in changed)}"
        )


def imported_from(info: AdapterInfo | None) -> str | None:
    """The program that an adapter was imported from, according to its header; None for a run's own checkpoints."""
    told = None if info is None else info.training.get("imported_from")
    return told if isinstance(told, str) else None
