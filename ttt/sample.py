"""Makes samples: builds a config's model, loads what it has learned, and runs the backbone's own sampler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
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
from ttt.errors import AdapterMismatchError, NonFiniteError, UsageError
from ttt.files import require_place
from ttt.plugins import Backbone, SampleRequest, Sampling, capability
from ttt.printable import say
from ttt.samples import SampleFolder, shared_origin
from ttt.train.passes import seed_pass
from ttt.train.setup import build, choose_device, memory_errors, threads, with_backbone_options


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
        config: the model's config; for a run, its resolved config.
        backbone: the plugin that `config.backbone` names.
        request: the sample to make, with as many prompts as its `plan_sample` says.
        adapter: an adapter's file or folder, or a run's folder, whose last checkpoint is used. None samples the model
            as training would start it.
        console: the console for reports; standard output by default.
        verify: compare the adapter with its checksums.

    Returns:
        The files written, the sample first.

    Raises:
        UsageError: the backbone cannot sample, or cannot make this sample.
        AdapterMismatchError: the adapter belongs to another model; the message names each difference.
        EnvironmentProblem: weights, a device, memory, disk space or a writable folder is missing.
    """
    console = console or Console()
    sampler = capability(backbone, Sampling)
    config, [request], info = _looked_at(config, backbone, [request], adapter=adapter, verify=verify)
    with _model(config, backbone, info, as_start=adapter is None) as model:
        make = sampler.prepare_samples(model, [request], config, console=console)
        seed_pass(request.seed, "sample", 0)
        return list(make(request))


def sample_many(
    config: RunConfig,
    backbone: Backbone,
    requests: Sequence[SampleRequest],
    *,
    adapter: str | Path | None = None,
    console: Console | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Make the samples of a folder that do not exist yet, one after another.

    Each gets a record of what it was made from; see `ttt.samples`. A sample whose numbers are not finite is not
    written, and the others are still made.

    Args:
        config: as for `sample`.
        backbone: as for `sample`.
        requests: the samples to make, each with its own `out` in one folder.
        adapter: as for `sample`.
        console: as for `sample`.
        verify: compare the adapter and the existing samples with their checksums.
        overwrite: make existing samples again if they were made from something else.

    Returns:
        The files written; existing samples are left out.

    Raises:
        UsageError: as for `sample`; or another file has the name of a sample.
        AdapterMismatchError: as for `sample`.
        EnvironmentProblem: as for `sample`; the samples made so far stay.
        NonFiniteError: some samples are not finite; it is raised after all others were made.
    """
    console = console or Console()
    as_start = adapter is None
    config, requests, info = _looked_at(config, backbone, requests, adapter=adapter, verify=verify)
    sampler = capability(backbone, Sampling)
    files = [sampler.plan_sample(config, seconds=each.seconds, out=each.out).files for each in requests]
    _require_apart(requests, files)
    origin = shared_origin(config, info, as_start=as_start)
    folder = SampleFolder(requests, files, origin=origin, adapter=None if info is None else info.path)
    with folder.held():
        missing = folder.missing(overwrite=overwrite, verify=verify)
        if len(missing) < len(requests):
            say(console, f"{folder.path}: {len(requests) - len(missing)} of {len(requests)} samples are there already")
        if not missing:
            return []
        with _model(config, backbone, info, as_start=as_start) as model:
            return _made(model, config, sampler, requests, missing, folder, console)


def _made(
    model: nn.Module,
    config: RunConfig,
    sampler: Sampling,
    requests: Sequence[SampleRequest],
    missing: Sequence[SampleRequest],
    folder: SampleFolder,
    console: Console,
) -> list[Path]:
    make = sampler.prepare_samples(model, missing, config, console=console)
    written: list[Path] = []
    failed: list[str] = []
    numbers = {request.out: number for number, request in enumerate(requests, 1)}
    for request in missing:
        say(console, f"sample {numbers[request.out]} of {len(requests)}: {request.out}, seed {request.seed}")
        seed_pass(request.seed, "sample", 0)
        try:
            with folder.making(request) as moved:
                files = [request.out.with_name(file.name) for file in make(moved)]
        except NonFiniteError as error:
            failed.append(f"{request.out}: {error}")
            say(
                console, f"{failed[-1]}; the others are made all the same" if request is not missing[-1] else failed[-1]
            )
            continue
        written += files
        say(console, f"wrote {', '.join(map(str, files))}")
    if failed:
        raise NonFiniteError.about(
            failed,
            f"of {len(requests)} samples could not be made; the others are whole, and the same command tries anew",
        )
    return written


def _require_apart(requests: Sequence[SampleRequest], files: Sequence[Sequence[Path]]) -> None:
    """Refuse samples with the same file, or in different folders.

    Raises:
        UsageError: two samples have the same file, or are in different folders.
    """
    seen: set[Path] = set()
    for request, several in zip(requests, files, strict=True):
        for file in (*several, request.out.with_suffix(".json")):
            if file in seen or file.parent != requests[0].out.parent:
                raise UsageError(f"{file}: two files of these samples would be it, or it is in another folder")
            seen.add(file)


def _looked_at(
    config: RunConfig,
    backbone: Backbone,
    requests: Sequence[SampleRequest],
    *,
    adapter: str | Path | None,
    verify: bool,
) -> tuple[RunConfig, list[SampleRequest], AdapterInfo | None]:
    """Check all that needs no model; returns the config with the backbone's options, the requests, the adapter."""
    sampler = capability(backbone, Sampling)
    for request in requests:
        sampler.check_sample(config, request)
    require_place(requests[0].out)
    config = with_backbone_options(config, backbone)
    path = config.train.init_from if adapter is None else adapter
    info = None if path is None else read_info(path, verify=verify)
    if info is not None:
        # settings may differ only for weights that training would start from
        _require_fit(info, config, backbone, as_start=adapter is None)
    return config, [replace(request, imported_from=_imported_from(info)) for request in requests], info


@contextlib.contextmanager
def _model(config: RunConfig, backbone: Backbone, info: AdapterInfo | None, *, as_start: bool) -> Iterator[nn.Module]:
    """A context with the model, its adapter loaded, in eval mode; running out of memory becomes a sentence."""
    device = choose_device(config.train.device)
    ways = ["a shorter sample"] + ["train.param_dtype: bfloat16"] * (config.train.param_dtype == "float32")
    with memory_errors(ways), threads(config.train.cpu_threads), torch.no_grad():
        model, injection = build(config, backbone, device)
        if info is not None:
            identity = backbone_identity(backbone, config.backbone)
            load_adapter(
                info.path, model, injection=injection, backbone=identity, as_start=as_start, verify=False
            )  # verified above
        yield model.eval()


def _imported_from(info: AdapterInfo | None) -> str | None:
    """The program that an adapter was imported from, according to its header; None for a run's own checkpoints."""
    told = None if info is None else info.training.get("imported_from")
    return told if isinstance(told, str) else None


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
    if changed:  # training may go on with other settings, but a sample needs those of the training
        raise AdapterMismatchError(
            f"{info.path}: was trained with other settings than the config's: {'; '.join(map(str, changed))}; give "
            f"the config the file's: {' '.join(setting.way_out for setting in changed)}"
        )
