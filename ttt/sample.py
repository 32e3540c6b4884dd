"""Making a sample: the model of a config, with what it has learned, and the backbone's own sampler."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from ttt.adapter_file import (
    AdapterInfo,
    backbone_identity,
    changed_at_start,
    config_differences,
    load_adapter,
    read_info,
    way_to_fit,
)
from ttt.backbone import Backbone, SampleRequest
from ttt.config.schema import RunConfig, select_layers
from ttt.errors import AdapterMismatchError
from ttt.files import require_place
from ttt.train.passes import seed_pass
from ttt.train.setup import build, choose_device, memory_errors, narrowed, threads


def sample(
    config: RunConfig,
    backbone: Backbone,
    request: SampleRequest,
    *,
    adapter: str | Path | None = None,
    console: Console | None = None,
    verify: bool = True,
) -> list[Path]:
    """Make a sample with a config's model.

    Args:
        config: of the model; the resolved config of the run, where it samples what a run has learned.
        backbone: the plugin that `config.backbone` names.
        request: what is asked for, with as many prompts as `backbone.plan_sample` says.
        adapter: what it has learned: an adapter's file or folder, or a run's folder (then its last checkpoint). None
            samples the model as training would start it.
        console: where to report; standard output by default.
        verify: compare what it has learned with its checksums.

    Returns:
        The files written, the sample first.

    Raises:
        UsageError: the backbone cannot sample, or not what is asked for.
        AdapterMismatchError: the adapter belongs to something else; the message names each difference.
        EnvironmentProblem: something is missing: weights, a device, memory, disk space, a place that can be written.
    """
    console = console or Console()
    backbone.check_sample(config, request)
    require_place(request.out)
    config = narrowed(config, backbone)
    as_start = adapter is None  # only weights that training would start from may differ in settings
    path = config.train.init_from if adapter is None else adapter
    info = None if path is None else read_info(path, verify=verify)
    if info is not None:
        _require_fit(info, config, backbone, as_start=as_start)  # before anything large is built
    device = choose_device(config.train.device)
    ways = ["a shorter sample"] + ["train.param_dtype: bfloat16"] * (config.train.param_dtype == "float32")
    with memory_errors(ways), threads(config.train.cpu_threads), torch.no_grad():
        model, injection = build(config, backbone, device)
        if info is not None:
            identity = backbone_identity(backbone, config.backbone)
            load_adapter(
                info.path, model, injection=injection, backbone=identity, as_start=as_start, verify=False
            )  # verified above
        seed_pass(request.seed, "sample", 0)
        return list(backbone.sample(model.eval(), request, config, console=console))


def _require_fit(info: AdapterInfo, config: RunConfig, backbone: Backbone, *, as_start: bool) -> None:
    layers = select_layers(config.ttt.layers, backbone.facts(config).num_layers)
    identity = backbone_identity(backbone, config.backbone)
    differences = config_differences(info, config.ttt, backbone=identity, layers=layers, as_start=as_start)
    way_out = way_to_fit(info, config.ttt, as_start=as_start)
    if differences:
        raise AdapterMismatchError(
            f"{info.path}: belongs to something else: {'; '.join(differences)}{way_out and f'; {way_out}'}"
        )
    changed = changed_at_start(info, config.ttt)
    if changed:  # training may go on with others; a sample of it is made with those that it was trained with
        raise AdapterMismatchError(
            f"{info.path}: was trained with other settings than the config's: {'; '.join(map(str, changed))}; give "
            f"the config the file's: {' '.join(setting.way_out for setting in changed)}"
        )
